"""`kp export`: fills a bundle in a folder beside it and puts it in place when all of it holds."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from kp_export.half_on_cpu import half_on_cpu
from kp_export.int8_from_onnx import LEAST_FACES, calibration_stride, check_calibration, search_int8
from kp_export.onnx_from_checkpoint import IR_VERSION, OPSET, check_fits_half, layer_types, onnx_from_checkpoint
from kp_export.operators import check_operators
from kp_export.parity import (
    Ask,
    FaceSet,
    Parity,
    answers_to,
    bundled_faces,
    check_parity,
    faces_from_sources,
    parity,
)
from kp_export.staging import check_replaced, mend, staging
from kp_runtime import __version__
from kp_runtime.backend import Answer
from kp_runtime.backend_by_name import golden_distance
from kp_runtime.backend_ort import OrtCpuBackend
from kp_runtime.errors import BackendError, DataError, ExportError, IntegrityError, ParityError
from kp_runtime.files import write_file, writing
from kp_runtime.frame import Frame
from kp_runtime.geometry import matrices_from_boxes
from kp_runtime.golden import GOLDEN_NAME, Golden, golden_from_bytes
from kp_runtime.manifest import MANIFEST_NAME, PRECISIONS, FileEntry, Manifest, file_entry
from kp_runtime.pipeline import load
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.recorded_rise import PARITY_NAME, parity_rows
from kp_runtime.spec import ModelSpec
from kp_train.checkpoint import CHECKPOINT_NAME, load_checkpoint
from kp_train.data import Source, is_held_out
from kp_train.model import KeypointNet
from kp_train.run_record import sha256_of_names
from kp_train.synthetic import golden_face

__all__ = ["ExportReport", "answer_from_net", "export_bundle"]

CALIBRATION_FACES = 256
_MODEL_NAME = re.compile(rf"model\.({'|'.join(PRECISIONS)})(\.sm\d+\.trt.+)?\.(onnx|plan)")


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
    calibration: Sequence[Source] = (),
    step: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Exports a checkpoint to ONNX and proves that each file predicts what PyTorch does.

    All files are made in a folder beside the bundle. Only when every one is within its limits
    does that folder take the bundle's place; on an error, a full disk or Ctrl-C the old bundle
    stays as it was. Files of the old bundle, and of the checkpoint's own, that this export does not
    make are kept where they come from the same weights.

    Args:
        checkpoint: a bundle's folder or its `checkpoint.safetensors`.
        out: the bundle to fill; the checkpoint's own when None.
        precisions: of `fp32`, `fp16`, `int8`, `int8-trt`; `fp32` is always made.
        sources: the user's labelled faces for the parity check; scikit-image's when empty.
        calibration: labelled faces for the ranges of int8. Without `sources`, those of about
            half of the people are kept out of it and measure the accuracy. With them, the manifest says how many
            faces do both.
        step: told what is being done.

    Raises:
        BundleError: the checkpoint can't be read.
        DataError: the calibration faces are too few, or no faces; or those that measure int8 are too few.
        IntegrityError: a file that is kept, or the report of it, is not the manifest's.
        ExportError: another export is at work in `out`, or a checkpoint lies there that may be the only copy; a graph
            can't be made, or there is no such precision.
        ParityError: a file is too far from PyTorch.
    """
    if unknown := [precision for precision in precisions if precision not in PRECISIONS]:
        raise ExportError(f"there is no precision {unknown[0]!r}; choose from {', '.join(PRECISIONS)}")
    own = checkpoint.parent if checkpoint.name == CHECKPOINT_NAME else checkpoint
    mend(own)
    net, manifest = load_checkpoint(checkpoint)
    if {"int8", "int8-trt"} & set(precisions) and not calibration:
        raise ExportError("int8 needs real faces to find its ranges: give --calibration with labelled photos")
    target = (out or own).resolve()
    with staging(target) as stage:
        check_replaced(target, manifest)
        there = Manifest.read(target) if (target / MANIFEST_NAME).exists() else None  # errors name it, not the stage
        old = {} if there is None else there.files
        if target != own.resolve():
            for name in manifest.files:
                with writing(stage / name) as temporary:
                    shutil.copyfile(manifest.check_file(own, name), temporary)
            old = old | manifest.files
        faces, calibrating = _face_sets(manifest.spec, sources, calibration)
        if calibrating is not None:
            check_calibration(calibrating, answer_from_net(net))
            if len(faces.names) < LEAST_FACES:
                raise DataError(
                    f"int8 is judged on {LEAST_FACES} or more faces, {faces.origin} gives {len(faces.names)}; give "
                    "more with --data (without it, half of the people of --calibration measure the result)"
                )
        wanted = answers_to(answer_from_net(net), faces.shown)
        golden_entry = _write_golden(net, manifest, stage)
        golden = golden_from_bytes((stage / GOLDEN_NAME).read_bytes(), manifest.spec)
        export = _Export(net, manifest, stage, faces, calibrating, step, wanted, golden)
        try:
            for precision in ("fp32", *(p for p in precisions if p != "fp32")):
                export.add(precision)
        except ParityError as error:
            raise ParityError(f"{error}; nothing was replaced; what to do: docs/parity.md") from error
        files = {CHECKPOINT_NAME: manifest.files[CHECKPOINT_NAME], **export.files, GOLDEN_NAME: golden_entry}
        files = _with_kept(files, old)
        known: dict[str, dict[str, Any]] = {}
        if any(entry.kind == "onnx" and name not in export.files for name, entry in files.items()):
            before = {} if there is None else _known_of(target, there)
            known = {name: row for name, row in before.items() if name not in manifest.files}
            known |= _known_of(own, manifest)
        known |= {report.file: _without_names(report) for report in export.reports}
        files[PARITY_NAME] = _write_parity(stage, [row for name, row in known.items() if name in files])
        for path in stage.iterdir():  # of other weights
            if path.name not in files and (path.name in old or _MODEL_NAME.fullmatch(path.name)):
                path.unlink()
        is_same = there is not None and there.files.get(CHECKPOINT_NAME) == manifest.files[CHECKPOINT_NAME]
        accuracy = manifest.accuracy | (there.accuracy if there is not None and is_same else {})
        manifest = dataclasses.replace(manifest, accuracy=accuracy).with_files(files)
        manifest.write(stage)
        for name in manifest.files:
            manifest.check_file(stage, name)
        for name, entry in files.items():
            if entry.kind == "onnx":
                _check_opens(
                    stage / name,
                    "is within its limits" if name in export.files else "would be kept, as its switch was not given",
                )
    return ExportReport(target, manifest, tuple(export.reports))


