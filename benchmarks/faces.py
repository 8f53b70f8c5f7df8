"""The faces that every benchmark feeds: one portrait, cut out a little differently each time.

Real grey levels matter: a network of zeros multiplies zeros, and some engines are faster at that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kp_runtime.errors import MissingExtraError
from kp_runtime.frame import as_frame, image_from_file
from kp_runtime.geometry import matrices_from_boxes
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.spec import ModelSpec

__all__ = ["BOX_XYXY", "picture", "portrait", "varied_crops"]

BOX_XYXY = (181.0, 88.0, 269.0, 178.0)
"""Around the 68 points of the portrait's face, read off the picture."""


def portrait() -> NDArray[np.uint8]:
    """Scikit-image's portrait of Eileen Collins (NASA, public domain): `(512, 512, 3)` uint8, BGR."""
    return image_from_file(picture("astronaut.png"))


def picture(name: str) -> Path:
    """The file of a photograph that scikit-image carries.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """
    try:
        import skimage
    except ImportError as error:
        raise MissingExtraError("scikit-image", "bench", "the benchmarks' photographs") from error
    return Path(skimage.__file__).parent / "data" / name


def varied_crops(count: int, spec: ModelSpec) -> NDArray[np.uint8]:
    """Crops of the portrait's face with small shifts, turns and scales, no two alike.

    Returns:
        `(count, 1, size, size)` uint8, luma.
    """
    rng = np.random.default_rng(68)
    matrices = matrices_from_boxes(
        np.tile(BOX_XYXY, (count, 1)),
        spec.size,
        spec.margin,
        angle=rng.uniform(-0.2, 0.2, count),
        shift=rng.uniform(-0.05, 0.05, (count, 2)),
        zoom=rng.uniform(0.9, 1.15, count),
    )
    return crops_from_frame(as_frame(portrait()), matrices, spec.size)
