"""What parts of a machine say of themselves, each asked in a process of its own.

    python -m kp_runtime.probes driver

A library that does not fit ends its process, a broken driver never answers: `ask` tells it instead of
doing the same. A probe gives what it found as a dict that JSON can hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kp_runtime.errors import BackendError, KpError, MissingExtraError, reason_of

__all__ = ["PROBES", "Outcome", "ask", "outcome_of_command"]

Facts = dict[str, Any]

_MARK = "kp-probe "
"""Before the answer: engines print lines of their own."""


@dataclass(frozen=True)
class Outcome:
    """How a probe ended.

    Attributes:
        state: `answered`, `absent` (a package or library is not installed), `failed` (an error),
            `crashed` or `hung`.
        text: one line about it, unless it answered.
        facts: what it found, if it answered.
    """

    state: str
    text: str = ""
    facts: Facts = field(default_factory=dict)

    @property
    def broken(self) -> bool:
        """Whether the same would have ended, or stopped, a user's program."""
        return self.state in ("crashed", "hung")


def ask(probe: str, *arguments: str, seconds: float | None, given: bytes = b"") -> Outcome:
    """Runs one of `PROBES` in a fresh process.

    Args:
        probe: its name.
        arguments: of its function.
        seconds: time that it has; None sets no end.
        given: what it reads from stdin.
    """
    return outcome_of_command([sys.executable, "-m", __name__, probe, *arguments], seconds, given)