@dataclass
class _Export:
    """An export at work: the files made so far and their parity."""

    net: KeypointNet
    manifest: Manifest
    stage: Path
    faces: FaceSet
    calibration: FaceSet | None
    step: Callable[[str], None]
    wanted: Answer
    golden: Golden
    files: dict[str, FileEntry] = field(default_factory=dict)
    reports: list[Parity] = field(default_factory=list)

    def add(self, precision: str) -> None:
        """Makes one file, checks its operators and its parity, and notes it."""
        path = self.stage / f"model.{precision}.onnx"
        parent = self.manifest.files[CHECKPOINT_NAME].sha256
        if precision.startswith("int8"):
            made = self._int8(path, precision)
        else:
            if precision == "fp16":
                check_fits_half(self.net, self.faces.crops)
            self.step(f"ONNX {precision}")
            onnx_from_checkpoint(self.net, self.manifest.spec, path, precision=precision, checkpoint_sha256=parent)
            self.step(f"parity {precision}, {len(self.faces.names)} faces")
            self.reports.append(self._checked(path, precision))
            made = {"by": "onnx_from_checkpoint", "opset": OPSET, "ir_version": IR_VERSION, "torch": torch.__version__}
        if precision != "int8":  # that one is for ONNX Runtime alone
            check_operators(path)
        made |= {"kp": __version__, "onnx": onnx.__version__, "layers": layer_types(path)}
        self.files[path.name] = file_entry(path, "onnx", precision=precision, parent_sha256=parent, made=made)

    def _int8(self, path: Path, precision: str) -> dict[str, Any]:
        assert self.calibration is not None  # asked for at the start of the export
        report = search_int8(
            self.stage / "model.fp32.onnx",
            path,
            precision=precision,
            calibration=self.calibration,
            check=lambda file: self._checked(file, precision),
            step=self.step,
        )
        self.reports.append(report.parity)
        stride = calibration_stride(report.choice, self.calibration.crops)
        names = self.calibration.names[::stride]  # may be people's, and a bundle goes to devices
        measured = {crop.tobytes() for crop in self.faces.crops}
        return {
            "by": "int8_from_onnx",
            "onnxruntime": onnxruntime.__version__,
            "choice": dataclasses.asdict(report.choice),
            "rejected": list(report.rejected),
            "calibration": {
                "origin": self.calibration.origin,
                "images": len(names),
                "images_sha256": sha256_of_names(names),
                "also_measured": sum(crop.tobytes() in measured for crop in self.calibration.crops[::stride]),
            },
        }

    def _checked(self, path: Path, precision: str) -> Parity:
        """A file's parity, within its limits; a ParityError where it is not, or strays too far on the golden crop."""
        read = (lambda: half_on_cpu(path)) if precision == "fp16" else None
        engine = OrtCpuBackend(path, self.manifest.spec, read=read)
        got = answers_to(engine.answer, self.faces.shown)
        report = parity(self.wanted, got, self.faces, file=path.name, precision=precision)
        check_parity(report, self.manifest.spec.size)
        _, fault = golden_distance(engine, self.golden, precision)
        if fault is not None:
            raise ParityError(f"{path.name} is within its limits on faces, but {fault}")
        return report


