"""What makes, checks and describes bundles: `kp export`, `verify`, `plan`, `pack`, `inspect`, `sign`."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from kp_cli.options import (
    CHECKOUT_DETECTOR,
    ELSE_DEFAULT,
    Json,
    folder_or_default,
    told_of_bundle,
)
from kp_cli.report import (
    build_progress,
    note,
    print_bundle,
    print_json,
    print_parity,
    progress,
    shown_before_kept,
    tell,
)
from kp_runtime.errors import InputError, KpError

_CHECKPOINT = "checkpoint.safetensors"


class Engine(str, enum.Enum):
    """Whether `kp export` builds TensorRT plans."""

    auto = "auto"
    required = "required"
    never = "never"


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A bundle's folder or its checkpoint.safetensors.")],
    fp16: Annotated[bool, typer.Option("--fp16", help="Also write a typed fp16 graph.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Also write int8 graphs, for the CPU and for TensorRT.")] = False,
    calibration: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Labelled faces that set the ranges of int8. Repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The bundle to fill; the checkpoint's own when left out.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="Your labelled faces for the parity check; scikit-image's when left out. Repeatable."
        ),
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="Build TensorRT plans too: if possible, or fail, or not.")
    ] = Engine.auto,
    triton: Annotated[
        Path | None,
        typer.Option(
            metavar="REPO", help="Write models for NVIDIA Triton; with no other option, from the files as they are."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to ONNX, with proof of parity.

    A file that does not predict what PyTorch does fails the export and changes nothing. Where TensorRT is
    installed, plans are built too.

    Example: kp export runs/first --int8 --calibration faces.csv --out out/first
    """
    own = checkpoint.parent if checkpoint.is_file() and checkpoint.name == _CHECKPOINT else checkpoint
    if triton and not (fp16 or int8 or calibration or out or data or engine is not Engine.auto):
        written = _write_triton(own, triton, not as_json)
        if as_json:
            print_json(written)
        return
    if calibration and not int8:
        raise InputError("--calibration finds the ranges of int8: add --int8, or leave it out")
    from kp_export.plan_from_onnx import plan_blocker
    from kp_runtime.errors import ExportError

    blocker = None if engine is Engine.never else plan_blocker()
    triton = triton and triton.resolve()  # the working folder may be the bundle, which is replaced
    if engine is Engine.required and blocker:
        raise ExportError(f"no plan can be built here: {blocker}")
    from kp_export.staging import mend
    from kp_runtime.manifest import Manifest

    mend(own)
    points = Manifest.read(own).spec.points  # what is wrong with the path is told before PyTorch's seconds
    from kp_export.bundle import export_bundle
    from kp_train.data import parse_source

    with told_of_bundle(out or own, own):
        report = export_bundle(
            checkpoint,
            out,
            precisions=("fp32", *(["fp16"] * fp16), *(["int8", "int8-trt"] * int8)),
            sources=[parse_source(text, points) for text in data or []],
            calibration=[parse_source(text, points) for text in calibration or []],
            step=note,
        )
    with shown_before_kept() as raise_lost:
        if not as_json:
            print_parity(report.parity)
            tell(f"bundle: {report.bundle}")
    plans = []
    if engine is not Engine.never and not blocker:
        from kp_export.plan_bundle import add_plan

        wanted = [*(["fp16"] * fp16), *(["int8"] * int8)] or ["fp32"]
        for precision in wanted:
            try:
                with build_progress() as step:
                    plans.append(add_plan(report.bundle, precision, progress=step))
            except KpError as error:
                if engine is Engine.required:
                    raise
                note(f"no TensorRT plan was built: {error}")
    if blocker:
        note(f"no TensorRT plan was built: {blocker}")
    models = {"triton": _write_triton(report.bundle, triton, not as_json)} if triton else {}
    raise_lost()
    for plan in plans if not as_json else ():
        tell(f"plan: {plan.file}")
    if as_json:
        rows = [dataclasses.asdict(p) for p in report.parity]
        print_json({"bundle": report.bundle, "parity": rows, "plans": [dataclasses.asdict(p) for p in plans], **models})


