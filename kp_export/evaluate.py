"""`kp eval`: a model's accuracy on labelled faces, whatever engine its file needs; torch for a checkpoint alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kp_export.parity import Ask
from kp_runtime.backend import Backend
from kp_runtime.backend_by_name import open_backend
from kp_runtime.cores import checked_threads
from kp_runtime.detect import Detector
from kp_runtime.errors import BackendError, BundleError, DataError, InputError, missing_or_broken
from kp_runtime.frame import Frame
from kp_runtime.geometry import (
    apply_matrix,
    box_of_face,
    boxes_from_points,
    frame_box,
    invert_matrix,
    matrices_from_boxes,
    mirrored_matrices,
)
from kp_runtime.manifest import Manifest
from kp_runtime.pipeline import boxes_of_next_look
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.recorded_rise import Rise
from kp_runtime.scheme68 import mean_of_mirrored
from kp_train.bar import Bar, no_bar
from kp_train.data import Face, Source, evenly_spread, faces_with_frames, held_out_of
from kp_train.metrics import Accuracy, accuracy, interval_over_people, point_errors
from kp_train.run_record import ancestry, learned_whole, least_held_out, recorded_sources

__all__ = [
    "Evaluation",
    "OpenModel",
    "answer_in_frames",
    "evaluate",
    "held_out_faces",
    "measured_rise",
    "open_model",
    "trained_on",
]

BATCH = 32
MOST = 512
"""Most faces that `measured_rise` looks at."""


@dataclass(frozen=True)
class OpenModel:
    """A model ready to predict: what was opened, its manifest, and what answers to crops."""

    name: str
    manifest: Manifest
    answer: Ask


@dataclass(frozen=True)
class Evaluation:
    """Predictions on labelled faces and their accuracy.

    Attributes:
        faces: the faces that were measured.
        predicted: `(n, points, 2)` float64, pixels of each image.
        boxes_xyxy: `(n, 4)`, the boxes that the crops were cut from.
        errors: `(n,)`, NME of each face as a fraction.
        missed: faces that the detector did not find; they are not in `faces`, and in the accuracy they count
            as failures alone.
        accuracy: over `faces`, its AUC and failures over the missed ones, too.
        interval: the 95% interval of the NME, a fraction, had other people been drawn; None of fewer than
            eight people's faces.
        given_up: share of `faces` whose lost score is over the model's limit; None of a model that gives none.
    """

    faces: tuple[Face, ...]
    predicted: NDArray[np.float64]
    boxes_xyxy: NDArray[np.float64]
    errors: NDArray[np.float64]
    missed: int
    accuracy: Accuracy
    interval: tuple[float, float] | None
    given_up: float | None


def open_model(path: Path, threads: int | None = None) -> OpenModel:
    """Opens a checkpoint (PyTorch), a bundle's folder (its checkpoint), or a bundle's ONNX file or plan.

    Args:
        path: of one of these.
        threads: of the engine; all cores when None. PyTorch keeps them for all of the process.

    Raises:
        BundleError, BackendError: as the opening of each says.
        MissingExtraError: the engine's package is not installed; of a checkpoint it is PyTorch.
    """
    if path.is_dir() or path.suffix == ".safetensors":
        return _open_checkpoint(path, threads)
    backend = open_backend(path, threads=threads)
    manifest = Manifest.read(path.parent)
    return OpenModel(f"{manifest.spec.name} {path.name} ({backend.name})", manifest, backend.answer)


def _open_checkpoint(path: Path, threads: int | None) -> OpenModel:
    try:
        import torch

        from kp_export.bundle import answer_from_net
        from kp_train.checkpoint import CHECKPOINT_NAME, load_checkpoint
    except ImportError as error:
        bundle = path if path.is_dir() else path.parent
        Manifest.read(bundle).entry(bundle, "checkpoint.safetensors")  # torch does not help where there is none
        package = (error.name or "torch").partition(".")[0]
        purpose = "measuring a checkpoint, not an ONNX file or a plan,"
        raise missing_or_broken(error, package, package, "export", purpose) from error
    if threads is not None:
        torch.set_num_threads(checked_threads(threads))
    net, manifest = load_checkpoint(path)
    return OpenModel(f"{manifest.spec.name} {CHECKPOINT_NAME} (PyTorch)", manifest, answer_from_net(net))


def held_out_faces(sources: Sequence[Source], manifest: Manifest) -> list[Face]:
    """The faces of people on whom neither the model nor what it learned from was trained, by the rule in its manifest.

    Raises:
        DataError: the manifest does not say, or no such face is in any of the sources.
    """
    fraction = least_held_out(ancestry(manifest.training))
    if not fraction:
        raise DataError(
            f"the manifest of {manifest.spec.name} does not say which people were held out, of it and of all that it "
            "learned from; take a model of kp train, or leave out --split person"
        )
    faces = held_out_of(learned_whole(sources, ancestry(manifest.training)), fraction)
    if not faces:
        paths = ", ".join(str(source.path) for source in sources)
        raise DataError(f"there is no face of a person that was held out of training in {paths}")
    return faces


def trained_on(sources: Sequence[Source], manifest: Manifest) -> int:
    """How many of the sources' faces the model or what it learned from was trained on, as far as its manifest tells."""
    count = 0
    for source in sources:
        told = [
            record
            for record in ancestry(manifest.training)
            if any(each.get("sha256") == source.sha256 for each in recorded_sources(record))
        ]
        if told:
            count += len(source.faces) - len(held_out_of(learned_whole([source], told), least_held_out(told)))
    return count


