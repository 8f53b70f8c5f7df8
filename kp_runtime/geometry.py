"""The crop rule: from a face box to the matrix and the grey levels of a crop, and back.

Frames of reference: `xy_image` is pixels of the source image, `xy_crop` pixels of the crop; an
integer is a pixel's centre in both. `crop_from_image` is the 2x3 float64 matrix that takes a
homogeneous `(x, y, 1)` of the image to `(u, v)` of the crop.

The rule. A box `(x0, y0, x1, y1)`, tight around the 68 points, becomes the square with the same
centre and `margin` times the longer side. The square is mapped onto `size` x `size` pixels,
bilinear, edge pixels repeated. Where the square is larger than 2 x `size`, the image is first
averaged in whole k x k blocks, k = floor(side / size), counted from the image's top-left
pixel; the last block of a row or column repeats the edge where the image ends inside it.

Bilinear means `warpAffine` of OpenCV 4: positions to 1/32 px, grey levels rounded; all of it in integers stands at
the head of `preprocess.cu`. A float path, as OpenCV 5's, is up to 5 levels off (docs/parity.md), so whichever OpenCV
is installed is asked once whether it gives these bits, and so it is for the means of 2 x 2 blocks.

Training and every run-time path read their crops through this file or are tested against it.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kp_runtime.errors import InputError, KpWarning
from kp_runtime.frame import Scratch, import_cv2
from kp_runtime.scheme68 import POINTS

__all__ = [
    "CropPlan",
    "apply_matrix",
    "box_of_face",
    "boxes_from_points",
    "boxes_to_compare",
    "crop_from_bands",
    "crop_from_luma",
    "crop_from_window",
    "crop_plan",
    "frame_box",
    "invert_matrix",
    "matrices_from_boxes",
    "mirrored_matrices",
    "moved_box",
    "overlaps",
    "point_array",
    "way_to_sample",
]

FloatArray = NDArray[np.floating]

_BAND = 1 << 20
"""Pixels that are turned grey and averaged at a time. A face of video is one band or two; a photo's face of 12 million
would leave that much memory, and as much again, with every thread that ever cut one.
"""

_FAR = 32767 << 10
"""The farthest position that `remap` takes, in 1024ths of a pixel; all beyond it has the edge's grey level, as this."""

_SAME = 0.25  # overlap over which a detector's box is of the labelled face
_COVERED = 0.5  # the same of other points than the 68, in the smaller of both boxes: they may span less of a face
_FLATTEST = 1 / 3  # least shorter side of a box that is compared, in longer ones


def point_array(xy: ArrayLike) -> NDArray[np.float64]:
    """Points as an array, of any shape.

    Raises:
        InputError: they are no numbers, or of several lengths.
    """
    try:
        return np.asarray(xy, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"points must be an array of numbers, got {type(xy).__name__} ({error}); those of Keypoints are its xy"
        ) from error


def boxes_from_points(xy: ArrayLike) -> NDArray[np.float64]:
    """The tight boxes of point sets.

    Args:
        xy: `(..., p, 2)` float, x then y.

    Returns:
        `(..., 4)` float64 `x0, y0, x1, y1` in the same frame.

    Raises:
        InputError: no numbers, another shape, or sets of no point.
    """
    points = point_array(xy)
    if points.ndim < 2 or points.shape[-1] != 2 or points.shape[-2] == 0:
        raise InputError(f"points must be (..., p, 2) with x and y, one or more in each set; got shape {points.shape}")
    return np.concatenate([points.min(axis=-2), points.max(axis=-2)], axis=-1)


def boxes_to_compare(xy: ArrayLike) -> NDArray[np.float64]:
    """As `boxes_from_points`, but flat boxes are thicker: those of closed eyes or a line overlap with next to nothing.

    Their middle and their longer side stay, and with them the crop.
    """
    boxes = boxes_from_points(xy)
    size = boxes[..., 2:] - boxes[..., :2]
    more = np.maximum(_FLATTEST * size.max(axis=-1, keepdims=True) - size, 0) / 2
    thicker: NDArray[np.float64] = boxes + np.concatenate([-more, more], axis=-1)
    return thicker


