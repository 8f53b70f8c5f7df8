"""TensorRT plans as the inference engine: looked at before they are loaded, one engine for all threads.

A plan is machine code for one kind of GPU and one TensorRT version, and TensorRT has no call that
tells beforehand whether it fits. So the manifest's entry is compared with this machine first
(`plan_mismatch`), and its bytes are those of the manifest's sha256. TensorRT's runtime ends the process
where CUDA does not work; a device that answered (`CudaDriver`) and a runtime that reported no
error come before anything else is asked of it. Every TensorRT name used here exists in 10.3.0 and
in 11.4.0.

**No plan has been run on a GPU yet**: what was checked, and how, is told in docs/tensorrt.md.
"""

from __future__ import annotations

import ctypes
import importlib
import platform
import re
import shlex
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.device_backend import DeviceBackend, Lane
from kp_runtime.errors import BackendError, reason_of
from kp_runtime.manifest import FileEntry, Manifest
from kp_runtime.spec import ModelSpec

__all__ = [
    "TensorRtBackend",
    "check_runtime",
    "is_too_old",
    "open_plan",
    "plan_mismatch",
    "tensorrt_logger",
    "tensorrt_module",
]

MODULES = ("tensorrt", "tensorrt_lean", "tensorrt_dispatch")
"""Packages with a runtime; the last two load version-compatible plans alone."""

OLDEST = "10.3"
"""The first TensorRT that builds plans of this project and runs them."""

ERRORS = ("error", "internal_error")
"""Severities of TensorRT's messages that tell a failure."""

_COMMAND = re.compile(r"kp plan BUNDLE( --[a-z-]+( [a-z0-9]+)?)*")
_VERSION = re.compile(r"(\d+(?:\.\d+)+)(?:\.post\d+)?")  # TensorRT's wheels may be packed a second time


def tensorrt_module(names: Sequence[str] = MODULES) -> Any:
    """The first of these modules that is installed. To import one is safe; to use it needs a device that works.

    Raises:
        BackendError: none is installed, or it can't be loaded.
    """
    reasons = []
    for name in names:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            reasons.append(reason_of(error, lines=1))
            continue
        if hasattr(module, "Runtime"):
            return module
        reasons.append(f"{name} is a folder without code, as after an uninstall")
    raise BackendError(
        f"TensorRT is not installed here ({reasons[0]}): JetPack brings it for the system's Python, elsewhere "
        "pip install tensorrt-cu12 or tensorrt-cu13, by the driver's CUDA"
    )


def open_plan(
    folder: Path, manifest: Manifest, names: Sequence[str], passed_over: list[str]
) -> tuple[str, TensorRtBackend]:
    """The first of a bundle's plans that fits this machine: its name, and the engine with it.

    What speaks against the plans before it is added to `passed_over`.

    Raises:
        IntegrityError: the plan that fits is cut off or not the manifest's.
        BackendError: no device, no TensorRT, or no plan that fits: with the command that builds one here.
    """
    driver, trt = CudaDriver(), tensorrt_module()
    reasons: list[str] = []
    for name in names:
        entry = manifest.files[name]
        reason = plan_mismatch(entry, driver, trt)
        if reason is None:
            try:
                opened = TensorRtBackend(manifest.read_file(folder, name), entry, manifest.spec, driver, trt)
                opened.warnings = (*_built_elsewhere(folder, name, entry, driver), *opened.warnings)
                passed_over += reasons
                return name, opened
            except _RefusedError as error:
                reason = f"is refused: {error}"
        reasons.append(f"{name} {reason}")
    raise BackendError(f"{'; '.join(reasons)}; {_rebuild(folder, manifest.files[names[0]])}")


class _RefusedError(BackendError):
    """TensorRT does not take this plan; it may take another one."""


def _rebuild(folder: Path, entry: FileEntry) -> str:
    """What to do where a plan does not fit: the command that builds one with its options on this machine."""
    command = str(entry.made.get("rebuild"))
    if not _COMMAND.fullmatch(command):  # what stands in a manifest is shown as a command only where it is ours
        command = f"kp plan BUNDLE --precision {entry.precision}"
    return f"build one here: {command.replace('BUNDLE', shlex.quote(str(folder)), 1)}"


