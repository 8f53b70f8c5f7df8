"""`kp export`: fills a bundle in a folder beside it and puts it in place when all of it holds."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from kp_export.onnx_from_checkpoint import IR_VERSION, OPSET, onnx_from_checkpoint
from kp_export.parity import FaceSet, Parity, Predict, bundled_faces, check_parity, faces_from_sources, parity
from kp_runtime.backend import GOLDEN_NAME
from kp_runtime.backend_ort import OrtCpuBackend
from kp_runtime.errors import ExportError
from kp_runtime.geometry import boxes_from_points, crop_from_luma, matrices_from_boxes
from kp_runtime.spec import FileEntry, Manifest, ModelSpec, file_entry, writing
from kp_train.checkpoint import CHECKPOINT_NAME, load_checkpoint
from kp_train.data import Source
from kp_train.model import KeypointNet
from kp_train.synthetic import drawn_face

__all__ = ["ExportReport", "export_bundle", "predict_from_net"]

PARITY_NAME = "parity.json"


@dataclass(frozen=True)
class ExportReport:
    """What an export made: the bundle's folder, its manifest, and each file's parity."""

    bundle: Path
    manifest: Manifest
    parity: tuple[Parity, ...]


def export_bundle(
    checkpoint: Path,
    out: Path | None = None,
    *,
    precisions: Sequence[str] = ("fp32",),
    sources: Sequence[Source] = (),
    step: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Exports a checkpoint to ONNX and proves that each file predicts what PyTorch does.

    All files are made in a folder beside the bundle. Only when every one is within its limits
    does that folder take the bundle's place; on an error, a full disk or Ctrl-C the old bundle
    stays as it was. Files of the old bundle that this export does not make are kept.

    Args:
        checkpoint: a bundle's folder or its `checkpoint.safetensors`.
        out: the bundle to fill; the checkpoint's own when None.
        precisions: `fp32`, `fp16`.
        sources: the user's labelled faces for the parity check; scikit-image's when empty.
        step: told what is being done.

    Raises:
        BundleError: the checkpoint can't be read.
        ExportError: another export is at work in `out`, or the graph can't be made.
        ParityError: a file is too far from PyTorch.
    """
    net, manifest = load_checkpoint(checkpoint)
    own = checkpoint if checkpoint.is_dir() else checkpoint.parent
    target = (out or own).resolve()
    with _staging(target) as stage:
        if target != own.resolve():
            shutil.copyfile(own / CHECKPOINT_NAME, stage / CHECKPOINT_NAME)
        faces = faces_from_sources(sources, manifest.spec) if sources else bundled_faces(manifest.spec)
        kept = Manifest.read(stage).files if target.exists() and (stage / "manifest.json").exists() else {}
        files = {CHECKPOINT_NAME: manifest.files[CHECKPOINT_NAME]}
        reports = []
        for precision in precisions:
            step(f"ONNX {precision}")
            name, entry = _export_onnx(net, manifest, stage, precision)
            files[name] = entry
            step(f"parity {precision}, {len(faces.names)} faces")
            report = _file_parity(net, manifest.spec, stage / name, faces, precision)
            check_parity(report, manifest.spec.size)
            reports.append(report)
        files[GOLDEN_NAME] = _write_golden(net, manifest, stage)
        files[PARITY_NAME] = _write_parity(stage, reports)
        files |= {name: entry for name, entry in kept.items() if name not in files and _fits(entry, manifest)}
        manifest = dataclasses.replace(manifest, files=files)
        manifest.write(stage)
        _check_all(manifest, stage)
    return ExportReport(target, manifest, tuple(reports))


def predict_from_net(net: KeypointNet) -> Predict:
    """PyTorch as a predictor of numpy crops."""

    def predict(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            keypoints: NDArray[np.float32] = net(torch.from_numpy(crops)).numpy()
        return keypoints

    return predict


def _export_onnx(net: KeypointNet, manifest: Manifest, stage: Path, precision: str) -> tuple[str, FileEntry]:
    name = f"model.{precision}.onnx"
    checkpoint = manifest.files[CHECKPOINT_NAME].sha256
    onnx_from_checkpoint(net, manifest.spec, stage / name, precision=precision, checkpoint_sha256=checkpoint)
    made = {
        "by": "onnx_from_checkpoint",
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
    }
    return name, file_entry(stage / name, "onnx", precision=precision, parent_sha256=checkpoint, made=made)


def _file_parity(net: KeypointNet, spec: ModelSpec, path: Path, faces: FaceSet, precision: str) -> Parity:
    backend = OrtCpuBackend(path, spec)
    return parity(predict_from_net(net), backend.infer, faces, file=path.name, precision=precision)


def _write_golden(net: KeypointNet, manifest: Manifest, stage: Path) -> FileEntry:
    """A drawn face and PyTorch's keypoints of it, which every backend has to repeat."""
    image, xy = drawn_face(np.random.default_rng(68), (300, 300))
    spec = manifest.spec
    matrix = matrices_from_boxes(boxes_from_points(xy)[None], spec.size, spec.margin)[0]
    crops = crop_from_luma(np.ascontiguousarray(image[:, :, 0]), matrix, spec.size)[None, None]
    with writing(stage / GOLDEN_NAME) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, crops=crops, keypoints=predict_from_net(net)(crops))
    return file_entry(stage / GOLDEN_NAME, "golden", parent_sha256=manifest.files[CHECKPOINT_NAME].sha256)


def _write_parity(stage: Path, reports: Sequence[Parity]) -> FileEntry:
    with writing(stage / PARITY_NAME) as temporary:
        temporary.write_text(json.dumps([dataclasses.asdict(r) for r in reports], indent=2) + "\n", encoding="utf-8")
    return file_entry(stage / PARITY_NAME, "report")


def _fits(entry: FileEntry, manifest: Manifest) -> bool:
    """Whether a file of the old bundle was made from the same checkpoint."""
    return entry.parent_sha256 == manifest.files[CHECKPOINT_NAME].sha256


def _check_all(manifest: Manifest, stage: Path) -> None:
    for name in manifest.files:
        manifest.check_file(stage, name)


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder beside `target`, filled with links to its files, that takes its place at the end."""
    stage = target.with_name(f".{target.name}.new")
    old = target.with_name(f".{target.name}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{target.name}.lock"), target):
            if old.exists() and not target.exists():
                os.replace(old, target)  # an export that was killed between its two last moves
            for stale in (stage, old):
                shutil.rmtree(stale, ignore_errors=True)
            if target.exists():
                shutil.copytree(target, stage, copy_function=_link_or_copy)
            else:
                stage.mkdir()
            try:
                yield stage
                _swap(stage, target, old)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise ExportError(
            f"can't write the bundle {target}: {error.strerror or error}; what was there before is unchanged"
        ) from error


def _swap(stage: Path, target: Path, old: Path) -> None:
    """Puts `stage` where `target` is; on an error `target` is back in its place."""
    if not target.exists():
        os.replace(stage, target)
        return
    os.replace(target, old)
    try:
        os.replace(stage, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    """Files are replaced, never changed in place, so a link to the old one is as good as a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextlib.contextmanager
def _locked(path: Path, target: Path) -> Iterator[None]:
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ExportError(f"another export is at work on {target}; wait for it to end") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