def evaluate(
    model: OpenModel,
    faces: Sequence[Face],
    detector: Detector | None = None,
    bar: Bar = no_bar,
    looks: int = 1,
    mirror: bool = False,
) -> Evaluation:
    """Measures a model on labelled faces.

    Args:
        model: from `open_model`.
        faces: labelled faces.
        detector: gives the boxes; the keypoints' own boxes when None. Of several boxes in a photo
            the one with the largest overlap counts.
        bar: wraps the list of batches, to show progress.
        looks: as a call of `kp_runtime.Model` takes them.
        mirror: likewise.

    Raises:
        DataError: an image can't be read, or the detector found none of the faces.
        InputError: `looks` or `mirror` is not possible with this model.
        BackendError: points that are not finite: no measure of these means anything.
    """
    spec = model.manifest.spec
    kept: list[Face] = []
    predicted: list[NDArray[np.float64]] = []
    scores: list[NDArray[np.float32]] = []
    boxes: list[NDArray[np.float64]] = []
    sizes: list[tuple[int, int]] = []
    boxes_in = None if detector is None else functools.lru_cache(maxsize=1)(detector)  # once for the faces of a photo
    batches = [faces[i : i + BATCH] for i in range(0, len(faces), BATCH)]
    for batch in bar(batches):
        frames, found = [], []
        for face, frame in faces_with_frames(batch):
            box = frame_box(frame.size_hw) if spec.box == "frame" else _box(face, frame, boxes_in)
            if box is None:
                continue
            frames.append(frame)
            found.append(box)
            kept.append(face)
        if frames:
            points, lost_score = answer_in_frames(model, frames, np.stack(found), looks, mirror)
            predicted.append(points)
            scores += [] if lost_score is None else [lost_score]
            boxes += found
            sizes += [frame.size_hw for frame in frames]
    if not kept:
        raise DataError(f"the detector found none of the {len(faces)} faces; try --boxes keypoints")
    points, truth = np.concatenate(predicted), np.stack([face.xy for face in kept])
    if broken := int((~np.isfinite(points)).any(axis=(1, 2)).sum()):
        raise BackendError(f"{model.name} answers points that are not finite on {broken} of {len(kept)} faces")
    errors, missed = point_errors(points, truth).mean(axis=1), len(faces) - len(kept)
    return Evaluation(
        faces=tuple(kept),
        predicted=points,
        boxes_xyxy=np.stack(boxes),
        errors=errors,
        missed=missed,
        accuracy=accuracy(points, truth, np.array(sizes), missed),
        interval=interval_over_people(errors, [face.person for face in kept]),
        given_up=float((np.concatenate(scores) > spec.lost_limit).mean()) if scores and spec.lost_limit else None,
    )