def _built_elsewhere(folder: Path, name: str, entry: FileEntry, driver: CudaDriver) -> tuple[str, ...]:
    """What to know of a plan that fits and was built on a GPU of the same kind, but of another size."""
    built, here = entry.made.get("multiprocessors"), driver.multiprocessors
    if not isinstance(built, int) or built == here or entry.made["options"]["hardware_compatible"]:
        return ()
    return (f"{name} was built on a GPU with {built} multiprocessors, this one has {here}; {_rebuild(folder, entry)}",)


def plan_mismatch(entry: FileEntry, driver: CudaDriver, trt: Any) -> str | None:
    """Why a plan can't run here, by what its manifest's entry says; None where it can."""
    try:
        made = entry.made
        options = made["options"]
        built_arch = "sm_" + "".join(map(str, _numbers(made["compute_capability"])))
        built_tensorrt, here = _numbers(made["tensorrt"]), _numbers(trt.__version__)
        any_newer, any_ampere = bool(options["version_compatible"]), bool(options["hardware_compatible"])
        if not isinstance(options.get("dla_core", 0), int | None):
            raise TypeError("dla_core")
        processor = str(made.get("processor", platform.machine()))  # older entries do not say
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"has an entry that does not say for which GPU and TensorRT it is ({error!r})"
    shared = min(len(built_tensorrt), len(here))
    is_same = built_tensorrt[:shared] == here[:shared]
    is_ampere = _compute_capability(driver.arch) >= 80 <= _compute_capability(built_arch)
    if processor != platform.machine():
        return f"is for a {' '.join(processor.split())[:20]} machine, this one is {platform.machine()}"
    if driver.arch != built_arch and not (any_ampere and is_ampere):
        return f"is for {' '.join(str(made.get('gpu')).split())[:60]} ({built_arch}), this GPU is {driver.arch}"
    if not is_same and not (any_newer and here > built_tensorrt):
        return f"is for TensorRT {made['tensorrt']}, here is {trt.__version__}"
    if not any_newer and trt.__name__ != MODULES[0]:
        return f"needs the package tensorrt, here is {trt.__name__}, which loads version-compatible plans alone"
    return None


def is_too_old(version: str) -> bool:
    """Whether a TensorRT of this version is older than `OLDEST`; one that can't be read is not."""
    found = _VERSION.match(version)
    return found is not None and _numbers(found[0]) < _numbers(OLDEST)


def _numbers(version: str) -> tuple[int, ...]:
    found = _VERSION.fullmatch(version)
    if found is None:
        raise ValueError(version[:40])
    return tuple(int(part) for part in found[1].split("."))


def _compute_capability(arch: str) -> int:
    """87 of `sm_87`."""
    return int(arch.removeprefix("sm_"))


class TensorRtBackend(DeviceBackend):
    """A plan on a GPU: one engine; each lane has an execution context of its own.

    Args:
        plan: the plan's bytes, which `plan_mismatch` has nothing against.
        entry: its entry in the manifest.
        spec: the contract that it must have.
        driver: the device, open.
        trt: a module of `MODULES`.

    Raises:
        BackendError: TensorRT can't use CUDA here or refuses the plan, or its tensors are not the contract's.
    """

    name = "tensorrt"
    batches: tuple[int, int]
    """Fewest and most crops of a call, by the plan's profile."""

    def __init__(self, plan: bytes, entry: FileEntry, spec: ModelSpec, driver: CudaDriver, trt: Any) -> None:
        super().__init__(spec, driver)
        self._errors = _Errors()
        logger = tensorrt_logger(trt, self._errors.tell)
        driver.make_current()
        runtime = _runtime(trt, logger, self._errors, driver.cuda)
        options = entry.made["options"]
        if options["version_compatible"]:
            runtime.engine_host_code_allowed = True  # such a plan brings its own run-time; its sha256 is known
        if options.get("dla_core") is not None:
            runtime.DLA_core = options["dla_core"]
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise _RefusedError(f"TensorRT {trt.__version__} can't load the plan: {self._errors.last()}")
        self._check_contract(engine, trt)
        self.warnings = tuple(f"TensorRT: {text}" for text in dict.fromkeys(self._errors.warnings))
        self._engine, self._alive = engine, (runtime, logger)
        shapes = engine.get_tensor_profile_shape("crops", 0)
        self.batches = int(shapes[0][0]), int(shapes[2][0])
        self._opening = threading.Lock()

    def _check_contract(self, engine: Any, trt: Any) -> None:
        size, found = self.spec.size, {}
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            shape = tuple(int(length) for length in engine.get_tensor_shape(name))[1:]
            found[name] = (engine.get_tensor_mode(name), engine.get_tensor_dtype(name), shape)
        wanted = {
            "crops": (trt.TensorIOMode.INPUT, trt.DataType.UINT8, (1, size, size)),
            **{n: (trt.TensorIOMode.OUTPUT, trt.DataType.FLOAT, shape) for n, shape in self.spec.outputs.items()},
        }
        if found != wanted:
            raise _RefusedError(f"the plan does not have the contract's input and output: {found} instead of {wanted}")

    def open_lane(self, max_faces: int) -> Lane:
        """See `DeviceBackend.open_lane`."""
        with self._opening:
            lane = _TensorRtLane(self.driver, self.spec, max_faces, self.batches)
            lane.open(self._engine, self._alive, self._errors)
        return lane


