"""Every tolerance of the tests, by name, in pixels or grey levels, with its reason."""

from __future__ import annotations

import numpy as np

FP32_PX = 0.01
"""ONNX fp32 against PyTorch: the same arithmetic in another order, positions up to 224."""

FP16_PX = 0.5
"""ONNX fp16 against PyTorch at the worst point: float16 keeps 11 bits of each activation."""

CROP_GREY = 2.0
"""A crop against the float64 reference: OpenCV samples at 1/32 px and rounds its weights."""

CROP_GREY_MEAN = 0.3
"""The same on the average over a crop."""

MAP_PX = 1e-3
"""There and back through a crop matrix in float64, the result rounded to float32."""


def assert_close(got: np.ndarray, wanted: np.ndarray, most: float, what: str) -> None:
    """Fails with the largest and the mean difference."""
    difference = np.abs(np.asarray(got, np.float64) - np.asarray(wanted, np.float64))
    worst, mean = float(difference.max(initial=0)), float(difference.mean()) if difference.size else 0.0
    assert worst <= most, f"{what}: largest difference {worst:.5g}, mean {mean:.5g}, allowed {most:g}"
