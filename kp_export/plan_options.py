"""What a TensorRT plan is built for, what its file is called, and the commands that build it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from kp_export.cuda_device import CudaDevice
from kp_runtime.errors import ExportError

__all__ = ["INPUT", "PlanOptions", "plan_name", "rebuild_command", "trtexec_command"]

INPUT = "crops"
"""The one input of every graph of this project."""


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is built for.

    Attributes:
        min_batch: fewest faces a call.
        opt_batch: the batch size that kernels are chosen for.
        max_batch: most faces a call.
        workspace_mib: most scratch memory that a kernel may take.
        version_compatible: a plan that later TensorRT versions can load; slower.
        hardware_compatible: a plan for all GPUs from Ampere on; slower.
        dla_core: run on this DLA core where TensorRT offers one; the batch sizes must be equal.
    """

    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 32
    workspace_mib: int = 1024
    version_compatible: bool = False
    hardware_compatible: bool = False
    dla_core: int | None = None

    def __post_init__(self) -> None:
        batches = (self.min_batch, self.opt_batch, self.max_batch)
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            raise ExportError(f"a plan's batch sizes must be 1 <= min <= opt <= max, got {batches}")
        if self.workspace_mib < 1:
            raise ExportError(f"a plan's workspace must be at least 1 MiB, got {self.workspace_mib}")
        if self.dla_core is not None and (self.dla_core < 0 or len(set(batches)) > 1):
            raise ExportError(
                f"the DLA takes one batch size and a core from 0 on: set min, opt and max batch to the same, got "
                f"{batches} and core {self.dla_core}"
            )


def plan_name(precision: str, device: CudaDevice, tensorrt_version: str, options: PlanOptions | None = None) -> str:
    """A plan's file name, which tells where it fits: `model.fp16.sm87.trt10.3.0.plan`, or `….dla0.plan`.

    Plans of one name replace each other: those that differ in batch sizes and scratch memory alone.
    """
    options = options or PlanOptions()
    where = "" if options.dla_core is None else f".dla{options.dla_core}"
    where += ".newer" * options.version_compatible + ".ampere" * options.hardware_compatible
    return f"model.{precision}.{device.sm}.trt{tensorrt_version}{where}.plan"


def rebuild_command(options: PlanOptions, precision: str) -> str:
    """The project's command that builds such a plan; BUNDLE stands for the bundle's folder."""
    words = [f"kp plan BUNDLE --precision {precision}"]
    for name, value in asdict(options).items():
        if value != getattr(PlanOptions, name):
            flag = "--" + name.replace("_", "-")
            words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)


def trtexec_command(
    onnx_name: str, plan: str, options: PlanOptions, shapes: tuple[tuple[int, ...], ...], tensorrt_version: str
) -> str:
    """The same build by NVIDIA's `trtexec` alone, which makes no receipt.

    Args:
        onnx_name: the ONNX file.
        plan: the plan's file.
        options: of the build.
        shapes: of `crops`: fewest, tuned for, most.
        tensorrt_version: trtexec 10 needs to be told that the network is strongly typed.
    """
    words = [f"trtexec --onnx={onnx_name} --saveEngine={plan}"]
    words += ["--stronglyTyped"] if tensorrt_version.startswith("10.") else []
    words += ["--noTF32"]
    for which, shape in zip(("min", "opt", "max"), shapes, strict=True):
        words.append(f"--{which}Shapes={INPUT}:{'x'.join(map(str, shape))}")
    words += [f"--memPoolSize=workspace:{options.workspace_mib}", "--profilingVerbosity=detailed", "--skipInference"]
    words += ["--versionCompatible"] if options.version_compatible else []
    words += ["--hardwareCompatibilityLevel=ampere+"] if options.hardware_compatible else []
    words += [f"--useDLACore={options.dla_core} --allowGPUFallback"] if options.dla_core is not None else []
    return " ".join(words)
