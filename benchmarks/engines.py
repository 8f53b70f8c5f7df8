"""The engines that are compared, each as a function from crops to keypoints.

A `Candidate` is one engine on one file: `ready(batch)` gives a function from crops `(batch, 1,
size, size)` uint8 to keypoints `(batch, 68, 2)` float32, pixels of the crop. What can't run here is
a `LeftOut` with its reason; nothing is left out without one.

ONNX Runtime runs through `kp_runtime`'s own backend after its `warmup`, so what is measured is what
users run: a batch whole, in parts, or in parts side by side, whichever that chose.
OpenVINO gets every advantage that it has in a program: shapes fixed to the batch, tensors shared
instead of copied, one stream, the latency hint, and the int8 graph without the layout that is for ONNX
Runtime's kernels alone.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from kp_export.first_convolution import unfold_first_convolution
from kp_runtime.backend import Backend
from kp_runtime.backend_by_name import open_backend
from kp_runtime.errors import BackendError, MissingExtraError
from kp_runtime.manifest import Manifest
from kp_train.checkpoint import CHECKPOINT_NAME, load_checkpoint
from kp_train.config import has_bfloat16

__all__ = [
    "OPENVINO",
    "ORT",
    "Candidate",
    "Infer",
    "LeftOut",
    "bf16_blocker",
    "candidates_from_bundle",
    "openvino_ready",
    "torch_ready",
]

Infer = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

ORT, OPENVINO = "ONNX Runtime", "OpenVINO"
EAGER, COMPILED = "PyTorch", "torch.compile"


@dataclass(frozen=True)
class Candidate:
    """One engine on one file.

    Attributes:
        engine: its name.
        precision: `fp32`, `fp16`, `bf16` or `int8`: of the arithmetic's main part.
        file: the bundle's file that it runs.
        sha256: of that file.
        ready: makes the function for a batch size; may raise what the engine raises.
        feeding: tells, once it is ready, how a batch of a size is fed, where there is a choice.
    """

    engine: str
    precision: str
    file: str
    sha256: str
    ready: Callable[[int], Infer]
    feeding: Callable[[int], str | None] = lambda batch: None

    @property
    def name(self) -> str:
        """Engine and precision."""
        return f"{self.engine} {self.precision}"


@dataclass(frozen=True)
class LeftOut:
    """An engine that is not measured, and why; `batch` is None where it is at none."""

    engine: str
    precision: str
    batch: int | None
    reason: str


def candidates_from_bundle(bundle: Path, threads: int) -> Iterator[Candidate | LeftOut]:
    """All engines on a bundle's checkpoint and ONNX files; PyTorch eager, the reference, is first."""
    net, manifest = load_checkpoint(bundle)
    sha256 = manifest.files[CHECKPOINT_NAME].sha256
    yield Candidate(EAGER, "fp32", CHECKPOINT_NAME, sha256, torch_ready(net, threads, compiled=False))
    yield Candidate(COMPILED, "fp32", CHECKPOINT_NAME, sha256, torch_ready(net, threads, compiled=True))
    files = {entry.precision: name for name, entry in manifest.files.items() if entry.kind == "onnx"}
    for precision in ("fp32", "fp16", "int8"):
        yield _on_file(ORT, precision, bundle, manifest, files.get(precision), threads)
    for precision in ("fp32", "bf16", "int8"):
        if precision == "bf16" and (reason := bf16_blocker()):
            yield LeftOut(OPENVINO, precision, None, reason)
        else:
            file = files.get("fp32" if precision == "bf16" else precision)
            yield _on_file(OPENVINO, precision, bundle, manifest, file, threads)


def _on_file(
    engine: str, precision: str, bundle: Path, manifest: Manifest, file: str | None, threads: int
) -> Candidate | LeftOut:
    if file is None:
        hint = " --calibration FACES" if precision == "int8" else ""
        reason = f"the bundle has no file for it; kp export --{precision}{hint} adds one"
        return LeftOut(engine, precision, None, reason)
    path, sha256 = manifest.check_file(bundle, file), manifest.files[file].sha256
    if engine == ORT:
        backend = functools.cache(lambda: open_backend(path, "ort-cpu", threads=threads))
        return Candidate(engine, precision, file, sha256, _ort_ready(backend), lambda n: _feeding(backend(), n))
    ready = openvino_ready(_plain(path), threads, hint="bf16" if precision == "bf16" else "f32")
    return Candidate(engine, precision, file, sha256, ready)


def torch_ready(net: Any, threads: int, *, compiled: bool) -> Callable[[int], Infer]:
    """PyTorch on a network; compiled anew for each batch size."""
    import torch

    net = net.to(memory_format=torch.channels_last)

    def ready(batch: int) -> Infer:
        torch.set_num_threads(threads)
        network = torch.compile(net, fullgraph=True, dynamic=False) if compiled else net

        def infer(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
            with torch.inference_mode():
                return network(torch.from_numpy(crops)).numpy()  # type: ignore[no-any-return]

        return infer

    return ready


def _ort_ready(backend: Callable[[], Backend]) -> Callable[[int], Infer]:
    """ONNX Runtime as `kp_runtime` opens it, once for all batch sizes."""

    def ready(batch: int) -> Infer:
        opened = backend()
        time.sleep(0.2)  # until no other engine's threads spin: the warm-up measures to choose
        opened.warmup(batch)
        return opened.infer

    return ready


def _feeding(backend: Backend, batch: int) -> str | None:
    """The fastest way to feed so many crops; the groups of sizes are powers of two."""
    times = backend.batch_times().get(1 << (batch - 1).bit_length(), {})
    return next(iter(times), None)


def _plain(path: Path) -> bytes:
    """An ONNX file with its first convolution as PyTorch has it: OpenVINO is faster on that one."""
    model = onnx.load(path)
    unfold_first_convolution(model)
    return model.SerializeToString()  # type: ignore[no-any-return]


def openvino_ready(model: bytes, threads: int, hint: str = "f32") -> Callable[[int], Infer]:
    """OpenVINO on the CPU, compiled for each batch size.

    Args:
        model: the ONNX file's bytes.
        threads: of inference.
        hint: `f32` or `bf16`: the type in which OpenVINO may compute what the file has as float32.
    """

    def ready(batch: int) -> Infer:
        ov = _import_openvino()
        core = ov.Core()
        read = core.read_model(model)
        read.reshape([batch, *list(read.input(0).partial_shape)[1:]])
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": hint,
        }
        compiled = core.compile_model(read, "CPU", options)
        real = compiled.get_property("INFERENCE_NUM_THREADS")
        if real != threads:
            raise BackendError(f"OpenVINO took {real} threads instead of {threads}; its times would not compare")
        request = compiled.create_infer_request()

        def infer(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
            return request.infer([crops], share_inputs=True, share_outputs=True)[0]  # type: ignore[no-any-return]

        return infer

    return ready


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "bench", "the comparison with OpenVINO") from error
    return openvino


def bf16_blocker(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Why bfloat16 would be emulated here; None where the CPU has it."""
    known = has_bfloat16(cpuinfo)
    if known is None:
        return f"whether this CPU has bfloat16 arithmetic can't be read on {platform.system()}"
    return None if known else "this CPU has no bfloat16 arithmetic (no avx512_bf16, amx_bf16, bf16)"
