"""Proof that a file predicts what PyTorch predicts: distances on real faces, and their limits.

Distances are between the same crops' keypoints, in pixels of the crop. "NME" here is the mean
distance over PyTorch's own outer eye corner distance, in percent, or over what `nme_unit` counts other points in:
how far the file is from PyTorch, not from the truth.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kp_runtime.backend import Answer
from kp_runtime.errors import MissingExtraError, ParityError
from kp_runtime.geometry import apply_matrix, boxes_from_points, crop_from_luma, frame_box, matrices_from_boxes
from kp_runtime.labelled_face import as_text
from kp_runtime.scheme68 import regions_of
from kp_runtime.spec import ModelSpec
from kp_train.bar import Bar, no_bar
from kp_train.data import Source, evenly_spread, faces_with_frames
from kp_train.metrics import nme_unit, point_errors

__all__ = [
    "LIMITS",
    "FaceSet",
    "Limit",
    "Parity",
    "answers_to",
    "bundled_faces",
    "check_parity",
    "faces_from_sources",
    "parity",
]

Ask = Callable[[NDArray[np.uint8]], Answer]
BATCH = 32


@dataclass(frozen=True)
class Limit:
    """What a precision may cost; distances in pixels of a 224 px crop.

    Attributes:
        rise: percentage points by which the NME against true labels may rise over PyTorch's; that of a region
            by twice as much.
        max_px: the worst point's distance to PyTorch's.
        p99_px: the 99th percentile of the distance to PyTorch's.
        score: the largest distance of a lost score to PyTorch's, on faces and where one takes for a face what the other
            does not; what is no face has about 1.
    """

    rise: float
    max_px: float = math.inf
    p99_px: float = math.inf
    score: float = math.inf


LIMITS = {
    # the same arithmetic in another order: a few float32 roundings of coordinates around 200
    "fp32": Limit(rise=0.001, max_px=0.01, score=0.001),
    # float16 has 11 bits; half a pixel at the very worst can't be seen on a face
    "fp16": Limit(rise=0.02, max_px=0.5, score=0.01),
    # 8 bits are seen on single points, so the bounds are on the bulk of them and on the accuracy
    "int8": Limit(rise=0.05, p99_px=1.2, score=0.1),
    "int8-trt": Limit(rise=0.10, p99_px=1.2, score=0.1),
}


@dataclass(frozen=True)
class FaceSet:
    """Crops to compare on.

    Attributes:
        names: a name for each.
        crops: `(n, 1, size, size)` uint8.
        origin: where they are from.
        xy_crop: `(n, 68, 2)` float64, the true points in pixels of the crop, where there are labels.
        tiny: the first so many are faces of few pixels, much enlarged. The limits of int8 are for photos, and such
            a file is not judged by these.
        beside: `(m, 1, size, size)` uint8, places beside the faces, where lost scores alone are compared; None for a
            model that gives none.
        lost_limit: of the model; beside a face a score counts where the file is on the other side of it than PyTorch.
    """

    names: tuple[str, ...]
    crops: NDArray[np.uint8]
    origin: str
    xy_crop: NDArray[np.float64] | None = None
    tiny: int = 0
    beside: NDArray[np.uint8] | None = None
    lost_limit: float | None = None

    @property
    def shown(self) -> NDArray[np.uint8]:
        """What both networks are asked: the faces, then the places beside them."""
        return self.crops if self.beside is None else np.concatenate([self.crops, self.beside])


@dataclass(frozen=True)
class Parity:
    """How far one file is from PyTorch; distances in pixels of the crop.

    Attributes:
        file: the file's name.
        precision: of the file; which of `LIMITS` holds for it.
        faces: number of faces compared.
        origin: where the faces are from.
        mean_px, p50_px, p99_px, max_px: over all points of all faces.
        nme: the same distances in percent of the distance of PyTorch's outer eye corners, mean over faces; see above.
        rise: percentage points by which the NME against the labels is over PyTorch's; None
            without labels.
        regions_px: mean distance of jaw, brows, nose, eyes, mouth.
        worst_face: name of the face that holds the worst point.
        score: largest distance of a lost score, on the faces, and beside them where the file decides otherwise; None of
            a model that gives none.
        regions_rise: as `rise`, of jaw, brows, nose, eyes, mouth; None without labels.
    """

    file: str
    precision: str
    faces: int
    origin: str
    mean_px: float
    p50_px: float
    p99_px: float
    max_px: float
    nme: float
    rise: float | None
    regions_px: dict[str, float]
    worst_face: str
    score: float | None = None
    regions_rise: dict[str, float] | None = None


def bundled_faces(spec: ModelSpec) -> FaceSet:
    """The real faces that scikit-image carries: 100 small ones of LFW, and the astronaut's in 28 views.

    LFW's are 25 px wide, so they are enlarged; the astronaut's (NASA, public domain) are cut at
    many places and sizes. They serve to compare engines; for accuracy they are too few. int8 is judged
    by the astronaut's alone: on LFW's it strays twice as far (docs/parity.md).

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
    names, crops, beside = [], [], []
    for i, luma in enumerate(small):
        names.append(f"lfw_{i}")
        crops.append(_crop(luma, np.array([3.0, 5.0, 21.0, 23.0]), spec))
    face = np.array([179.0, 85.0, 266.0, 178.0])
    for i in range(28):
        angle, shift = np.radians(-21 + 1.5 * i), (0.08 * np.cos(i), 0.08 * np.sin(i))
        names.append(f"astronaut_{i}")
        crops.append(_crop(portrait, face, spec, angle=angle, shift=shift, zoom=0.85 + 0.012 * i))
        if spec.lost_limit is not None:
            beside.append(_crop(portrait, face, spec, angle=angle, shift=(np.cos(i), np.sin(i))))
    origin = "scikit-image: 100 of LFW (not for int8), 28 views of the astronaut"
    places = np.stack(beside)[:, None] if beside else None
    return FaceSet(tuple(names), np.stack(crops)[:, None], origin, None, len(small), places, spec.lost_limit)