def _write_triton(bundle: Path, repository: Path, listed: bool) -> dict[str, Any]:
    """Writes the model repository, and says what is in it where `listed`."""
    from kp_export.triton import write_repository
    from kp_runtime.default_model import default_detector

    report = write_repository(bundle, repository, default_detector(CHECKOUT_DETECTOR))
    for reason in report.left_out:
        note(f"left out: {reason}")
    for model in report.models if listed else ():
        state = "" if model.is_new else ", as it was"
        tell(f"{report.repository / model.name}: version {model.version}{state}")
    return dataclasses.asdict(report)


def verify(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle's folder; " + ELSE_DEFAULT)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Your own labelled faces; scikit-image's when left out. Repeatable."),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A model file of the bundle; all of them when left out. Repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a page with the numbers and the worst faces.")] = None,
    as_json: Json = False,
) -> None:
    """Compare a bundle's files with PyTorch on your faces.

    Exit status 1 where a file is over its limits.

    Example: kp verify out/resnet18-68 --data faces.csv --out out/verified
    """
    from kp_export.parity import bundled_faces, faces_from_sources
    from kp_export.verify import check_verification, verification_json, verify_bundle
    from kp_export.verify_page import verification_page
    from kp_runtime.manifest import Manifest
    from kp_runtime.signing import signature_state
    from kp_train.data import parse_source

    bundle = folder_or_default(bundle)
    spec, signature = Manifest.read(bundle).spec, signature_state(bundle)
    sources = [parse_source(text, spec.points) for text in data or []]
    faces = faces_from_sources(sources, spec) if sources else bundled_faces(spec)
    result = verify_bundle(bundle, faces, files=file or (), bar=progress("comparing"))
    page = None if out is None else out / "verify.html"
    with shown_before_kept() as raise_lost:
        if as_json:
            print_json(verification_json(result) | {"page": page, "signature": signature})
        else:
            print_parity([f.parity for f in result.files if f.parity])
            for verdict in result.files:
                told_at_the_end = verdict.verdict == "failed" or verdict.required
                tell(f"{verdict.file}: {verdict.verdict if told_at_the_end else verdict.reason or verdict.verdict}")
            tell(f"signature: {signature}")
    if page is not None:
        verification_page(result, page)
    raise_lost()
    if page is not None and not as_json:
        tell(page)
    check_verification(result)


def plan(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle with ONNX files; " + ELSE_DEFAULT)] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8: the ONNX file that is built.")] = "fp16",
    min_batch: Annotated[int, typer.Option(help="Fewest faces a call.")] = 1,
    opt_batch: Annotated[
        int | None, typer.Option(help="The batch size that kernels are chosen for; 8, or the nearest that fits.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Most faces a call.")] = 32,
    workspace_mib: Annotated[int, typer.Option(help="Most scratch memory that a kernel may take.")] = 1024,
    version_compatible: Annotated[bool, typer.Option("--version-compatible", help="For later TensorRTs too.")] = False,
    hardware_compatible: Annotated[bool, typer.Option("--hardware-compatible", help="For other GPUs too.")] = False,
    dla_core: Annotated[int | None, typer.Option(help="Build for this DLA core; one batch size alone.")] = None,
    as_json: Json = False,
) -> None:
    """Build a TensorRT plan on the device that will run it.

    Example: kp plan out/resnet18-68 --precision fp16 --max-batch 8
    """
    from kp_export.plan_bundle import add_plan
    from kp_export.plan_options import PlanOptions
    from kp_runtime.manifest import Manifest

    bundle = folder_or_default(bundle)
    options = PlanOptions(
        min_batch=min_batch,
        opt_batch=min(max(8, min_batch), max_batch) if opt_batch is None else opt_batch,
        max_batch=max_batch,
        workspace_mib=workspace_mib,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        dla_core=dla_core,
    )
    with told_of_bundle(bundle), build_progress() as step:
        report = add_plan(bundle, precision, options, progress=step)
    alike = report.file.partition(".trt")[0] + ".trt"
    for name, entry in Manifest.read(bundle).files.items():
        if name.startswith(alike) and ".newer" not in name and entry.made.get("tensorrt") != report.tensorrt:
            note(f"{name} stays for boards of that TensorRT; where there is none, pack the bundle anew before kp plan")
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    tell(f"{bundle / report.file}: {report.gpu}, TensorRT {report.tensorrt}, {report.seconds:g} s")
    tell(report.receipt)
    if report.golden_error_px is not None:
        tell(f"opened: golden keypoints {report.golden_error_px:.3f} px from PyTorch's")


