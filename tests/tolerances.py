"""Every tolerance of the tests, by name, in pixels or grey levels, with its reason."""

from __future__ import annotations

import numpy as np

FP32_PX = 0.01
"""ONNX fp32 against PyTorch: the same arithmetic in another order, positions up to 224."""

FP16_PX = 0.5
"""ONNX fp16 against PyTorch at the worst point: float16 keeps 11 bits of each activation."""

CROP_GREY = 1.75
"""A crop of a smooth picture against the float64 reference: OpenCV samples at 1/32 px; block and crop are rounded."""

CROP_GREY_MEAN = 0.4
"""The same on the average over a crop: rounding to whole grey levels alone gives 0.25."""

CROP_NOISE = 9.0
"""The same on white noise: at most 1/64 px off along each axis, 255 levels a pixel, and both roundings."""

CROP_NOISE_MEAN = 1.3
"""The same on the average: two noise pixels are 85 levels apart on the average; a shift by 0.05 px would give 4."""

GPU_CROP_GREY = 0
"""A crop on the GPU against the CPU path: both are the same integers."""

GPU_PX = 0.1
"""Keypoints of the GPU's crops against those of the CPU path's, pixels of the image; equal crops give 0."""

MAP_PX = 1e-3
"""There and back through a crop matrix in float64, the result rounded to float32."""

PACKED_LEVELS = 2.0
"""Mean grey levels between crops of a photo and of its packed copy: WebP of quality 92."""

PACKED_PX = 0.01
"""Pixels of a crop between their points: the packed labels have three decimals."""


def assert_close(got: np.ndarray, wanted: np.ndarray, most: float, what: str) -> None:
    """Fails with the largest and the mean difference."""
    difference = np.abs(np.asarray(got, np.float64) - np.asarray(wanted, np.float64))
    worst, mean = float(difference.max(initial=0)), float(difference.mean()) if difference.size else 0.0
    assert worst <= most, f"{what}: largest difference {worst:.5g}, mean {mean:.5g}, allowed {most:g}"