def moved_box(box_xyxy: NDArray[np.float64], right: float, down: float, scale: float) -> NDArray[np.float64]:
    """A box `(4,)` moved by shares of its longer side and scaled about its centre."""
    half = (box_xyxy[2:] - box_xyxy[:2]) / 2
    centre = (box_xyxy[:2] + box_xyxy[2:]) / 2 + 2 * half.max() * np.array([right, down])
    return np.concatenate([centre - scale * half, centre + scale * half])


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
    turns, zooms = _each(angle, (n,)), _each(zoom, (n,))
    shifts = _each(shift, (n, 2))
    rows = []
    # plain numbers: for the few faces of a frame they cost a tenth of what small arrays do
    for (x0, y0, x1, y1), turn, (dx, dy), factor in zip(boxes.tolist(), turns, shifts, zooms, strict=True):
        side = margin * max(x1 - x0, y1 - y0) * factor
        cx, cy = x0 + (x1 - x0) / 2 + dx * side, y0 + (y1 - y0) / 2 + dy * side
        scale = size / side
        a, b = scale * math.cos(turn), scale * math.sin(turn)
        middle = (size - 1) / 2
        rows.append((a, b, middle - (a * cx + b * cy), -b, a, middle - (a * cy - b * cx)))
    return np.array(rows, np.float64).reshape(n, 2, 3)


def mirrored_matrices(crop_from_image: FloatArray, size: int) -> NDArray[np.float64]:
    """Matrices that cut the same crops mirrored, left for right: `(n, 2, 3)` to `(n, 2, 3)` float64."""
    mirrored = np.array(crop_from_image, np.float64)
    mirrored[:, 0] *= -1
    mirrored[:, 0, 2] += size - 1
    return mirrored


def _each(value: ArrayLike, shape: tuple[int, ...]) -> list[Any]:
    """One value for each box, as plain numbers."""
    if isinstance(value, (float, tuple)):
        return [value] * shape[0]
    return np.broadcast_to(np.asarray(value, np.float64), shape).tolist()  # type: ignore[no-any-return]


def apply_matrix(matrix: FloatArray, xy: FloatArray) -> NDArray[np.float64]:
    """Maps points: `matrix` `(..., 2, 3)`, `xy` `(..., p, 2)`; `(..., p, 2)` float64."""
    matrix, xy = np.asarray(matrix, np.float64)[..., None, :, :], np.asarray(xy, np.float64)
    # products and sums one by one: a matrix product would round differently on other processors
    mapped: NDArray[np.float64] = xy[..., :1] * matrix[..., 0] + xy[..., 1:] * matrix[..., 1]
    mapped += matrix[..., 2]
    return mapped


def invert_matrix(matrix: FloatArray) -> NDArray[np.float64]:
    """The inverse maps of 2x3 matrices: `(..., 2, 3)` to `(..., 2, 3)` float64."""
    rows = []
    for a, b, c, d, e, f in np.asarray(matrix, np.float64).reshape(-1, 6).tolist():
        det = a * e - b * d
        rows.append((e / det, -b / det, (b * f - c * e) / det, -d / det, a / det, (c * d - a * f) / det))
    return np.array(rows, np.float64).reshape(np.shape(matrix))


def overlaps(boxes_xyxy: FloatArray, others_xyxy: FloatArray, of_smaller: bool = False) -> NDArray[np.float64]:
    """Intersection over union of each box `(n, 4)` with each other one `(m, 4)`, `(n, m)` float64.

    With `of_smaller` the intersection over the smaller of the two areas: 1 where one box lies in the other.
    """
    boxes, others = np.asarray(boxes_xyxy, np.float64)[:, None], np.asarray(others_xyxy, np.float64)[None]
    low, high = np.maximum(boxes[..., :2], others[..., :2]), np.minimum(boxes[..., 2:], others[..., 2:])
    common = np.clip(high - low, 0, None).prod(axis=-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(axis=-1) for b in (boxes, others)]
    shares: NDArray[np.float64] = common / (np.minimum(*areas) if of_smaller else areas[0] + areas[1] - common)
    return shares


