"""Keypoints drawn on an image, sized to the face, with sub-pixel positions."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kp_runtime.frame import import_cv2
from kp_runtime.scheme68 import CONTOURS, POINTS

__all__ = ["draw_boxes", "draw_keypoints"]

_SHIFT = 4  # OpenCV's drawing takes positions in sixteenths of a pixel
_LINE, _POINT = (208, 224, 64), (255, 255, 255)


def draw_keypoints(
    image: NDArray[np.uint8], xy: ArrayLike, *, lines: bool = True, color: tuple[int, int, int] = _LINE
) -> NDArray[np.uint8]:
    """Draws contours and points.

    Args:
        image: `(h, w, 3)` uint8 BGR, or grey `(h, w)`; not changed.
        xy: `(n, 68, 2)` float, pixels of the image; `n` may be 0. Of another number of points, only points are drawn.
        lines: draw the contours too.
        color: of the contours, BGR.

    Returns:
        `(h, w, 3)` uint8 BGR, a new array.
    """
    cv2 = import_cv2()
    canvas = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR) if image.ndim == 2 else image[:, :, :3].copy()
    points = np.asarray(xy, np.float64)
    if points.size == 0:
        return canvas
    for face in points.reshape(-1, *points.shape[-2:]):
        # no thicker on a face that is larger than the picture
        extent = min(float(np.ptp(face, axis=0).max()), max(canvas.shape))
        # positions far outside a huge face would overflow OpenCV's integers
        fixed = np.clip(np.rint(face * 2**_SHIFT), -(2**26), 2**26).astype(np.int32)
        if lines and len(face) == POINTS:
            contours = [fixed[list(indices)] for indices in CONTOURS.values()]
            cv2.polylines(canvas, contours, False, color, max(1, round(extent / 220)), cv2.LINE_AA, _SHIFT)
        radius = max(1.0, extent / 110)
        for x, y in fixed.tolist():
            cv2.circle(canvas, (x, y), round(radius * 2**_SHIFT), _POINT, -1, cv2.LINE_AA, _SHIFT)
    return canvas


def draw_boxes(image: NDArray[np.uint8], boxes_xyxy: ArrayLike) -> NDArray[np.uint8]:
    """Draws boxes `(n, 4)` on a copy of a BGR image."""
    cv2 = import_cv2()
    canvas = image.copy()
    for box in np.asarray(boxes_xyxy, np.float64).reshape(-1, 4):
        x0, y0, x1, y1 = np.rint(np.clip(box, -(2**20), 2**20)).astype(int).tolist()
        width = max(1, round(min(x1 - x0, canvas.shape[1]) / 150))
        cv2.rectangle(canvas, (x0, y0), (x1, y1), (96, 96, 240), width, cv2.LINE_AA)
    return canvas
