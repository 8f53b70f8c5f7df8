"""How steady a model is: shaken boxes, enlarged and mirrored photos, and faces by turn, size and folder.

All numbers are fractions of the distance of the outer eye corners, as NME is.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kp_export.evaluate import Evaluation, OpenModel, answer_in_frames
from kp_runtime.frame import Frame, Scratch
from kp_runtime.geometry import boxes_from_points, moved_box
from kp_runtime.scheme68 import MIRROR, POINTS
from kp_train.bar import Bar, no_bar
from kp_train.data import Face, faces_with_frames
from kp_train.metrics import interval_over_people, nme_unit, point_errors

__all__ = ["Folder", "Group", "Robustness", "folders", "groups", "robustness", "turns"]

JITTER = 0.1
SHAKES = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1), (-1, -1, 1), (1, 1, -1))
"""Directions of the shaken boxes: right, down, and larger."""
ENLARGED = (2, 4, 8)
FOLDERS = 10
"""More folders than these are no data sets: of some collections each person has one."""


@dataclass(frozen=True)
class Robustness:
    """What changes when the same faces are shown otherwise; all in eye distances, a fraction.

    Attributes:
        faces: how many were measured.
        nme: with the boxes as they are.
        jitter_nme: mean NME with boxes moved and scaled by 10% of their longer side, each way alone
            and two corners; the least it should stay near is `nme`.
        enlarged: mean distance between the points of a photo and of the same photo enlarged 2, 4 and
            8 times (OpenCV's bilinear), mapped back.
        mirrored: mean distance between the points of a photo and the mirrored points of its mirror
            image.
    """

    faces: int
    nme: float
    jitter_nme: float
    enlarged: dict[int, float]
    mirrored: float


@dataclass(frozen=True, eq=False)
class _Enlarged(Frame):
    """A `gray` frame so many times as large, by OpenCV's bilinear; of it only what is read is made."""

    times: int = 1

    @property
    def size_hw(self) -> tuple[int, int]:
        height, width = self.data.shape
        return height * self.times, width * self.times

    def luma(self, x0: int, y0: int, x1: int, y1: int, scratch: Scratch | None = None) -> NDArray[np.uint8]:
        import cv2

        # a power of two, so the places that are sampled are the whole photo's, bit for bit; a pixel around them is read
        k, left, top = self.times, max(x0 // self.times - 1, 0), max(y0 // self.times - 1, 0)
        part = self.data[top : -(-y1 // k) + 1, left : -(-x1 // k) + 1]
        large = cv2.resize(part, None, fx=k, fy=k, interpolation=cv2.INTER_LINEAR)
        return np.asarray(large[y0 - top * k : y1 - top * k, x0 - left * k : x1 - left * k], np.uint8)


@dataclass(frozen=True)
class Group:
    """NME of the faces between two bounds of a property: `[low, high)`, without an end where `high` is None."""

    by: str
    low: float
    high: float | None
    faces: int
    nme: float


@dataclass(frozen=True)
class Folder:
    """NME of the faces whose images lie in a folder, and its 95% interval, None where these are too few people."""

    folder: str
    faces: int
    nme: float
    nme_interval: tuple[float, float] | None


def robustness(
    model: OpenModel,
    faces: Sequence[Face],
    bar: Bar = no_bar,
    looks: int = 1,
    mirror: bool = False,
) -> Robustness:
    """Measures a model on labelled faces shown in other ways; boxes from the keypoints.

    Args:
        model: from `evaluate.open_model`; one that takes face boxes.
        faces: labelled faces.
        bar: wraps the list of faces, to show progress.
        looks: as a call of `kp_runtime.Model` takes them.
        mirror: likewise.

    Raises:
        DataError: an image can't be read.
    """
    found, n = [], 1 + len(SHAKES)
    for face, frame in faces_with_frames(bar(faces)):
        luma, box = frame.data, boxes_from_points(face.xy)
        last = luma.shape[1] - 1
        mirrored = Frame(np.ascontiguousarray(luma[:, ::-1]), "gray")
        views = [(frame, box), *((frame, moved_box(box, JITTER * x, JITTER * y, 1 + JITTER * k)) for x, y, k in SHAKES)]
        views += [(_Enlarged(luma, "gray", times=k), (box + 0.5) * k - 0.5) for k in ENLARGED]
        views.append((mirrored, np.array([last - box[2], box[1], last - box[0], box[3]])))
        frames, boxes = [shown for shown, _ in views], np.stack([box for _, box in views])
        points, _ = answer_in_frames(model, frames, boxes, looks, mirror)
        points[n:-1] = [(xy + 0.5) / k - 0.5 for xy, k in zip(points[n:-1], ENLARGED, strict=True)]
        points[-1] = points[-1][MIRROR] * (-1, 1) + (last, 0)
        found.append(points)
    truth = np.stack([face.xy for face in faces]).astype(np.float64)
    plain, *others = np.stack(found, axis=1)
    # distances to the model's own answer, but over the true eyes
    eyes = nme_unit(truth)
    return Robustness(
        faces=len(faces),
        nme=float(point_errors(plain, truth).mean()),
        jitter_nme=float(np.mean([point_errors(xy, truth).mean() for xy in others[: len(SHAKES)]])),
        enlarged={k: _distance(xy, plain, eyes) for k, xy in zip(ENLARGED, others[len(SHAKES) : -1], strict=True)},
        mirrored=_distance(others[-1], plain, eyes),
    )


def _distance(a: NDArray[np.float64], b: NDArray[np.float64], eyes: NDArray[np.float64]) -> float:
    return float((np.linalg.norm(a - b, axis=-1).mean(axis=1) / eyes).mean())


def turns(truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far heads are turned, `(n,)`: 0 is frontal, 1 a profile that looks to the picture's right, -1 to its left.

    How far the nose tip (30) lies from the middle of the outer jaw points (0 and 16), over half their distance; 1 where
    these two are one.

    Args:
        truth: `(n, 68, 2)`, in pixels.
    """
    jaw = truth[:, 16] - truth[:, 0]
    along = np.einsum("nd,nd->n", truth[:, 30] - (truth[:, 0] + truth[:, 16]) / 2, jaw)
    half = np.einsum("nd,nd->n", jaw, jaw) / 2
    share: NDArray[np.float64] = np.divide(along, half, out=np.ones_like(along), where=half > 0)
    return share


def groups(result: Evaluation) -> list[Group]:
    """NME by the face's size (eye distance in pixels) and by its turn to either side; of the 68 points alone."""
    truth = np.stack([face.xy for face in result.faces]).astype(np.float64)
    if truth.shape[1] != POINTS:
        return []
    found = []
    for by, values, bounds in (
        ("eye distance px", nme_unit(truth), (0, 30, 45, 60, 90, np.inf)),
        ("turn", np.abs(turns(truth)), (0, 0.15, 0.3, 0.5, np.inf)),
    ):
        for low, high in itertools.pairwise(bounds):
            inside = (values >= low) & (values < high)
            if inside.any():
                found.append(
                    Group(
                        by,
                        low,
                        high if np.isfinite(high) else None,
                        int(inside.sum()),
                        float(result.errors[inside].mean()),
                    )
                )
    return found


def folders(result: Evaluation) -> list[Folder]:
    """NME by the folder of the images, named from where the paths part; none where all are in one, or in over 10."""
    found = [face.image.absolute().parent for face in result.faces]
    if not 1 < len(set(found)) <= FOLDERS:
        return []
    common = os.path.commonpath(found)
    measured = []
    for folder in sorted(set(found)):
        inside = [i for i, other in enumerate(found) if other == folder]
        errors = result.errors[inside]
        interval = interval_over_people(errors, [result.faces[i].person for i in inside])
        measured.append(Folder(os.path.relpath(folder, common), len(inside), float(errors.mean()), interval))
    return measured