def faces_from_sources(sources: Sequence[Source], spec: ModelSpec, most: int = 512) -> FaceSet:
    """Up to `most` faces of the user's own data, evenly spread, boxes from their keypoints.

    Raises:
        DataError: an image can't be read, or no point of a face lies in its own.
    """
    faces = [face for source in sources for face in source.faces]
    chosen = [faces[i] for i in evenly_spread(len(faces), most)]
    crops, points, beside = [], [], []
    for face, frame in faces_with_frames(chosen):
        luma = frame.data
        box = frame_box(frame.size_hw) if spec.box == "frame" else boxes_from_points(face.xy)
        matrix = matrices_from_boxes(box[None], spec.size, spec.margin)[0]
        crops.append(crop_from_luma(luma, matrix, spec.size))
        points.append(apply_matrix(matrix, face.xy))
        if spec.lost_limit is not None:
            beside.append(_crop(luma, box, spec, shift=_way_out(luma, box)))
    origin = ", ".join(source.name for source in sources)
    return FaceSet(
        tuple(as_text(f"{face.image.parent.name}/{face.image.name}") for face in chosen),
        np.stack(crops)[:, None],
        origin,
        np.stack(points),
        beside=np.stack(beside)[:, None] if beside else None,
        lost_limit=spec.lost_limit,
    )


def _way_out(luma: NDArray[np.uint8], box: NDArray[np.floating]) -> tuple[float, float]:
    """To where the photo goes on farthest beyond a face's box, by one side of its square."""
    (height, width), (x0, y0, x1, y1) = luma.shape, box.tolist()
    ways = {(-1.0, 0.0): x0, (1.0, 0.0): width - x1, (0.0, -1.0): y0, (0.0, 1.0): height - y1}
    return max(ways, key=ways.__getitem__)


def _crop(luma: NDArray[np.uint8], box: NDArray[np.floating], spec: ModelSpec, **jitter: object) -> NDArray[np.uint8]:
    matrix = matrices_from_boxes(box[None], spec.size, spec.margin, **jitter)[0]  # type: ignore[arg-type]
    return crop_from_luma(luma, matrix, spec.size)