def measured_rise(first: Path, sources: Sequence[Source]) -> Callable[[Path, Backend], Rise]:
    """What files cost in accuracy, measured: the rise of their NME over that of a first bundle's fp32.

    Args:
        first: the bundle whose fp32 is compared with: its ONNX file, else its checkpoint.
        sources: labelled faces, of which up to `MOST` are taken, evenly spread; boxes from their keypoints.

    Returns:
        A function of a bundle's folder and a backend with one of its files.

    Raises:
        BundleError, BackendError: there is no fp32 to compare with.
        DataError: an image can't be read.
    """
    faces = [face for source in sources for face in source.faces]
    faces = [faces[i] for i in evenly_spread(len(faces), MOST)]
    manifest = Manifest.read(first)
    fp32 = [name for name, entry in manifest.files.items() if (entry.kind, entry.precision) == ("onnx", "fp32")]
    if not fp32 and all(entry.kind != "checkpoint" for entry in manifest.files.values()):
        raise BundleError(
            f"{first} has neither an fp32 ONNX file nor a checkpoint to compare with; pack it with --precision fp32 too"
        )
    opened_first = open_model(first / fp32[0] if fp32 else first)

    @functools.cache
    def reference() -> float:  # when it is asked for: by then the rest was found in order
        return evaluate(opened_first, faces).accuracy.nme

    def rise(bundle: Path, backend: Backend) -> Rise:
        opened = OpenModel(backend.report.file, Manifest.read(bundle), backend.answer)
        before = reference()
        nme = evaluate(opened, faces).accuracy.nme
        return Rise((nme - before) * 100, f"measured on {len(faces)} labelled faces")

    return rise


def answer_in_frames(
    model: OpenModel, frames: Sequence[Frame], boxes_xyxy: NDArray[np.float64], looks: int = 1, mirror: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float32] | None]:
    """Keypoints of a face on each frame, and whether it is lost.

    Args:
        model: from `open_model`.
        frames: `n` images.
        boxes_xyxy: `(n, 4)`, pixels of each frame.
        looks: how often the network sees each face; from the second time on, the box is the one around
            the points that it found before, where they have one.
        mirror: each look is at the crop and at its mirror image, and the mean counts.

    Returns:
        `(n, 68, 2)` float64, pixels of each frame; and the last look's lost scores `(n,)`, of a model that gives them.

    Raises:
        InputError: `looks` is under 1, or over 1 for a model whose crop is not cut around the face.
    """
    spec = model.manifest.spec
    if looks < 1 or (looks > 1 and spec.box != "keypoints"):
        raise InputError(f"looks must be 1{' or more' if spec.box == 'keypoints' else ' for this model'}, got {looks}")
    points, lost_score = np.empty((0, spec.points, 2)), None
    for _ in range(looks):
        matrices = matrices_from_boxes(boxes_xyxy, spec.size, spec.margin)
        if mirror:
            matrices = np.concatenate([matrices, mirrored_matrices(matrices, spec.size)])
        crops = np.concatenate(
            [
                crops_from_frame(frame, m[None], spec.size)
                for frame, m in zip([*frames, *frames], matrices, strict=False)
            ]
        )
        answer = model.answer(crops)
        points, lost_score = apply_matrix(invert_matrix(matrices), answer.keypoints), answer.lost_score
        if mirror:
            points = mean_of_mirrored(points)
            lost_score = None if lost_score is None else lost_score.reshape(2, -1).mean(axis=0)
        boxes_xyxy = boxes_of_next_look(points, boxes_xyxy, [frame.size_hw for frame in frames])
    return points, lost_score


def _box(
    face: Face, frame: Frame, boxes_in: Callable[[Frame], NDArray[np.float64]] | None
) -> NDArray[np.float64] | None:
    return boxes_from_points(face.xy) if boxes_in is None else box_of_face(boxes_in(frame), face.xy)
