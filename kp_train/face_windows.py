"""What the face detector is trained on: windows with a face somewhere on a background, and windows without one.

A window is `(96, 96)` uint8 grey. A photo's labelled face is put anywhere into it, at any size and turned; what the
photo does not reach is another background. Windows without a face are the same photos with the face covered, pictures
that hold none, and drawn textures. Boxes are tight around the 68 points, pixels of the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from kp_runtime.errors import DataError
from kp_runtime.files import files_below
from kp_runtime.frame import IMAGE_SUFFIXES
from kp_runtime.geometry import apply_matrix, boxes_from_points, crop_from_luma, matrices_from_boxes, moved_box
from kp_train.data import Face, luma_from_file, lumas_of_faces, sha256_of_files

__all__ = ["WINDOW", "Pictures", "WindowDataset", "read_pictures"]

WINDOW = 96
"""Side of a training window in pixels."""

_KINDS = (0.72, 0.18, 0.10)
"""Shares of windows with a face, of a photo whose face is covered, of pictures and textures."""

_SIZES = ((19.0, 76.0), (76.0, 130.0))
"""Longer sides of the box in pixels: those to find, and larger ones, whose parts are no faces."""
_LARGE = 0.15

Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class Pictures:
    """Pictures without a face: their grey levels, and the sha256 over all files in order of their names."""

    lumas: tuple[Grey, ...] = ()
    sha256: str = ""


def read_pictures(folders: Sequence[Path]) -> Pictures:
    """Reads the pictures of folders, and of the folders in them.

    Raises:
        DataError: a folder has none, or one can't be read.
    """
    files: list[Path] = []
    for folder in folders:
        found = files_below(folder, IMAGE_SUFFIXES)
        if not found:
            raise DataError(f"{folder} has no pictures ({', '.join(IMAGE_SUFFIXES)}); give a folder that holds some")
        files += found
    return Pictures(tuple(luma_from_file(path) for path in files), sha256_of_files(files) if files else "")


class WindowDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Windows drawn by their index alone, so that a resumed run sees what an uninterrupted one would have seen.

    An item is `(window, box, clean)`: uint8 `(1, 96, 96)`; float32 `(4,)` x0, y0, x1, y1, NaN where there is no
    face; bool, whether nothing else in the window can be a face (of a photo only one face is labelled).

    Args:
        faces: labelled faces; their photos are kept in memory as grey levels.
        weights: how often each face is drawn, beside the others.
        pictures: without a face; may be none.
        seed: of all draws.
        count: number of items.
    """

    def __init__(
        self, faces: Sequence[Face], weights: Sequence[float], pictures: Pictures, seed: int, count: int
    ) -> None:
        self._photos = list(zip(lumas_of_faces(faces), (face.xy for face in faces), strict=True))
        up_to = np.cumsum(weights)
        self._up_to = up_to / up_to[-1]
        self._pictures, self._seed, self._count = pictures.lumas, seed, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """The window of an index.

        Raises:
            IndexError: it is `count` or more; so the items can be walked through.
        """
        if index >= self._count:
            raise IndexError(f"there are {self._count} windows, got index {index}")
        rng = np.random.default_rng((self._seed, index))
        kind = rng.choice(3, p=_KINDS)
        box = np.full(4, np.nan)
        if kind == 2:
            window = self._picture(rng)
            if rng.random() < 0.5:
                _cover(window, _anywhere(rng), self._picture(rng), rng)
        else:
            window, place = self._photo(rng, _drawn_size(rng))
            if kind == 1:
                _cover(window, moved_box(place, 0, 0, rng.uniform(1.05, 1.6)), self._background(rng), rng)
            else:
                box = place
                if rng.random() < 0.08:
                    _cover(window, _corner_of(place, rng), self._picture(rng), rng)
        window = _lit(window, rng)
        if rng.random() < 0.5:
            window = window[:, ::-1]
            box = np.array([WINDOW - 1 - box[2], box[1], WINDOW - 1 - box[0], box[3]])
        image = torch.from_numpy(np.ascontiguousarray(window))[None]
        return image, torch.from_numpy(box).float(), torch.tensor(kind == 2)

    def _photo(self, rng: np.random.Generator, size: float) -> tuple[Grey, NDArray[np.float64]]:
        """A view of a photo on a background, and the face's box in it."""
        luma, xy = self._any_photo(rng)
        window, inside, box = _view(luma, xy, size, rng)
        if not inside.all():
            window = np.where(inside > 0, window, self._background(rng))
        return window, box

    def _any_photo(self, rng: np.random.Generator) -> tuple[Grey, NDArray[np.float32]]:
        return self._photos[int(np.searchsorted(self._up_to, rng.random(), side="right"))]

    def _background(self, rng: np.random.Generator) -> Grey:
        """A photo whose face is covered, or a picture."""
        if rng.random() < 0.5:
            return self._picture(rng)
        luma, xy = self._any_photo(rng)
        window, _, box = _view(luma, xy, math.exp(rng.uniform(math.log(20), math.log(150))), rng)
        _cover(window, moved_box(box, 0, 0, rng.uniform(1.05, 1.6)), self._picture(rng), rng)
        return window

    def _picture(self, rng: np.random.Generator) -> Grey:
        """Part of a picture without a face, or a drawn texture."""
        if not self._pictures or rng.random() < 0.35:
            return _texture(rng)
        luma = self._pictures[rng.integers(len(self._pictures))]
        height, width = luma.shape
        side = math.exp(rng.uniform(math.log(40), math.log(max(64, 1.2 * min(height, width)))))
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        box = np.array([[x - side / 2, y - side / 2, x + side / 2, y + side / 2]])
        matrix = matrices_from_boxes(box, WINDOW, 1.0, angle=float(rng.uniform(-0.6, 0.6)))[0]
        return crop_from_luma(luma, matrix, WINDOW)