def answers_to(ask: Ask, crops: NDArray[np.uint8], bar: Bar = no_bar) -> Answer:
    """What a network answers to crops `(n, 1, size, size)`, asked in batches; `bar` wraps their list."""
    given = [ask(crops[start : start + BATCH]) for start in bar(range(0, len(crops), BATCH))]
    scores = [answer.lost_score for answer in given if answer.lost_score is not None]
    return Answer(np.concatenate([answer.keypoints for answer in given]), np.concatenate(scores) if scores else None)


def parity(reference: Answer, candidate: Answer, faces: FaceSet, *, file: str, precision: str) -> Parity:
    """Compares two networks' answers to `faces.shown`; int8 leaves out the `tiny` ones.

    Args:
        reference: PyTorch's answer.
        candidate: the file's.
        faces: the crops that both saw; beside the faces keypoints mean nothing, and lost scores alone count.
        file: the file's name.
        precision: of the file.
    """
    left_out, end = faces.tiny if precision.startswith("int8") else 0, len(faces.crops)
    wanted, got = reference.keypoints[left_out:end], candidate.keypoints[left_out:end]
    truth = None if faces.xy_crop is None else faces.xy_crop[left_out:]
    distance = np.linalg.norm(got.astype(np.float64) - wanted, axis=-1)
    distance = np.where(np.isfinite(distance), distance, np.inf)
    regions = {name: list(points) for name, points in regions_of(distance.shape[1]).items()}
    rises = None if truth is None else _nme(got, truth) - _nme(wanted, truth)
    return Parity(
        file=file,
        precision=precision,
        faces=len(distance),
        origin=faces.origin,
        mean_px=float(distance.mean()),
        p50_px=float(np.percentile(distance, 50, method="higher")),
        p99_px=float(np.percentile(distance, 99, method="higher")),
        max_px=float(distance.max()),
        nme=float((distance.mean(axis=1) / nme_unit(wanted)).mean() * 100),
        rise=None if rises is None else float(rises.mean()),
        regions_px={name: float(distance[:, points].mean()) for name, points in regions.items()},
        worst_face=faces.names[left_out + int(distance.max(axis=1).argmax())],
        score=_score_distance(reference, candidate, faces, left_out),
        regions_rise=None if rises is None else {name: float(rises[points].mean()) for name, points in regions.items()},
    )


def _score_distance(reference: Answer, candidate: Answer, faces: FaceSet, left_out: int) -> float | None:
    wanted, got = reference.lost_score, candidate.lost_score
    if wanted is None or got is None:
        return None
    distance = np.abs(got.astype(np.float64) - wanted)
    distance[~np.isfinite(distance)] = math.inf
    if faces.lost_limit is not None:  # far over its limit a score may stray: there is no face all the same
        as_decided = ((got > faces.lost_limit) == (wanted > faces.lost_limit)) & (distance < math.inf)
        distance[len(faces.crops) :][as_decided[len(faces.crops) :]] = 0
    return float(distance[left_out:].max())


def _nme(xy_crop: NDArray[np.float32], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """NME of each point against labels, percent, `(68,)`; infinite where one is not finite."""
    nme = point_errors(xy_crop, truth).mean(axis=0) * 100
    return np.where(np.isfinite(nme), nme, np.inf)


def check_parity(report: Parity, size: int) -> None:
    """Holds a report against the limits of its precision, scaled to a crop of `size` pixels.

    Raises:
        ParityError: over a limit; names the worst face.
    """
    limit = LIMITS[report.precision]
    regions = report.regions_rise or {}
    measures = [
        # no limit still means a finite distance: a NaN counts as infinitely far
        ("worst point", report.max_px, min(limit.max_px * size / 224, sys.float_info.max), "px"),
        ("99th percentile", report.p99_px, limit.p99_px * size / 224, "px"),
        ("rise of the NME", report.rise, limit.rise, "percentage points"),
        *(
            (f"rise of the NME of the {name}", rise, 2 * limit.rise, "percentage points")
            for name, rise in regions.items()
        ),
        ("lost score", report.score, min(limit.score, sys.float_info.max), "away"),
    ]
    over = [
        f"{what} {got:.4g} {unit} (at most {most:.4g})"
        for what, got, most, unit in measures
        if got is not None and not got <= most
    ]
    if over:
        raise ParityError(
            f"{report.file} is too far from PyTorch: {', '.join(over)}; the worst face is {report.worst_face}"
        )