def box_of_face(boxes_xyxy: NDArray[np.float64], xy: FloatArray) -> NDArray[np.float64] | None:
    """The one of a detector's boxes `(n, 4)` that is of a labelled face, `(4,)`: it overlaps most with the face's own.

    None where there is none: a box of somebody else's face, or of no face, is the detector's miss.
    """
    if not len(boxes_xyxy):
        return None
    own = len(xy) != POINTS
    shares = overlaps(boxes_xyxy, boxes_to_compare(xy)[None], of_smaller=own)[:, 0]
    best = int(shares.argmax())
    return boxes_xyxy[best] if shares[best] > (_COVERED if own else _SAME) else None


@dataclass(frozen=True)
class CropPlan:
    """How one crop is cut: what is read, and from where each of its pixels is sampled.

    Attributes:
        x0: the window that is read, in whole blocks, never empty: pixels `x0 <= x < x1`,
        y0: `y0 <= y < y1` of the image.
        x1: see `x0`.
        y1: see `y0`.
        block: side k of the blocks that are averaged first; 1 means none.
        source_from_crop: `(2, 3)` float64, pixels of the crop to blocks of the window.
    """

    x0: int
    y0: int
    x1: int
    y1: int
    block: int
    source_from_crop: NDArray[np.float64]


def crop_plan(matrix: FloatArray, size: int, size_hw: tuple[int, int]) -> CropPlan:
    """Plans one crop by the rule.

    The scale of the matrix is the square root of its determinant, so k is floor(side / size)
    where the square is larger than twice the crop, whatever its turn.

    Args:
        matrix: `(2, 3)`, `crop_from_image`.
        size: side of the crop.
        size_hw: the image's height and width.
    """
    (a, b, c), (d, e, f) = matrix.tolist()
    det = a * e - b * d
    # 1e-9: a square of exactly k times the crop must give k, whatever the rounding of its turn
    step = 1.0 / math.sqrt(abs(det)) + 1e-9
    k = math.floor(step) if step > 2.0 + 2e-9 else 1
    x = (e / det, -b / det, (b * f - c * e) / det)
    y = (-d / det, a / det, (c * d - a * f) / det)
    x0, x1 = _reach(x, size, k, size_hw[1])
    y0, y1 = _reach(y, size, k, size_hw[0])
    # block i covers pixels k i to k i + k - 1; its centre is pixel k i + (k - 1) / 2
    half = (k - 1) / 2
    source = [[x[0] / k, x[1] / k, (x[2] - x0 - half) / k], [y[0] / k, y[1] / k, (y[2] - y0 - half) / k]]
    return CropPlan(x0, y0, x1, y1, k, np.array(source))


