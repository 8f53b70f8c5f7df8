"""A plan into a bundle: `kp plan`, and what `kp export --engine` does. Needs neither torch nor onnx."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from kp_export.cuda_device import cuda_device
from kp_export.plan_builder import Progress
from kp_export.plan_from_onnx import PlanReport, plan_from_onnx
from kp_export.plan_options import PlanOptions, plan_name
from kp_export.staging import mend, staging
from kp_runtime import __version__
from kp_runtime.backend_by_name import open_backend
from kp_runtime.backend_trt import MODULES, tensorrt_module
from kp_runtime.errors import BackendError, ExportError, IntegrityError, KpError
from kp_runtime.manifest import Manifest, file_entry

__all__ = ["add_plan"]

ONNX_OF = {"fp32": "fp32", "fp16": "fp16", "int8": "int8-trt"}
"""A plan's precision to that of the ONNX file it is built from."""


def add_plan(
    bundle: Path,
    precision: str,
    options: PlanOptions | None = None,
    *,
    progress: Progress | None = None,
) -> PlanReport:
    """Builds a plan from the bundle's ONNX file and enters it in the manifest.

    The bundle is replaced when the plan is complete, its precision was proven, and a program opened it and found
    the golden keypoints; until then, and on any error, it stays as it was, but for the build's log beside its files.

    Args:
        bundle: the bundle's folder.
        precision: `fp32`, `fp16` or `int8`.
        options: batch sizes, memory, compatibility; the defaults when None.
        progress: told each phase's name and how far it is, 0 to 1.

    Raises:
        BundleError: the bundle or its ONNX file can't be used, or the file was changed during the build.
        BackendError: TensorRT, a CUDA device, or an ONNX file of this precision is missing.
        ExportError: the plan can't be built, does not compute in this precision, or can't be opened here.
    """
    if precision not in ONNX_OF:
        raise ExportError(f"a plan's precision must be one of {', '.join(ONNX_OF)}, got {precision!r}")
    bundle = bundle.resolve()
    mend(bundle)
    source = f"model.{ONNX_OF[precision]}.onnx"
    files = Manifest.read(bundle).files
    if source not in files:
        switch = "" if precision == "fp32" else f" --{precision}"
        make = f"make it with: kp export {shlex.quote(str(bundle))}{switch}"
        if all(entry.kind != "checkpoint" for entry in files.values()):  # a packed one
            make = f"pack it along: kp pack SOURCE --precision {ONNX_OF[precision]} --out {shlex.quote(str(bundle))}"
        raise BackendError(f"{bundle} has no {source} to build the plan from; {make}")
    trt, device = tensorrt_module(MODULES[:1]), cuda_device()
    name = plan_name(precision, device, trt.__version__, options)
    with staging(bundle) as stage:
        manifest = Manifest.read(bundle)
        (stage / f"{name}.log").unlink(missing_ok=True)  # of an earlier failure
        report = plan_from_onnx(
            manifest.check_file(bundle, source),  # errors name it, not the stage
            stage / name,
            options,
            precision=precision,
            trt=trt,
            device=device,
            progress=progress,
            log_path=bundle / f"{name}.log",
        )
        if report.onnx_sha256 != manifest.files[source].sha256:
            raise IntegrityError(f"{bundle / source} was changed while the plan was built; export it again")
        made = {"by": "plan_from_onnx", "kp": __version__} | dataclasses.asdict(report)
        entry = file_entry(
            stage / name, "plan", precision=precision, parent_sha256=manifest.files[source].sha256, made=made
        )
        manifest.with_files(manifest.files | {name: entry}).write(stage)
        report = dataclasses.replace(report, golden_error_px=_golden_error_px(stage / name, bundle))
        entry = dataclasses.replace(entry, made=made | {"golden_error_px": report.golden_error_px})
        manifest.with_files(manifest.files | {name: entry}).write(stage)
    return report


def _golden_error_px(plan: Path, bundle: Path) -> float | None:
    """What a plan in the stage of a bundle does to the golden crop, opened as a program opens it."""
    try:
        return open_backend(plan, "tensorrt").report.golden_error_px
    except KpError as error:
        reason = str(error).replace(str(plan.parent), str(bundle)).partition("; build one here: ")[0]
        raise ExportError(f"{plan.name} is not kept, as it does not run here: {reason}") from error