def outcome_of_command(command: Sequence[str], seconds: float | None, given: bytes = b"") -> Outcome:
    """Runs a probe's command line, whatever becomes of it."""
    import subprocess  # not where a probe runs, which may measure what is in memory

    # the very kp_runtime that asks, wherever it was imported from
    house = str(Path(__file__).resolve().parents[1])
    search = os.pathsep.join(filter(None, [house, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # modules that lie in the current folder are none of the machine's (Python 3.11 and newer heed it)
        env=os.environ | {"PYTHONPATH": search, "PYTHONSAFEPATH": "1"},
    )
    try:
        output, said = process.communicate(given, timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process inside a broken driver can't be ended
            process.communicate(timeout=5)
        return Outcome("hung", f"no answer within {seconds:g} s")
    except BaseException:  # such as Ctrl-C
        process.kill()
        raise
    lines = output.decode(errors="replace").splitlines()
    answer = next((line for line in reversed(lines) if line.startswith(_MARK)), None)
    if answer is not None:
        return Outcome(**json.loads(answer[len(_MARK) :]))
    last = next((line for line in reversed(said.decode(errors="replace").splitlines()) if line.strip()), "")
    return Outcome("crashed", _end_of(process.returncode) + (f": {last.strip()[:200]}" if last else ""))


def _end_of(code: int) -> str:
    if code >= 0:
        return f"the process ended with status {code} and no answer"
    import signal

    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    memory = ", as the system does where memory is short (dmesg tells)" if name == "SIGKILL" else ""
    return f"the process was ended by {name}{memory}"


def driver() -> Facts:
    """The CUDA driver and its devices, asked without cuda-python, which may be what is missing."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError as error:
        raise ModuleNotFoundError(str(error)) from error
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    devices = [] if status else [_device(cuda, index) for index in range(count.value)]
    return {"cuda": version.value, "status": status, "devices": devices}


def _device(cuda: ctypes.CDLL, index: int) -> Facts:
    """A device; `status` is the error of opening it, with which nothing is known of its memory."""
    name, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, len(name), index)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, index)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, index)
    status = (
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), index)
        or cuda.cuCtxSetCurrent(context)
        or cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    )
    cuda.cuDevicePrimaryCtxRelease_v2(index)
    return {
        "name": name.value.decode(errors="replace"),
        "capability": major.value * 10 + minor.value,
        "status": status,
        "free": free.value,
        "total": total.value,
    }


def nvrtc(arch: str = "") -> Facts:
    """NVRTC's version, once it has compiled the crop kernel for an architecture such as `sm_87`, if one is named."""
    from kp_runtime.cuda_driver import bindings
    from kp_runtime.preprocess_cuda import compile_cubin

    if arch:
        compile_cubin(arch)
    _, major, minor = bindings("nvrtc").nvrtcVersion()
    return {"version": f"{major}.{minor}"}


def crops() -> Facts:
    """Crops of noise cut on the GPU: how many grey levels differ from the CPU's."""
    import numpy as np

    from kp_runtime.cuda_driver import CudaDriver
    from kp_runtime.frame import as_frame
    from kp_runtime.geometry import matrices_from_boxes
    from kp_runtime.preprocess_cpu import crops_from_frame
    from kp_runtime.preprocess_cuda import CropKernels, crops_to_host

    image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    matrices = matrices_from_boxes(np.array([[20.0, 30, 90, 100], [150, 20, 300, 220]]), 64, 1.3)
    frame, driver = as_frame(image), CudaDriver()
    wanted = crops_from_frame(frame, matrices, 64)
    found = crops_to_host(driver, CropKernels(driver), frame, matrices, 64)
    return {"levels": found.size, "different": int((found != wanted).sum())}


def onnxruntime() -> Facts:
    """ONNX Runtime's version and providers; `gpu_code` is its CUDA provider's, where there is one."""
    from kp_runtime.gpu_code import gpu_code_from_library

    module = importlib.import_module("onnxruntime")
    facts = {"version": module.__version__, "providers": module.get_available_providers(), "gpu_code": None}
    for library in sorted((Path(str(module.__file__)).parent / "capi").glob("*onnxruntime_providers_cuda.*")):
        facts["gpu_code"] = {k: sorted(v) for k, v in dataclasses.asdict(gpu_code_from_library(library)).items()}
    return facts


def cv2() -> Facts:
    """OpenCV's version, and how it is made to cut crops that are right to the bit."""
    from kp_runtime.geometry import way_to_sample

    module = importlib.import_module("cv2")
    return {"version": module.__version__, "sampling": way_to_sample().__name__.removeprefix("_by_")}


def module(name: str) -> Facts:
    """A module's version and file."""
    found = importlib.import_module(name)
    return {"version": str(getattr(found, "__version__", "")), "file": str(found.__file__)}


def backend(name: str, bundle: str) -> Facts:
    """One real inference: the bundle's golden crop through a backend, as every `open_backend` does it.

    `crop_grey` is how far it is off where the CPU cuts it; None for a GPU, of whose crops `crops` tells.
    """
    from kp_runtime.backend_by_name import open_backend

    opened = open_backend(bundle, backend=name)
    if opened.report.golden_error_px is None:
        raise BackendError(f"the bundle {bundle} has no golden crop, so nothing shows that {name} is right")
    return dataclasses.asdict(opened.report) | {"crop_grey": opened.check_crops() if name == "ort-cpu" else None}


def start(file: str, engine: str, threads: str) -> Facts:
    """What a fresh process pays for a model file: time of the load, of the first crop (from stdin), memory."""
    import numpy as np

    from kp_runtime.backend_by_name import open_backend

    levels = np.frombuffer(sys.stdin.buffer.read(), np.uint8)
    size = math.isqrt(len(levels))
    crop = levels.reshape(1, 1, size, size)
    base = _peak_kib()
    begun = time.perf_counter()
    backend = open_backend(file, engine, threads=json.loads(threads))
    loaded = time.perf_counter()
    backend.infer(crop)
    first = time.perf_counter()
    return {
        "load_ms": (loaded - begun) * 1e3,
        "first_ms": (first - loaded) * 1e3,
        "base_kib": base,
        "peak_kib": _peak_kib(),
    }


def _peak_kib() -> int | None:
    """Most memory that this process had resident so far; None where the system does not tell."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM:")), None)


def detector(checkout: str) -> Facts:
    """The face detector that is used where none is named, opened; `missed` is why it is not the project's own."""
    import warnings

    from kp_runtime.detector_by_name import detector_name, load_detector

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        name = detector_name("auto", checkout=Path(checkout) if checkout else None)
    load_detector(name, threads=1)
    return {"name": name, "missed": " ".join(str(warning.message) for warning in told)}


PROBES: dict[str, Callable[..., Facts]] = {
    probe.__name__: probe for probe in (driver, nvrtc, crops, onnxruntime, cv2, module, detector, backend, start)
}


def _answer(probe: str, *arguments: str) -> Outcome:
    try:
        return Outcome("answered", facts=PROBES[probe](*arguments))
    except MissingExtraError as error:
        return Outcome("absent", reason_of(error))
    except KpError as error:
        return Outcome("failed", reason_of(error))
    except Exception as error:  # whatever a library raises
        # a package that lacks one of its own is not absent
        absent = isinstance(error, ModuleNotFoundError) and error.name in (None, probe, *arguments)
        text = reason_of(error)
        return Outcome("absent", text) if absent else Outcome("failed", f"{type(error).__name__}: {text}")


if __name__ == "__main__":
    print("\n" + _MARK + json.dumps(dataclasses.asdict(_answer(*sys.argv[1:]))), flush=True)
