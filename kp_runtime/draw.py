"""Keypoints drawn on an image, sized to the face, with sub-pixel positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kp_runtime.errors import InputError
from kp_runtime.frame import Frame, bgr_copy, import_cv2
from kp_runtime.geometry import point_array
from kp_runtime.scheme68 import CONTOURS, POINTS

__all__ = ["draw_keypoints", "put_boxes", "put_keypoints", "put_label"]

_TINY = 60  # a face's pixels up to which edged points would hide it
_SHIFT = 4  # OpenCV's drawing takes positions in sixteenths of a pixel
_LINE, _POINT, _BOX, _EDGE = (208, 224, 64), (255, 255, 255), (96, 96, 240), (32, 32, 32)


def draw_keypoints(
    image: Frame | NDArray[Any], xy: ArrayLike, *, lines: bool = True, color: tuple[int, int, int] = _LINE
) -> NDArray[np.uint8]:
    """Draws contours and points on a copy of an image.

    Args:
        image: `(h, w, 3)` uint8 BGR, with a fourth channel that is left out, or grey, or a `Frame`; not changed.
        xy: `(n, 68, 2)` float, pixels of the image; `n` may be 0. Of another number of points, only points are drawn.
        lines: draw the contours too.
        color: of the contours, BGR, whole numbers from 0 to 255.

    Returns:
        `(h, w, 3)` uint8 BGR, a new array.

    Raises:
        ImageError: not an image.
        InputError: not points, points that are not finite, or no such colour.
        MissingExtraError: OpenCV is not installed.
    """
    canvas = bgr_copy(image)
    put_keypoints(canvas, xy, lines=lines, color=color)
    return canvas


def put_keypoints(
    canvas: NDArray[np.uint8], xy: ArrayLike, *, lines: bool = True, color: tuple[int, int, int] = _LINE
) -> None:
    """Draws contours and points on `(h, w, 3)` uint8 BGR itself; see `draw_keypoints`."""
    cv2, points = import_cv2(), point_array(xy)
    bgr = _checked(color)
    if points.size == 0:
        return
    if points.ndim not in (2, 3) or points.shape[-1] != 2 or not np.isfinite(points).all():
        raise InputError(f"keypoints must be finite numbers (n, {POINTS}, 2), got shape {points.shape}")
    for face in points.reshape(-1, *points.shape[-2:]):
        # no thicker on a face that is larger than the picture
        extent = min(float(np.ptp(face, axis=0).max()), max(canvas.shape))
        # positions far outside a huge face would overflow OpenCV's integers
        fixed = np.clip(np.rint(face * 2**_SHIFT), -(2**26), 2**26).astype(np.int32)
        if lines and len(face) == POINTS:
            contours = [fixed[list(indices)] for indices in CONTOURS.values()]
            cv2.polylines(canvas, contours, False, bgr, max(1, round(extent / 220)), cv2.LINE_AA, _SHIFT)
        radius = max(0.5, extent / 110)
        edged = ((_EDGE, radius + max(0.7, extent / 400)), (_POINT, radius))  # to be seen on white, too
        for shade, size in edged if extent > _TINY else ((bgr, radius),):
            for x, y in fixed.tolist():
                cv2.circle(canvas, (x, y), round(size * 2**_SHIFT), shade, -1, cv2.LINE_AA, _SHIFT)


def _checked(color: Sequence[SupportsIndex]) -> tuple[int, ...]:
    """A colour for OpenCV, which takes no numbers of NumPy."""
    try:
        bgr = tuple(index(value) for value in color)
    except TypeError:
        bgr = ()
    if len(bgr) != 3 or not all(0 <= value <= 255 for value in bgr):
        raise InputError(f"a colour is three whole numbers from 0 to 255, blue, green and red, got {color!r:.40}")
    return bgr


def put_boxes(canvas: NDArray[np.uint8], boxes_xyxy: ArrayLike) -> None:
    """Draws boxes `(n, 4)`, finite pixels, on `(h, w, 3)` uint8 BGR itself."""
    cv2 = import_cv2()
    for box in np.asarray(boxes_xyxy, np.float64).reshape(-1, 4):
        x0, y0, x1, y1 = np.rint(np.clip(box, -(2**20), 2**20)).astype(int).tolist()
        half = round(min(x1 - x0, canvas.shape[1]) / 300)
        rim = half + max(1, half)
        for out in range(-rim, rim + 1):  # OpenCV's own thick lines are off by a pixel
            cv2.rectangle(canvas, (x0 - out, y0 - out), (x1 + out, y1 + out), _BOX if abs(out) <= half else _EDGE)


def put_label(canvas: NDArray[np.uint8], text: str, box_xyxy: ArrayLike) -> None:
    """Writes ASCII text above a box `(4,)`, finite pixels, in its size, on `(h, w, 3)` uint8 BGR itself."""
    cv2 = import_cv2()
    x0, y0, x1, _ = np.clip(np.asarray(box_xyxy, np.float64), -(2**20), 2**20).tolist()
    scale = min(max(min(x1 - x0, canvas.shape[1]) / 250, 0.35), 4)
    width = max(1, round(2 * scale))
    at = max(round(x0), 0), max(round(y0 - 8 * scale), math.ceil(22 * scale) + width + 2)  # on the picture
    for shade, thickness in ((_EDGE, width + max(2, width)), (_POINT, width)):
        cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, shade, thickness, cv2.LINE_AA)