class _TensorRtLane(Lane):
    """A lane with an execution context."""

    capturable = True
    _context: Any = None

    def open(self, engine: Any, alive: Any, errors: _Errors) -> None:
        """Makes the context; `alive` is what the engine needs to live."""
        self._alive, self._errors = (engine, alive), errors
        self._context = engine.create_execution_context()
        if self._context is None:
            self.close()
            raise BackendError(
                f"TensorRT has no memory for another execution context: {errors.last()}; close other lanes or programs"
            )

    def _feed(self, input_ptr: int, output_ptrs: tuple[int, ...], count: int) -> None:
        context, outputs = self._context, zip(self.spec.outputs, output_ptrs, strict=True)
        if not (
            context.set_tensor_address("crops", input_ptr)
            and all(context.set_tensor_address(name, address) for name, address in outputs)
            and context.set_input_shape("crops", (count, 1, self.spec.size, self.spec.size))
            and context.execute_async_v3(self.stream)
        ):
            raise BackendError(
                f"TensorRT failed on {count} crops: {self._errors.last()}; see that nvidia-smi (tegrastats on a "
                "Jetson) shows a GPU with free memory"
            )

    def close(self) -> None:
        """See `Lane.close`."""
        super().close()
        self._context = None


class _Errors(deque[str]):
    """TensorRT's last errors; `warnings` are what else it says of importance."""

    def __init__(self) -> None:
        super().__init__(maxlen=8)
        self.warnings = deque[str](maxlen=8)

    def tell(self, severity: str, text: str) -> None:
        if severity in (*ERRORS, "warning"):
            (self.warnings if severity == "warning" else self).append(" ".join(text.split()))

    def last(self) -> str:
        return self[-1] if self else "it gave no reason"


def check_runtime(trt: Any, cuda: str) -> None:
    """Whether TensorRT can use CUDA, asked before what would end the process where it can't.

    Args:
        trt: a module of `MODULES`.
        cuda: newest CUDA version of the driver, whose device is open.

    Raises:
        BackendError: it can't.
    """
    errors = _Errors()
    _runtime(trt, tensorrt_logger(trt, errors.tell), errors, cuda)


def _runtime(trt: Any, logger: Any, errors: _Errors, cuda: str) -> Any:
    """TensorRT's runtime, where it can use CUDA."""
    reason = None
    try:
        runtime = trt.Runtime(logger)
    except TypeError as error:  # what the full package says of a runtime that was not made
        reason = errors[0] if errors else reason_of(error)
    else:
        if errors:  # to touch the runtime now, to read an attribute or to free it, would end the process
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(runtime))
            reason = errors[0]
    if reason is not None:
        raise BackendError(
            f"TensorRT {trt.__version__} can't use CUDA here: {reason}; the driver runs up to CUDA {cuda}: update it, "
            "or install the TensorRT that is made for it"
        )
    return runtime


def tensorrt_logger(trt: Any, tell: Callable[[str, str], None]) -> Any:
    """A `trt.ILogger` that tells each message: its severity, such as `error`, and its text."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """TensorRT calls `log`, also from threads of its own."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            tell(severity.name.lower(), msg)

    return Logger()
