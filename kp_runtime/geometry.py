"""The crop rule: from a face box to the matrix and the grey levels of a crop, and back.

Frames of reference: `xy_image` is pixels of the source image, `xy_crop` pixels of the crop; an
integer is a pixel's centre in both. `crop_from_image` is the 2x3 float64 matrix that takes a
homogeneous `(x, y, 1)` of the image to `(u, v)` of the crop.

The rule. A box `(x0, y0, x1, y1)`, tight around the 68 points, becomes the square with the same
centre and `margin` times the longer side. The square is mapped onto `size` x `size` pixels,
bilinear, edge pixels repeated. Where the square is larger than 2 x `size`, the image is first
averaged in whole k x k blocks, k = floor(side / size), counted from the image's top-left
pixel; the last block of a row or column repeats the edge where the image ends inside it.

Bilinear means OpenCV's `warpAffine`: positions to 1/32 px, grey levels rounded; a float path may
differ by one level on a smooth picture.

Training and every run-time path read their crops through this file or are tested against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kp_runtime.frame import import_cv2

__all__ = [
    "Window",
    "apply_matrix",
    "block_from_matrix",
    "boxes_from_points",
    "crop_from_luma",
    "crop_window",
    "frame_box",
    "invert_matrix",
    "matrices_from_boxes",
]

FloatArray = NDArray[np.floating]


def boxes_from_points(xy: FloatArray) -> NDArray[np.float64]:
    """The tight boxes of point sets.

    Args:
        xy: `(..., p, 2)` float, x then y.

    Returns:
        `(..., 4)` float64 `x0, y0, x1, y1` in the same frame.
    """
    xy = np.asarray(xy, np.float64)
    return np.concatenate([xy.min(axis=-2), xy.max(axis=-2)], axis=-1)


def frame_box(size_hw: tuple[int, int], fraction: float = 224 / 250) -> NDArray[np.float64]:
    """The centred square of an image: `fraction` of its shorter side, `(4,)` float64.

    With the default it is the view of the original project's recipe: the shorter side scaled
    to 250, the central 224 cut out.
    """
    height, width = size_hw
    half = fraction * min(height, width) / 2
    cx, cy = (width - 1) / 2, (height - 1) / 2
    return np.array([cx - half, cy - half, cx + half, cy + half])


def matrices_from_boxes(
    boxes_xyxy: FloatArray,
    size: int,
    margin: float,
    *,
    angle: ArrayLike = 0.0,
    shift: ArrayLike = (0.0, 0.0),
    zoom: ArrayLike = 1.0,
) -> NDArray[np.float64]:
    """The crop matrices of face boxes.

    Args:
        boxes_xyxy: `(n, 4)` float, pixels of the image.
        size: side of the crop in pixels.
        margin: side of the square, in longer sides of the box.
        angle: turn of the square in radians, one value or `(n,)`.
        shift: displacement of the square's centre in sides of the square, `(2,)` or `(n, 2)`.
        zoom: factor on the side of the square, one value or `(n,)`.

    Returns:
        `(n, 2, 3)` float64, `crop_from_image`.
    """
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    n = len(boxes)
    low, high = boxes[:, :2], boxes[:, 2:]
    side = margin * (high - low).max(axis=1) * np.broadcast_to(np.asarray(zoom, np.float64), n)
    centre = (low + high) / 2 + np.broadcast_to(np.asarray(shift, np.float64), (n, 2)) * side[:, None]
    turn = np.broadcast_to(np.asarray(angle, np.float64), n)
    scale = size / side
    a, b = scale * np.cos(turn), scale * np.sin(turn)
    matrices = np.empty((n, 2, 3))
    matrices[:, 0, 0], matrices[:, 0, 1] = a, b
    matrices[:, 1, 0], matrices[:, 1, 1] = -b, a
    matrices[:, :, 2] = (size - 1) / 2 - np.einsum("nij,nj->ni", matrices[:, :, :2], centre)
    return matrices


def apply_matrix(matrix: FloatArray, xy: FloatArray) -> NDArray[np.float64]:
    """Maps points: `matrix` `(..., 2, 3)`, `xy` `(..., p, 2)`; `(..., p, 2)` float64."""
    matrix = np.asarray(matrix, np.float64)
    return np.asarray(xy, np.float64) @ np.swapaxes(matrix[..., :2], -1, -2) + matrix[..., None, :, 2]


def invert_matrix(matrix: FloatArray) -> NDArray[np.float64]:
    """The inverse maps of 2x3 matrices: `(..., 2, 3)` to `(..., 2, 3)` float64."""
    matrix = np.asarray(matrix, np.float64)
    linear = np.linalg.inv(matrix[..., :2])
    return np.concatenate([linear, -linear @ matrix[..., 2:]], axis=-1)


def block_from_matrix(matrix: FloatArray) -> int:
    """The side k of the blocks that are averaged before a crop is sampled; 1 means none.

    The scale of the matrix is the square root of its determinant, so k is floor(side / size)
    where the square is larger than twice the crop, whatever its turn.
    """
    matrix = np.asarray(matrix, np.float64)
    scale = math.sqrt(abs(float(np.linalg.det(matrix[:, :2]))))
    # 1e-9: a square of exactly k times the crop must give k, whatever the rounding of its turn
    step = 1.0 / scale + 1e-9
    return math.floor(step) if step > 2.0 + 2e-9 else 1


@dataclass(frozen=True)
class Window:
    """The part of an image that a crop reads: pixels `x0 <= x < x1`, `y0 <= y < y1`."""

    x0: int
    y0: int
    x1: int
    y1: int


def crop_window(matrix: FloatArray, size: int, size_hw: tuple[int, int]) -> Window:
    """The part of an image that a crop reads, in whole blocks, never empty.

    Args:
        matrix: `(2, 3)`, `crop_from_image`.
        size: side of the crop.
        size_hw: the image's height and width.
    """
    k = block_from_matrix(matrix)
    corners = np.array([(0, 0), (size - 1, 0), (0, size - 1), (size - 1, size - 1)], np.float64)
    xy = apply_matrix(invert_matrix(matrix), corners)
    limit = np.array(size_hw[::-1])
    # two blocks around: one that bilinear sampling touches, one for the rounding of positions
    low = (np.floor(xy.min(axis=0) / k).astype(np.int64) - 2) * k
    high = (np.floor(xy.max(axis=0) / k).astype(np.int64) + 3) * k
    low = np.clip(low, 0, (limit - 1) // k * k)
    high = np.minimum(np.maximum(high, low + k), limit)
    return Window(int(low[0]), int(low[1]), int(high[0]), int(high[1]))


def crop_from_luma(
    luma: NDArray[np.uint8],
    matrix: FloatArray,
    size: int,
    *,
    origin_xy: tuple[int, int] = (0, 0),
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Samples one crop from a grey image by the crop rule.

    Args:
        luma: `(h, w)` uint8: the image, or the window of it that `crop_window` names.
        matrix: `(2, 3)`, `crop_from_image`, for the whole image.
        size: side of the crop.
        origin_xy: where the window begins in the image.
        out: `(size, size)` uint8, C-contiguous, written in place when given.

    Returns:
        `(size, size)` uint8 (`out` when given).
    """
    cv2 = import_cv2()
    k = block_from_matrix(matrix)
    source_from_crop = invert_matrix(matrix)
    source_from_crop[:, 2] -= origin_xy
    if k > 1:
        luma = _block_means(luma, k)
        # block b covers pixels k b to k b + k - 1; its centre is pixel k b + (k - 1) / 2
        source_from_crop[:, 2] -= (k - 1) / 2
        source_from_crop /= k
    crop: NDArray[np.uint8] = cv2.warpAffine(
        luma,
        source_from_crop,
        (size, size),
        dst=out,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return crop


def _block_means(luma: NDArray[np.uint8], k: int) -> NDArray[np.uint8]:
    """Means of whole k x k blocks, rounded half up, the edge repeated to fill the last ones."""
    height, width = luma.shape
    pad = ((0, -height % k), (0, -width % k))
    if pad != ((0, 0), (0, 0)):
        luma = np.pad(luma, pad, mode="edge")
    rows = luma.reshape(luma.shape[0] // k, k, luma.shape[1]).sum(axis=1, dtype=np.uint32)
    sums = rows.reshape(rows.shape[0], -1, k).sum(axis=2, dtype=np.uint32)
    means: NDArray[np.uint8] = ((sums + k * k // 2) // (k * k)).astype(np.uint8)
    return means