def _face_sets(
    spec: ModelSpec, sources: Sequence[Source], calibration: Sequence[Source]
) -> tuple[FaceSet, FaceSet | None]:
    """The faces that parity is measured on, and those that int8 is calibrated on."""
    if not calibration:
        return (faces_from_sources(sources, spec) if sources else bundled_faces(spec)), None
    if sources:
        return faces_from_sources(sources, spec), faces_from_sources(calibration, spec, CALIBRATION_FACES)
    halves: list[list[Source]] = []
    for half in (True, False):
        kept = [(s, tuple(f for f in s.faces if is_held_out(f.person, 0.5) is half)) for s in calibration]
        halves.append([dataclasses.replace(source, faces=faces) for source, faces in kept if faces])
    if not all(halves):
        raise DataError("int8 needs faces of more people: some to calibrate on, others to measure; or give --data too")
    return faces_from_sources(halves[0], spec), faces_from_sources(halves[1], spec, CALIBRATION_FACES)


def _with_kept(files: dict[str, FileEntry], old: dict[str, FileEntry]) -> dict[str, FileEntry]:
    """The new files, and the old bundle's that were made from one of them or of each other."""
    for name, entry in old.items():
        if name not in files and entry.parent_sha256 in {known.sha256 for known in files.values()}:
            files = files | {name: entry}
    return files


def answer_from_net(net: KeypointNet) -> Ask:
    """PyTorch as an engine for numpy crops."""

    def answer(crops: NDArray[np.uint8]) -> Answer:
        with torch.inference_mode():
            return Answer.of([output.numpy() for output in net.outputs(torch.from_numpy(crops))])

    return answer


def _check_opens(path: Path, what: str) -> None:
    """Opens a file as a user's program will, which compares the golden crop: a new one for a file that is kept, too."""
    try:
        load(path, "ort-cpu", threads=1).close()
    except BackendError as error:
        raise ParityError(f"{path.name} {what}, and yet could not be opened: {error}; nothing was replaced") from error


def _write_golden(net: KeypointNet, manifest: Manifest, stage: Path) -> FileEntry:
    """A drawn face with its box, its crop, and PyTorch's keypoints of that, which every backend has to repeat."""
    spec = manifest.spec
    image, box = golden_face(spec.size, spec.margin)
    crops = crops_from_frame(Frame(image, "bgr"), matrices_from_boxes(box[None], spec.size, spec.margin), spec.size)
    with writing(stage / GOLDEN_NAME) as temporary, open(temporary, "wb") as file:
        outputs = dict(zip(spec.outputs, answer_from_net(net)(crops).outputs(), strict=True))
        np.savez_compressed(file, crops=crops, **outputs, image=image, box_xyxy=box)  # type: ignore[arg-type]
    return file_entry(stage / GOLDEN_NAME, "golden", parent_sha256=manifest.files[CHECKPOINT_NAME].sha256)


def _known_of(bundle: Path, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """What a bundle's report says of its files, by their names."""
    try:
        rows = parity_rows(bundle, manifest)
    except IntegrityError as error:
        raise IntegrityError(
            f"{error}; it is read for the files that this export keeps: give their switches too, and it is made anew"
        ) from error
    return {row["file"]: row for row in rows if row.get("file") in list(manifest.files)}


def _without_names(report: Parity) -> dict[str, Any]:
    """A file's parity as it stands in a bundle, which goes to devices: a photo's name may be a person's."""
    return {key: value for key, value in dataclasses.asdict(report).items() if key != "worst_face"}


def _write_parity(stage: Path, rows: Sequence[dict[str, Any]]) -> FileEntry:
    """Writes all files' parity: the new ones', and what was known of those that were kept."""
    write_file(stage / PARITY_NAME, json.dumps(rows, indent=2) + "\n")
    return file_entry(stage / PARITY_NAME, "report")
