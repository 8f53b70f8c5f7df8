"""TensorRT plans from ONNX files: one path for TensorRT 10.3 to 11.4.

Precision lives in the graph alone, in the types of its tensors. After the build the engine
inspector is read (`precision_receipt`), and a plan that does not compute in the type that was
asked for is refused. A plan file is exactly the engine's bytes; what it needs to run is in
`PlanReport`, for the manifest.

Nothing here imports torch, onnx or TensorRT when it is imported.
"""

from __future__ import annotations

import hashlib
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kp_export.build_log import BuildLog
from kp_export.cuda_device import CudaDevice, cuda_device
from kp_export.plan_builder import PlanBuilder, Progress
from kp_export.plan_options import PlanOptions, rebuild_command, trtexec_command
from kp_export.precision_receipt import LEAST_SHARE, PrecisionReceipt, check_receipt, receipt_from_inspector
from kp_runtime.backend_trt import MODULES, OLDEST, check_runtime, is_too_old, tensorrt_module
from kp_runtime.cubin import cache_folder as default_cache
from kp_runtime.errors import BackendError, ExportError
from kp_runtime.files import write_file

__all__ = ["PlanReport", "plan_blocker", "plan_from_onnx"]

BUILD_THERE = "a plan is built on the device that runs it, there: kp plan BUNDLE --precision fp16"


@dataclass(frozen=True)
class PlanReport:
    """What was built, for the manifest's entry.

    Attributes:
        file: the plan's file name.
        precision: the type that was asked for and found.
        gpu: name of the device.
        compute_capability: such as `8.7`.
        multiprocessors: how many the device has: boards of one capability differ in it.
        cuda: newest CUDA version of the driver.
        driver: version of the kernel driver, where known.
        tensorrt: version that built it; only this one loads it, unless version compatible.
        l4t: release line of a Jetson's system.
        processor: of the machine, such as `aarch64`: TensorRT does not carry plans from one kind to another.
        profile: batch sizes min, opt, max of the input `crops`.
        onnx_sha256: of the ONNX file.
        options: all options.
        rebuild: the command that builds it again; BUNDLE stands for the bundle's folder.
        trtexec: the same build by NVIDIA's own tool, in the bundle's folder.
        receipt: in which types the engine computes.
        seconds: how long parsing and building took.
        golden_error_px: largest distance of the golden keypoints from PyTorch's, as the plan was opened for the
            bundle; None where that was not done, or the bundle has no golden crop.
    """

    file: str
    precision: str
    gpu: str
    compute_capability: str
    multiprocessors: int | None
    cuda: str
    driver: str | None
    tensorrt: str
    l4t: str | None
    processor: str
    profile: tuple[int, int, int]
    onnx_sha256: str
    options: PlanOptions
    rebuild: str
    trtexec: str
    receipt: PrecisionReceipt
    seconds: float
    golden_error_px: float | None = None


def plan_from_onnx(
    onnx_path: Path,
    plan_path: Path,
    options: PlanOptions | None = None,
    *,
    precision: str,
    trt: Any = None,
    device: CudaDevice | None = None,
    cache_folder: Path | None = None,
    progress: Progress | None = None,
    log_path: Path | None = None,
) -> PlanReport:
    """Builds a plan on this machine's GPU; on an error the old plan stays in place.

    Args:
        onnx_path: an ONNX file of the contract; its tensors' types are the plan's precision.
        plan_path: where the plan goes; `plan_name` gives its name.
        options: batch sizes, memory, compatibility; the defaults when None.
        precision: `fp32`, `fp16` or `int8`: what the receipt must show.
        trt: the module tensorrt; imported when None.
        device: the device; the first one is opened when None.
        cache_folder: of timing caches; the user's cache folder when None.
        progress: told each phase's name and how far it is, 0 to 1.
        log_path: where the log goes on failure; `<plan_path>.log` when None.

    Raises:
        BackendError: TensorRT or a working CUDA device is missing.
        ExportError: the file can't be parsed or built, or the plan's precision is not what was asked for.
    """
    options = options or PlanOptions()
    if precision not in LEAST_SHARE:
        raise ExportError(f"a plan's precision must be one of {', '.join(LEAST_SHARE)}, got {precision!r}")
    if options.dla_core is not None and precision == "fp32":
        raise ExportError(
            "the DLA computes in fp16 and int8, not in fp32: give the fp16 file, or build without dla_core"
        )
    trt, device = _find(trt, device)
    log = BuildLog(f"{onnx_path} -> {plan_path}, {precision}, {options}, {device}, TensorRT {trt.__version__}")
    build = PlanBuilder(trt, device, options, log, cache_folder or default_cache() / "tensorrt", progress)
    started = time.perf_counter()
    try:
        onnx = _read(onnx_path)
        plan, shapes = build.plan(onnx)
        seconds = time.perf_counter() - started
        receipt = receipt_from_inspector(build.inspect(plan, shapes[1]), options.opt_batch)
        check_receipt(receipt, precision, dla=options.dla_core is not None)
    except Exception as error:
        where = log.write(log_path or plan_path.with_name(plan_path.name + ".log"))
        raise ExportError(f"no plan was built from {onnx_path.name}: {error}; {where}") from error
    write_file(plan_path, plan)
    version = str(trt.__version__)
    return PlanReport(
        file=plan_path.name,
        precision=precision,
        gpu=device.name,
        compute_capability=device.compute_capability,
        multiprocessors=device.multiprocessors,
        cuda=device.cuda,
        driver=device.driver,
        tensorrt=version,
        l4t=device.l4t,
        processor=platform.machine(),
        profile=(options.min_batch, options.opt_batch, options.max_batch),
        onnx_sha256=hashlib.sha256(onnx).hexdigest(),
        options=options,
        rebuild=rebuild_command(options, precision),
        trtexec=trtexec_command(onnx_path.name, plan_path.name, options, shapes, version),
        receipt=receipt,
        seconds=round(seconds, 1),
    )


def plan_blocker(trt: Any = None, device: CudaDevice | None = None) -> str | None:
    """Why no plan can be built here and what to do, in one line; None where one can.

    Args:
        trt: the module tensorrt; looked for when None.
        device: the CUDA device; looked for when None.
    """
    try:
        _find(trt, device)
    except BackendError as error:
        return str(error)
    return None


def _find(trt: Any, device: CudaDevice | None) -> tuple[Any, CudaDevice]:
    """TensorRT and a device that works for it, in this order: importing TensorRT is safe, using it is not."""
    try:
        trt = trt if trt is not None else tensorrt_module(MODULES[:1])
        device = device or cuda_device()
    except BackendError as error:
        raise BackendError(f"{error}; {BUILD_THERE}") from error
    if is_too_old(trt.__version__):
        raise BackendError(
            f"TensorRT {trt.__version__} is too old, {OLDEST} to 11.4 are supported: update it "
            f"(JetPack 6.1 brings 10.3); {BUILD_THERE}"
        )
    try:
        check_runtime(trt, device.cuda)
    except BackendError as error:
        raise BackendError(f"{error}; {BUILD_THERE}") from error
    return trt, device


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ExportError(
            f"{path} can't be read ({error.strerror}); kp export writes the bundle's ONNX files"
        ) from error