def _reach(row: tuple[float, float, float], size: int, k: int, limit: int) -> tuple[int, int]:
    """First and last + 1 pixel along one axis of an image `limit` long that a crop reads."""
    u, v = row[0] * (size - 1), row[1] * (size - 1)
    # two blocks around: one that bilinear sampling touches, one for the rounding of positions
    low = (math.floor((row[2] + min(0.0, u) + min(0.0, v)) / k) - 2) * k
    high = (math.floor((row[2] + max(0.0, u) + max(0.0, v)) / k) + 3) * k
    low = min(max(low, 0), (limit - 1) // k * k)
    return low, min(max(high, low + k), limit)


def crop_from_window(
    luma: NDArray[np.uint8],
    plan: CropPlan,
    size: int,
    out: NDArray[np.uint8] | None = None,
    scratch: Scratch | None = None,
) -> NDArray[np.uint8]:
    """Samples one crop from the window of a grey image that its plan names.

    Args:
        luma: `(y1 - y0, x1 - x0)` uint8.
        plan: of `crop_plan`.
        size: side of the crop.
        out: `(size, size)` uint8, C-contiguous, written in place when given.
        scratch: working memory to use again.

    Returns:
        `(size, size)` uint8 (`out` when given).
    """
    return crop_from_bands(lambda x0, y0, x1, y1: luma[y0 - plan.y0 : y1 - plan.y0], plan, size, out, scratch)


def crop_from_bands(
    luma: Callable[[int, int, int, int], NDArray[np.uint8]],
    plan: CropPlan,
    size: int,
    out: NDArray[np.uint8] | None = None,
    scratch: Scratch | None = None,
) -> NDArray[np.uint8]:
    """As `crop_from_window`, from what gives a part of the image, as `Frame.luma` does.

    Where blocks are averaged it is asked for bands of the window, of about a million pixels or one row of blocks.
    """
    scratch, k, width = scratch or Scratch(), plan.block, plan.x1 - plan.x0
    if k == 1:
        source = luma(plan.x0, plan.y0, plan.x1, plan.y1)
    else:
        source = scratch.array("means", (-(-(plan.y1 - plan.y0) // k), -(-width // k)))
        rows = max(_BAND // (width * k), 1)
        for i in range(0, len(source), rows):
            y = plan.y0 + i * k
            band = luma(plan.x0, y, plan.x1, min(y + rows * k, plan.y1))
            _block_means(band, k, source[i : i + rows], scratch)
    return way_to_sample()(source, plan.source_from_crop, size, out, scratch)


def crop_from_luma(luma: NDArray[np.uint8], matrix: FloatArray, size: int) -> NDArray[np.uint8]:
    """One crop of a whole grey image: `(h, w)` uint8 and `(2, 3)` `crop_from_image` to `(size, size)` uint8."""
    plan = crop_plan(matrix, size, (luma.shape[0], luma.shape[1]))
    return crop_from_window(luma[plan.y0 : plan.y1, plan.x0 : plan.x1], plan, size)


@functools.cache
def way_to_sample() -> Callable[..., NDArray[np.uint8]]:
    """The fastest way in which the OpenCV that is here gives the rule's bits, found on a small picture.

    OpenCV 5's `warpAffine` does not, and a build with a vendor's kernels need not.
    """
    picture = (np.arange(40 * 56) * 97 % 251).astype(np.uint8).reshape(40, 56)
    turned = np.array([[0.8, -0.35, 3.3], [0.35, 0.8, -4.7]])
    upright = np.array([[0.73, 0, -2.2], [0, 0.73, 1.1]])
    size, scratch = 48, Scratch()
    wanted = [_by_numpy(picture, matrix, size, None, scratch) for matrix in (turned, upright)]
    for way in (_by_warp, _by_remap):
        if np.array_equal([way(picture, matrix, size, None, scratch) for matrix in (turned, upright)], wanted):
            return way
    warnings.warn(
        f"OpenCV {import_cv2().__version__} here samples otherwise than the models were trained with; crops are right, "
        "but cut in numpy, tens of times slower: the OpenCV of pip install opencv-python-headless is faster",
        KpWarning,
        stacklevel=3,
    )
    return _by_numpy


def _by_warp(
    source: NDArray[np.uint8], matrix: NDArray[np.float64], size: int, out: NDArray[np.uint8] | None, scratch: Scratch
) -> NDArray[np.uint8]:
    cv2 = import_cv2()
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    crop: NDArray[np.uint8] = cv2.warpAffine(
        source, matrix, (size, size), dst=out, flags=flags, borderMode=cv2.BORDER_REPLICATE
    )
    return crop


def _by_remap(
    source: NDArray[np.uint8], matrix: NDArray[np.float64], size: int, out: NDArray[np.uint8] | None, scratch: Scratch
) -> NDArray[np.uint8]:
    cv2 = import_cv2()
    pixels, weights = _fixed_point_maps(matrix, size, scratch)
    crop: NDArray[np.uint8] = cv2.remap(
        source, pixels, weights, cv2.INTER_LINEAR, dst=out, borderMode=cv2.BORDER_REPLICATE
    )
    return crop


def _by_numpy(
    source: NDArray[np.uint8], matrix: NDArray[np.float64], size: int, out: NDArray[np.uint8] | None, scratch: Scratch
) -> NDArray[np.uint8]:
    pixels, weights = _fixed_point_maps(matrix, size, scratch)
    rows, columns = ((pixels[..., i] + np.array([[[0]], [[1]]])).clip(0, source.shape[1 - i] - 1) for i in (1, 0))
    right, low = weights & 31, weights >> 5
    upper, lower = (source[row, columns[0]] * (32 - right) + source[row, columns[1]] * right for row in rows)
    grey = (upper * (32 - low).astype(np.int32) + lower * low.astype(np.int32) + 512) >> 10
    crop = np.empty((size, size), np.uint8) if out is None else out
    crop[:] = grey
    return crop


def _fixed_point_maps(
    source_from_crop: NDArray[np.float64], size: int, scratch: Scratch
) -> tuple[NDArray[np.int16], NDArray[np.uint16]]:
    """Where `warpAffine` of OpenCV 4 samples, as `remap` takes it; `preprocess.cu` has the formula.

    Args:
        source_from_crop: as `CropPlan`'s.
        size: side of the crop.
        scratch: working memory that the result lies in.

    Returns:
        Of each pixel of the crop the upper left of the four pixels that it is sampled from, `(size, size, 2)` int16, x
        then y, and the weights of the right and the lower ones in 32nds, x + 32 y, `(size, size)` uint16.
    """
    steps, along = 1024 * source_from_crop, np.arange(size)
    upright = not steps[0, 1] and not steps[1, 0]  # then x is the same in all rows, and y in all columns
    by_column, by_row = (
        np.rint(np.clip(position, -_FAR, _FAR)).astype(np.int32)
        for position in (steps[:, :1] * along, steps[:, 1:2] * along + steps[:, 2:])
    )
    by_row += 16
    x = by_column[0] + by_row[0, : 1 if upright else None, None]
    y = by_column[1, : 1 if upright else None] + by_row[1, :, None]
    pixels = scratch.array("pixels", (size, size, 2), np.int16)
    weights = scratch.array("weights", (size, size), np.uint16)
    for i, position in enumerate((x, y)):
        np.clip(position, -_FAR, _FAR, out=position)
        np.right_shift(position, 10, out=pixels[..., i], casting="unsafe")
    x >>= 5
    x &= 31
    y &= 31 << 5
    np.bitwise_or(x, y, out=weights, casting="unsafe")
    return pixels, weights


def _block_means(luma: NDArray[np.uint8], k: int, means: NDArray[np.uint8], scratch: Scratch) -> None:
    """Means of whole k x k blocks, rounded half up, the edge repeated to fill the last ones.

    In integers, so that every processor gives the same. OpenCV's area resizing does that for 2 x 2 blocks
    (none of 1.6 million differed from this rule on x86-64 nor on emulated aarch64), not for larger ones.
    """
    height, width = luma.shape
    if height % k or width % k:
        whole = scratch.array("whole", (height + -height % k, width + -width % k))
        whole[:height, :width] = luma
        whole[height:, :width] = luma[-1]
        whole[:, width:] = whole[:, width - 1 : width]
        luma = whole
    if k == 2 and _halves_exactly():
        _halved(luma, means)
    else:
        _integer_means(luma, k, means, scratch)


@functools.cache
def _halves_exactly() -> bool:
    """Whether the OpenCV that is here gives the rule's means of 2 x 2 blocks, found on a small picture."""
    picture = (np.arange(40 * 56) ** 3 % 1013 % 256).astype(np.uint8).reshape(40, 56)  # all levels
    found, wanted = np.empty((2, 20, 28), np.uint8)
    _halved(picture, found)
    _integer_means(picture, 2, wanted, Scratch())
    return np.array_equal(found, wanted)


def _halved(luma: NDArray[np.uint8], means: NDArray[np.uint8]) -> None:
    cv2 = import_cv2()
    cv2.resize(luma, means.shape[::-1], dst=means, interpolation=cv2.INTER_AREA)


def _integer_means(luma: NDArray[np.uint8], k: int, means: NDArray[np.uint8], scratch: Scratch) -> None:
    height, width = means.shape
    # the sum of a white block and the rounding must fit
    wide = np.uint16 if k < 16 else np.uint32 if k <= 4096 else np.uint64
    rows = scratch.array("rows", (height, width * k), wide)
    np.copyto(rows, luma[::k])
    for i in range(1, k):
        rows += luma[i::k]
    sums = scratch.array("sums", (height, width), wide)
    np.copyto(sums, rows[:, ::k])
    for i in range(1, k):
        sums += rows[:, i::k]
    sums += k * k // 2
    sums //= k * k
    np.copyto(means, sums, casting="unsafe")
