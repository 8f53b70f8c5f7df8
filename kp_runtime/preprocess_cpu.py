"""Crops on the CPU: a frame and crop matrices in, the network's input out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kp_runtime.frame import Frame, Scratch
from kp_runtime.geometry import crop_from_window, crop_plan

__all__ = ["crops_from_frame"]


def crops_from_frame(
    frame: Frame,
    crop_from_image: NDArray[np.floating],
    size: int,
    out: NDArray[np.uint8] | None = None,
    scratch: Scratch | None = None,
) -> NDArray[np.uint8]:
    """Cuts all faces of a frame by the crop rule (`geometry`).

    Only the part of the frame that a crop reads is turned grey.

    Args:
        frame: the image.
        crop_from_image: `(n, 2, 3)` float64.
        size: side of a crop in pixels.
        out: `(n, 1, size, size)` uint8, C-contiguous, filled when given.
        scratch: working memory to use again.

    Returns:
        `(n, 1, size, size)` uint8 (`out` when given).
    """
    crops = np.empty((len(crop_from_image), 1, size, size), np.uint8) if out is None else out
    scratch = scratch or Scratch()
    for matrix, crop in zip(crop_from_image, crops, strict=True):
        plan = crop_plan(matrix, size, frame.size_hw)
        luma = frame.luma(plan.x0, plan.y0, plan.x1, plan.y1, scratch)
        crop_from_window(luma, plan, size, crop[0], scratch)
    return crops