def pack(
    bundle: Annotated[Path, typer.Argument(help="A bundle with models.")],
    out: Annotated[Path, typer.Option(help="The bundle to write; may be the same folder.")],
    precision: Annotated[list[str], typer.Option(help="fp32, fp16, int8 or int8-trt. Repeatable.")],
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="Keep the checkpoint too.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a bundle with only the models that a device runs.

    Example: kp pack out/resnet18-68 --precision int8 --out board/resnet18-68
    """
    from kp_export.pack import pack_bundle

    weights = out / _CHECKPOINT
    had = weights.exists()
    with told_of_bundle(out, bundle):
        manifest = pack_bundle(bundle, out, precision, checkpoint=checkpoint)
    if had and not weights.exists():
        note(f"{out} has no longer its checkpoint; --checkpoint keeps it")
    size = sum(entry.bytes for entry in manifest.files.values())
    if as_json:
        print_json({"bundle": str(out), "files": list(manifest.files), "bytes": size})
        return
    tell(f"{out}: {', '.join(manifest.files)}, {size / 1e6:.1f} MB")


def inspect(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle's folder; " + ELSE_DEFAULT)] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="Say whether this PEM file's key signed it; exit status 1 if not.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a bundle: its files, their hashes, its signature.

    Exit status 1 where a hash does not hold, or --public-key is not the signer's.

    Example: kp inspect out/resnet18-68
    """
    from kp_runtime.errors import BundleError
    from kp_runtime.manifest import any_manifest
    from kp_runtime.signing import signature_state

    folder = folder_or_default(bundle)
    manifest = any_manifest(folder, public_key)
    signature = "of the key that was given" if public_key else signature_state(folder)
    states: dict[str, str] = {}
    for name in manifest.files:
        try:
            manifest.check_file(folder, name)
            states[name] = "ok"
        except BundleError as error:
            states[name] = str(error)
    if as_json:
        print_json({"manifest": dataclasses.asdict(manifest), "files": states, "signature": signature})
    else:
        print_bundle(folder, manifest, states)
        tell(f"signature: {signature}")
    if bad := [text for text in states.values() if text != "ok"]:
        raise BundleError("; ".join(bad))


def sign(
    bundle: Annotated[Path | None, typer.Argument(help="The bundle's folder.")] = None,
    key: Annotated[Path | None, typer.Option(help="Your private key, a PEM file.")] = None,
    new: Annotated[
        Path | None,
        typer.Option("--new-key", metavar="PATH", help="Make a key pair: PATH and, to give away, .pub.pem."),
    ] = None,
) -> None:
    """Sign a bundle, or make the keys for it.

    Devices can then refuse any other.

    Example: kp sign --new-key release.pem

    Example: kp sign out/resnet18-68 --key release.pem
    """
    from kp_export.sign import new_key, sign_bundle
    from kp_export.staging import alone

    if new is not None and bundle is None and key is None:
        tell(f"{new}: keep it to yourself", f"{new_key(new)}: give it to the devices")
    elif bundle is not None and key is not None and new is None:
        with alone(bundle):
            tell(sign_bundle(bundle, key))
    else:
        raise InputError("give a bundle and --key PRIVATE.pem, or --new-key PATH alone")
