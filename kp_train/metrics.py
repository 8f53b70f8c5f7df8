"""Accuracy measures of faces, in numpy; all take `(n, 68, 2)` pixels of the image, or another number of points.

NME: mean point error over the distance of the outer eye corners (Sagonas et al. 2013); with another number of points
than 68, over the longer side of the points' tight box, by which the crop goes, too.
AUC and failure rate at 8%: area under the cumulative error curve up to 0.08, divided by 0.08,
and the share of faces over 0.08 (Yang et al. 2015). Faces that a detector missed count as worse than that.
The interval of the NME: a bootstrap over people, as frames of one person are no independent faces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kp_runtime.scheme68 import EYE_CORNERS, POINTS, regions_of

__all__ = ["Accuracy", "accuracy", "interval_over_people", "nme_unit", "point_errors", "smooth_l1_original"]

FAILURE = 0.08
FEWEST_PEOPLE = 8
"""Under so many a mean says too little of other people: a bootstrap's interval over two or three is far too narrow."""
DRAWS = 2000
"""Of people, for an interval: its ends then hold still to a fiftieth of its width."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over a set of faces; NME, median, AUC and failures as fractions, not percent.

    Attributes:
        faces: number of faces; all but AUC and failures are over these.
        nme: mean NME.
        median: median NME.
        p95: 95th percentile of the NME.
        auc: area under the cumulative error curve up to 8%, 0 to 1; of these and the missed faces.
        failures: share of faces with an NME over 8%, of these and the missed faces, which count as such.
        regions: mean NME of jaw, brows, nose, eyes, mouth; none with another number of points than 68.
        smooth_l1: the original project's loss.
    """

    faces: int
    nme: float
    median: float
    p95: float
    auc: float
    failures: float
    regions: dict[str, float]
    smooth_l1: float


def nme_unit(xy: NDArray[np.floating]) -> NDArray[np.float64]:
    """What the NME of each face is counted in, `(n,)`: the eyes' distance, or the box's longer side."""
    xy = np.asarray(xy, np.float64)
    if xy.shape[1] == POINTS:
        eyes: NDArray[np.float64] = np.linalg.norm(xy[:, EYE_CORNERS[0]] - xy[:, EYE_CORNERS[1]], axis=-1)
        return eyes
    side: NDArray[np.float64] = np.ptp(xy, axis=1).max(axis=-1)
    return side


def point_errors(predicted: NDArray[np.floating], truth: NDArray[np.floating]) -> NDArray[np.float64]:
    """Point distances over the truth's `nme_unit`, `(n, 68)`."""
    truth = np.asarray(truth, np.float64)
    errors: NDArray[np.float64] = np.linalg.norm(predicted - truth, axis=-1) / nme_unit(truth)[:, None]
    return errors


def smooth_l1_original(
    predicted: NDArray[np.floating], truth: NDArray[np.floating], sizes_hw: NDArray[np.integer]
) -> NDArray[np.float64]:
    """The original project's validation loss of each face, `(n,)`.

    The image scaled so that its shorter side is 250, points as (pixel − 100) / 50, SmoothL1
    with beta 1, the mean over all coordinates. Its crop moves both sets alike and cancels.
    """
    scale = 250.0 / np.asarray(sizes_hw, np.float64).min(axis=1)
    distance = np.abs(np.asarray(predicted, np.float64) - truth) * scale[:, None, None] / 50
    loss = np.where(distance < 1, distance**2 / 2, distance - 0.5)
    mean: NDArray[np.float64] = loss.mean(axis=(1, 2))
    return mean


def interval_over_people(values: NDArray[np.floating], people: Sequence[str]) -> tuple[float, float] | None:
    """The 95% interval of a mean over faces, had other people been drawn: percentiles of means of drawn people's faces.

    Args:
        values: `(n,)`, one for each face.
        people: whose each face is.

    Returns:
        Its ends, the same each time; None of fewer than eight people's faces, which tell too little about others.
    """
    names, index = np.unique(np.asarray(people, object).astype(str), return_inverse=True)
    count = len(names)
    if count < FEWEST_PEOPLE:
        return None
    sums, faces = np.bincount(index, values), np.bincount(index)
    draws = np.random.default_rng(0)
    means = [
        sums[drawn].sum() / faces[drawn].sum() for drawn in (draws.integers(count, size=count) for _ in range(DRAWS))
    ]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def accuracy(
    predicted: NDArray[np.floating], truth: NDArray[np.floating], sizes_hw: NDArray[np.integer], missed: int = 0
) -> Accuracy:
    """All measures at once.

    Args:
        predicted: `(n, points, 2)`, pixels of each image.
        truth: the labels, likewise.
        sizes_hw: `(n, 2)`, each image's height and width.
        missed: faces beside these that a detector did not find.
    """
    errors = point_errors(predicted, truth)
    nme = errors.mean(axis=1)
    return Accuracy(
        faces=len(nme),
        nme=float(nme.mean()),
        median=float(np.median(nme)),
        p95=float(np.percentile(nme, 95)),
        auc=float(np.clip(1 - nme / FAILURE, 0, None).sum() / (len(nme) + missed)),
        failures=float(((nme > FAILURE).sum() + missed) / (len(nme) + missed)),
        regions={name: float(errors[:, list(points)].mean()) for name, points in regions_of(errors.shape[1]).items()},
        smooth_l1=float(smooth_l1_original(predicted, truth, sizes_hw).mean()),
    )
