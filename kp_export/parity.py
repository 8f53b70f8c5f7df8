"""Proof that a file predicts what PyTorch predicts: distances on real faces, and their limits.

Distances are between the same crops' keypoints, in pixels of the crop. "NME" here is the mean
distance over PyTorch's own outer eye corner distance, in percent: how far the file is from
PyTorch, not from the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kp_runtime.errors import MissingExtraError, ParityError
from kp_runtime.geometry import boxes_from_points, crop_from_luma, frame_box, matrices_from_boxes
from kp_runtime.scheme68 import EYE_CORNERS, REGIONS
from kp_runtime.spec import ModelSpec
from kp_train.data import Source, luma_from_file

__all__ = ["LIMITS", "FaceSet", "Limit", "Parity", "bundled_faces", "check_parity", "faces_from_sources", "parity"]

Predict = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Limit:
    """What a precision may differ by: worst point in pixels of a 224 px crop, mean NME in percent."""

    max_px: float
    nme: float


LIMITS = {
    # the same arithmetic in another order: a few float32 roundings of coordinates around 200
    "fp32": Limit(max_px=0.01, nme=0.001),
    # float16 has 11 bits; half a pixel at the very worst can't be seen on a face
    "fp16": Limit(max_px=0.5, nme=0.2),
}


@dataclass(frozen=True)
class FaceSet:
    """Crops to compare on: `(n, 1, size, size)` uint8, a name for each, and where they are from."""

    names: tuple[str, ...]
    crops: NDArray[np.uint8]
    origin: str


@dataclass(frozen=True)
class Parity:
    """How far one file is from PyTorch; distances in pixels of the crop, NME in percent.

    Attributes:
        file: the file's name.
        precision: of the file.
        faces: number of faces compared.
        origin: where the faces are from.
        mean_px, p99_px, max_px: over all points of all faces.
        nme: mean over faces, percent.
        regions_px: mean distance of jaw, brows, nose, eyes, mouth.
        worst_face: name of the face that holds the worst point.
    """

    file: str
    precision: str
    faces: int
    origin: str
    mean_px: float
    p99_px: float
    max_px: float
    nme: float
    regions_px: dict[str, float]
    worst_face: str


def bundled_faces(spec: ModelSpec) -> FaceSet:
    """The real faces that scikit-image carries: 100 small ones of LFW, and the astronaut's in 28 views.

    LFW's are 25 px wide, so they are enlarged; the astronaut's (NASA, public domain) are cut at
    many places and sizes. They serve to compare engines; for accuracy they are too few.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise MissingExtraError("scikit-image", "export", "the parity check without --data") from error
    import cv2

    small = (np.clip(data.lfw_subset()[:100], 0, 1) * 255).round().astype(np.uint8)
    portrait = cv2.cvtColor(data.astronaut(), cv2.COLOR_RGB2GRAY)
    names, crops = [], []
    for i, luma in enumerate(small):
        names.append(f"lfw_{i}")
        crops.append(_crop(luma, np.array([3.0, 5.0, 21.0, 23.0]), spec))
    face = np.array([179.0, 85.0, 266.0, 178.0])
    for i in range(28):
        angle, shift = np.radians(-21 + 1.5 * i), (0.08 * np.cos(i), 0.08 * np.sin(i))
        names.append(f"astronaut_{i}")
        crops.append(_crop(portrait, face, spec, angle=angle, shift=shift, zoom=0.85 + 0.012 * i))
    return FaceSet(tuple(names), np.stack(crops)[:, None], "scikit-image: 100 of LFW, 28 views of the astronaut")


def faces_from_sources(sources: Sequence[Source], spec: ModelSpec, most: int = 512) -> FaceSet:
    """Up to `most` faces of the user's own data, evenly spread, boxes from their keypoints."""
    faces = [face for source in sources for face in source.faces]
    chosen = [faces[int(i)] for i in np.linspace(0, len(faces) - 1, min(most, len(faces)))]
    crops = []
    for face in chosen:
        luma = luma_from_file(face.image)
        box = frame_box((luma.shape[0], luma.shape[1])) if spec.box == "frame" else boxes_from_points(face.xy)
        crops.append(_crop(luma, box, spec))
    origin = ", ".join(source.path.name for source in sources)
    return FaceSet(tuple(str(face.image) for face in chosen), np.stack(crops)[:, None], origin)


def _crop(luma: NDArray[np.uint8], box: NDArray[np.floating], spec: ModelSpec, **jitter: object) -> NDArray[np.uint8]:
    matrix = matrices_from_boxes(box[None], spec.size, spec.margin, **jitter)[0]  # type: ignore[arg-type]
    return crop_from_luma(luma, matrix, spec.size)


def parity(reference: Predict, candidate: Predict, faces: FaceSet, *, file: str, precision: str) -> Parity:
    """Compares two predictors of `(n, 68, 2)` on the same crops."""
    wanted, got = _in_batches(reference, faces.crops), _in_batches(candidate, faces.crops)
    distance = np.linalg.norm(got.astype(np.float64) - wanted, axis=-1)
    distance = np.where(np.isfinite(distance), distance, np.inf)
    eyes = np.linalg.norm(wanted[:, EYE_CORNERS[0]] - wanted[:, EYE_CORNERS[1]], axis=-1)
    return Parity(
        file=file,
        precision=precision,
        faces=len(distance),
        origin=faces.origin,
        mean_px=float(distance.mean()),
        p99_px=float(np.percentile(distance, 99, method="higher")),
        max_px=float(distance.max()),
        nme=float((distance.mean(axis=1) / eyes).mean() * 100),
        regions_px={name: float(distance[:, list(points)].mean()) for name, points in REGIONS.items()},
        worst_face=faces.names[int(distance.max(axis=1).argmax())],
    )


def _in_batches(predict: Predict, crops: NDArray[np.uint8], size: int = 32) -> NDArray[np.float32]:
    return np.concatenate([predict(crops[i : i + size]) for i in range(0, len(crops), size)])


def check_parity(report: Parity, size: int) -> None:
    """Holds a report against the limits of its precision, scaled to a crop of `size` pixels.

    Raises:
        ParityError: over a limit; names the worst face.
    """
    limit = LIMITS[report.precision]
    allowed = limit.max_px * size / 224
    if report.max_px <= allowed and report.nme <= limit.nme:
        return
    raise ParityError(
        f"{report.file} is too far from PyTorch: worst point {report.max_px:.4f} px (at most {allowed:.4g}), "
        f"mean {report.nme:.4f}% of the eye distance (at most {limit.nme:g}%); the worst face is {report.worst_face}; "
        "nothing was replaced"
    )
