"""The lost score: a second linear layer beside the last one, which tells whether the points lie on a face at all.

It reads the same 512 features and answers with the error that the network itself makes in the view, in units of
`GONE` and cut off at 1: 0.2 for a face that it misses by 4%, about 1 where there is none. It is solved in closed form,
by ridge regression (Hoerl and Kennard 1970) on views of labelled faces in boxes that are right, off, far off, of wrong
size and turned, and on places of the same photos without a face. No other layer is touched, so no keypoint moves.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kp_runtime.frame import Frame
from kp_runtime.geometry import boxes_from_points, boxes_to_compare, overlaps
from kp_train.augment import Augment, grey_levels
from kp_train.data import Face, luma_of_face
from kp_train.metrics import FAILURE

__all__ = ["FACES", "GONE", "LIMIT", "VIEWS", "AnyPlace", "ScoreQuality", "elsewhere", "score_quality", "solved_score"]

Boxes = Callable[[Frame], NDArray[np.float64]]

GONE = 0.2
"""NME from which on the points lie on no face."""
LIMIT = 0.5
"""Above this score there is no face: half of `GONE`."""
MOST_WRONG = 0.05
"""Share of held-out faces that may be given up, and of other views that may be missed: else a score is of no use."""
FACES, VIEWS = 700, 6
"""Most faces that are looked at, and in how many squares each; places without a face come to these."""

_PULL = 0.01  # of the ridge regression, in mean squares of the features
_APART = 0.02  # overlap with a face up to which a place has none
_TRIES = 60


class AnyPlace(Augment):
    """Squares anywhere about a face: in place, off or beside it; of right, other or wrong size; upright or turned."""

    def __init__(self) -> None:
        super().__init__(shift=0, max_shift=0, zoom=0, turn=0, mirror=None, grey=grey_levels(0.5, 0.25, 0.4, 40, 0.15))

    def draw_jitter(self, size_hw: tuple[int, int]) -> dict[str, Any]:
        """See `Augment.draw_jitter`."""

        def one_of(*ranges: tuple[float, float]) -> float:
            low, high = ranges[int(torch.randint(len(ranges), ()))]
            return low + (high - low) * float(torch.rand(()))

        zoom = math.exp(one_of((0, 0), (-0.3, 0.3), (-0.9, 0.8)))
        way, direction = one_of((0, 0), (0, 0.25), (0.25, 0.7)) / zoom, one_of((0, 2 * math.pi))
        shift = np.array([way * math.cos(direction), way * math.sin(direction)])
        return {"shift": shift, "zoom": zoom, "angle": one_of((0, 0), (-0.4, 0.4), (-1.6, 1.6))}


def elsewhere(
    faces: Iterable[Face], labelled: Iterable[Face], detector: Boxes | None
) -> tuple[list[Face], NDArray[np.float64]]:
    """Square places of the faces' photos without a face, 0.6 to 1.4 times as large: whose photo, and boxes `(n, 4)`.

    Args:
        faces: labelled faces; in photos that a face fills there is no place.
        labelled: these and all others, as one photo may show several.
        detector: tells where unlabelled faces are; None leaves them.
    """
    rng, kept, boxes = np.random.default_rng(68), [], []
    shown = defaultdict(list)
    for face in labelled:
        shown[face.image].append(boxes_to_compare(face.xy))
    for face in faces:
        luma, box = luma_of_face(face), boxes_from_points(face.xy)
        found = [] if detector is None else [detector(Frame(luma, "gray"))]
        known = np.concatenate([*found, np.stack(shown[face.image])])
        for _ in range(_TRIES):
            side = rng.uniform(0.6, 1.4) * (box[2:] - box[:2]).max()
            if side >= min(luma.shape):
                continue
            corner = rng.uniform(0, np.array(luma.shape[::-1]) - side)
            place = np.concatenate([corner, corner + side])
            if overlaps(known, place[None]).max() < _APART:
                kept.append(face)
                boxes.append(place)
                break
    return kept, np.array(boxes).reshape(-1, 4)


def solved_score(features: Tensor, nme: Tensor) -> Tensor:
    """Weights and bias `(513,)` float64 of the layer.

    Args:
        features: `(n, 513)` float64, the last one 1.
        nme: `(n,)` float64, the network's error in each view, a fraction.
    """
    square = features.T @ features / len(features)
    pull = _PULL * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    wanted = (nme / GONE).clamp(max=1)
    solved: Tensor = torch.linalg.solve(square + pull, features.T @ wanted / len(features))
    return solved


@dataclass(frozen=True)
class ScoreQuality:
    """How well the score tells faces from what is none, at `LIMIT`.

    Attributes:
        faces: views in which the network finds the points, with an NME up to 8%.
        given_up: share of them that the score takes for lost.
        lost: views with an NME of `GONE` or more.
        missed: share of them that the score takes for faces.
    """

    faces: int
    given_up: float
    lost: int
    missed: float

    @property
    def is_of_use(self) -> bool:
        """Whether it was measured, and wrong seldom enough."""
        return bool(self.faces and self.lost) and max(self.given_up, self.missed) <= MOST_WRONG

    def __str__(self) -> str:
        return (
            f"{self.given_up:.2%} of {self.faces} views of a face given up, {self.missed:.2%} of {self.lost} without "
            "one taken for a face"
        )


def score_quality(score: Tensor, nme: Tensor) -> ScoreQuality:
    """Of scores `(n,)` and the network's errors in the same views; what is between counts for neither."""
    faces, lost = score[nme <= FAILURE], score[nme >= GONE]
    given_up, missed = int((faces > LIMIT).sum()), int((lost <= LIMIT).sum())
    return ScoreQuality(len(faces), given_up / max(len(faces), 1), len(lost), missed / max(len(lost), 1))
