"""Crops on the CPU: a frame and crop matrices in, the network's input out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kp_runtime.frame import Frame
from kp_runtime.geometry import crop_from_luma, crop_window

__all__ = ["crops_from_frame"]


def crops_from_frame(
    frame: Frame,
    crop_from_image: NDArray[np.floating],
    size: int,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Cuts all faces of a frame by the crop rule (`geometry`).

    Only the part of the frame that a crop reads is turned grey.

    Args:
        frame: the image.
        crop_from_image: `(n, 2, 3)` float64.
        size: side of a crop in pixels.
        out: `(n, 1, size, size)` uint8, C-contiguous, filled when given.

    Returns:
        `(n, 1, size, size)` uint8 (`out` when given).
    """
    crops = np.empty((len(crop_from_image), 1, size, size), np.uint8) if out is None else out
    for matrix, crop in zip(crop_from_image, crops, strict=True):
        window = crop_window(matrix, size, frame.size_hw)
        luma = frame.luma(window.x0, window.y0, window.x1, window.y1)
        crop_from_luma(luma, matrix, size, origin_xy=(window.x0, window.y0), out=crop[0])
    return crops
