"""The crop rule once more, in float64 and numpy alone, straight from its wording in `geometry`.

Shares no code with `kp_runtime`: what the run-time computes is held against this.
"""

from __future__ import annotations

import math

import numpy as np


def reference_crop(luma: np.ndarray, box: np.ndarray, size: int, margin: float, angle: float = 0.0) -> np.ndarray:
    """`(size, size)` float64: the box's square of a grey image, before any rounding."""
    x0, y0, x1, y1 = (float(value) for value in box)
    side = margin * max(x1 - x0, y1 - y0)
    k = math.floor(side / size) if side > 2 * size else 1
    means = reference_blocks(luma, k)
    u, v = np.meshgrid(np.arange(size) - (size - 1) / 2, np.arange(size) - (size - 1) / 2)
    c, s = side / size * math.cos(angle), side / size * math.sin(angle)
    x = (x0 + x1) / 2 + c * u - s * v
    y = (y0 + y1) / 2 + s * u + c * v
    return bilinear(means, (x - (k - 1) / 2) / k, (y - (k - 1) / 2) / k)


def reference_blocks(luma: np.ndarray, k: int) -> np.ndarray:
    """Means of k x k blocks from the top-left; beyond the image the edge counts again."""
    height, width = luma.shape
    rows = np.minimum(np.arange(-(-height // k) * k), height - 1)
    columns = np.minimum(np.arange(-(-width // k) * k), width - 1)
    full = luma.astype(np.float64)[rows][:, columns]
    return sum(full[i::k, j::k] for i in range(k) for j in range(k)) / k**2


def bilinear(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Samples at any positions; outside, the nearest edge pixel."""
    height, width = image.shape
    x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, below = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    fx, fy = x - left, y - top
    upper = image[top, left] * (1 - fx) + image[top, right] * fx
    lower = image[below, left] * (1 - fx) + image[below, right] * fx
    return upper * (1 - fy) + lower * fy


def reference_bits(source: np.ndarray, source_from_crop: np.ndarray, size: int) -> np.ndarray:
    """`(size, size)` uint8: what OpenCV 4's `warpAffine` samples, in integers (`preprocess.cu`)."""
    m = 1024 * source_from_crop
    u = v = np.arange(size)
    height, width = source.shape
    sides = []
    for row, last in ((m[0], width - 1), (m[1], height - 1)):
        position = (np.rint(row[0] * u) + np.rint(row[1] * v + row[2])[:, None] + 16).astype(np.int64)
        first = position >> 10
        sides.append((first.clip(0, last), (first + 1).clip(0, last), position >> 5 & 31))
    (left, right, weight_x), (top, below, weight_y) = sides
    grey = source.astype(np.int64)
    upper = grey[top, left] * (32 - weight_x) + grey[top, right] * weight_x
    lower = grey[below, left] * (32 - weight_x) + grey[below, right] * weight_x
    return ((upper * (32 - weight_y) + lower * weight_y + 512) >> 10).astype(np.uint8)


def reference_luma(bgr: np.ndarray) -> np.ndarray:
    """BT.601 luma of `(h, w, 3)` BGR in OpenCV's 15-bit integers (`color_rgb.simd.hpp`, RGB2Gray<uchar>)."""
    b, g, r = (bgr[..., i].astype(np.int64) for i in range(3))
    return ((b * 3735 + g * 19235 + r * 9798 + (1 << 14)) >> 15).astype(np.uint8)


def waves(height: int, width: int, period: float) -> np.ndarray:
    """A smooth uint8 picture with detail in every direction; `period` in pixels."""
    y, x = np.mgrid[:height, :width] * (2 * np.pi / period)
    return (127.5 + 60 * np.sin(x + 0.3 * y) + 60 * np.cos(y - 0.2 * x)).astype(np.uint8)