def _drawn_size(rng: np.random.Generator) -> float:
    """Longer side of a face's box in the window."""
    low, high = _SIZES[int(rng.random() < _LARGE)]
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _view(
    luma: Grey, xy: NDArray[np.float32], size: float, rng: np.random.Generator
) -> tuple[Grey, Grey, NDArray[np.float64]]:
    """A turned view of a photo with the face's box about `size` px, where the photo reaches, and the box."""
    reach = 0.5 - 0.3 * min(1.0, size / WINDOW)
    matrix = matrices_from_boxes(
        boxes_from_points(xy)[None],
        WINDOW,
        WINDOW / size,
        shift=rng.uniform(-reach, reach, 2),
        angle=math.radians(12 * float(np.clip(rng.normal(), -2.5, 2.5))),
    )[0]
    height, width = luma.shape
    corners = apply_matrix(matrix, np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]))
    inside = np.zeros((WINDOW, WINDOW), np.uint8)
    cv2.fillConvexPoly(inside, np.rint(corners).astype(np.int32), 1)
    return crop_from_luma(luma, matrix, WINDOW), inside, boxes_from_points(apply_matrix(matrix, xy))


def _anywhere(rng: np.random.Generator) -> NDArray[np.float64]:
    centre, half = rng.uniform(0, WINDOW, 2), rng.uniform(6, 45, 2)
    return np.concatenate([centre - half, centre + half])


def _corner_of(box: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """A part of a box, about a tenth of it."""
    size = box[2:] - box[:2]
    centre, half = box[:2] + size * rng.uniform(0.1, 0.9, 2), size * rng.uniform(0.1, 0.22, 2)
    return np.concatenate([centre - half, centre + half])


def _cover(window: Grey, box: NDArray[np.float64], patch: Grey, rng: np.random.Generator) -> None:
    """Puts a patch over a box of the window, in place, as a rectangle or an ellipse."""
    mask = np.zeros_like(window)
    x0, y0, x1, y1 = np.rint(box).astype(int).tolist()
    if rng.random() < 0.5:
        cv2.rectangle(mask, (x0, y0), (x1, y1), 1, -1)
    else:  # one that holds the box
        axes = (round((x1 - x0) * 0.71), round((y1 - y0) * 0.71))
        cv2.ellipse(mask, ((x0 + x1) // 2, (y0 + y1) // 2), axes, 0, 0, 360, 1, -1)
    np.copyto(window, patch, where=mask > 0)


def _texture(rng: np.random.Generator) -> Grey:
    """Flat grey, blurred noise, a slope of grey, or shapes, one over the other."""
    canvas = np.full((WINDOW, WINDOW), rng.uniform(0, 255), np.float32)
    if rng.random() < 0.4:
        ways = rng.uniform(-1, 1, 2) * 1.5
        steps = np.arange(WINDOW, dtype=np.float32) - WINDOW / 2
        canvas += ways[0] * steps[None] + ways[1] * steps[:, None]
    for _ in range(rng.integers(1, 12) if rng.random() < 0.5 else 0):
        centre, half = rng.integers(0, WINDOW, 2).tolist(), rng.integers(2, 40, 2).tolist()
        level, line = float(rng.uniform(0, 255)), int(rng.choice([-1, 1, 3]))
        if rng.random() < 0.5:
            cv2.ellipse(canvas, centre, half, float(rng.uniform(0, 180)), 0, 360, level, line)
        else:
            cv2.rectangle(canvas, centre, [c + h for c, h in zip(centre, half, strict=True)], level, line)
    if rng.random() < 0.7:
        noise = rng.standard_normal((WINDOW, WINDOW), np.float32)
        if (sigma := rng.uniform(0, 6)) > 0.5:
            noise = np.asarray(cv2.GaussianBlur(noise, (0, 0), sigma), np.float32)
        canvas += noise / noise.std() * rng.uniform(2, 50)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _lit(window: Grey, rng: np.random.Generator) -> Grey:
    """The window in another light, and at times blurred, noisy or compressed."""
    contrast, light, gamma = np.exp(rng.normal(0, 0.25)), rng.normal(0, 25), np.exp(rng.normal(0, 0.2))
    levels = 255 * (np.arange(256) / 255) ** gamma
    window = np.clip((levels - 127) * contrast + 127 + light, 0, 255).astype(np.uint8)[window]
    if rng.random() < 0.15:
        side = round(WINDOW * rng.uniform(0.4, 0.9))
        small = cv2.resize(window, (side, side), interpolation=cv2.INTER_AREA)
        window = np.asarray(cv2.resize(small, (WINDOW, WINDOW)), np.uint8)
    if rng.random() < 0.2:
        noise = rng.standard_normal(window.shape, np.float32) * rng.uniform(1, 10)
        window = np.clip(window + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.1:
        _, data = cv2.imencode(".jpg", window, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 90))])
        window = np.asarray(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE), np.uint8)
    return window
