"""The way from an image and face boxes to keypoints, composed of the other modules in order."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kp_runtime.backend import Backend, open_backend
from kp_runtime.errors import BoxError
from kp_runtime.frame import Frame, as_frame
from kp_runtime.geometry import apply_matrix, invert_matrix, matrices_from_boxes
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.results import Keypoints
from kp_runtime.spec import ModelSpec
from kp_runtime.timing import StageTimer

__all__ = ["Model", "checked_boxes", "load"]


class Model:
    """A loaded model: `model(image, boxes_xyxy)` gives `Keypoints`.

    May be called from several threads when its backend may (ONNX Runtime on the CPU may).
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @property
    def spec(self) -> ModelSpec:
        """The model's contract."""
        return self.backend.spec

    def warmup(self, faces: int = 1) -> None:
        """Makes calls with up to `faces` faces find everything ready; see `Backend.warmup`."""
        self.backend.warmup(faces)

    def __call__(
        self,
        image: Frame | NDArray[np.uint8],
        boxes_xyxy: ArrayLike,
        *,
        layout: str = "bgr",
        timer: StageTimer | None = None,
    ) -> Keypoints:
        """Finds the 68 keypoints of each face.

        Args:
            image: a `Frame`, or uint8 `(h, w, 3)`, `(h, w, 4)` or grey `(h, w)`.
            boxes_xyxy: `(n, 4)` float, x0, y0, x1, y1 in pixels of the image, tight around the
                68 points (brows to chin), as the detectors of `kp_runtime` give them; `n` may be 0.
            layout: channel order of a colour array, `bgr` as OpenCV reads or `rgb`.
            timer: collects the times of the stages crop, infer, map back.

        Raises:
            ImageError: an image that is not taken.
            BoxError: a box that is not finite, has no size, or does not touch the image.
            BackendError: the engine failed.
        """
        stage: Any = timer or _no_timer
        frame = as_frame(image, layout)
        boxes = checked_boxes(boxes_xyxy, frame.size_hw)
        with stage("crop"):
            matrices = matrices_from_boxes(boxes, self.spec.size, self.spec.margin)
            crops = crops_from_frame(frame, matrices, self.spec.size)
        with stage("infer"):
            xy_crop = self.backend.infer(crops)
        with stage("map back"):
            xy = apply_matrix(invert_matrix(matrices), xy_crop).astype(np.float32)
        return Keypoints(xy, boxes, matrices, frame.size_hw)


def load(
    bundle: str | os.PathLike[str], backend: str = "auto", threads: int | None = None, *, precision: str = "auto"
) -> Model:
    """Opens a bundle; see `backend.open_backend` for the arguments and errors."""
    return Model(open_backend(bundle, backend, precision, threads))


def checked_boxes(boxes_xyxy: ArrayLike, size_hw: tuple[int, int]) -> NDArray[np.float64]:
    """Boxes as `(n, 4)` float64, or the error that names the first bad one."""
    try:
        boxes = np.asarray(boxes_xyxy, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise BoxError(f"boxes must be numbers, (n, 4) as x0, y0, x1, y1: {error}") from error
    if boxes.size == 0:
        return np.empty((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise BoxError(
            f"boxes must be (n, 4) as x0, y0, x1, y1, got shape {boxes.shape}; one box is [[x0, y0, x1, y1]]"
        )
    height, width = size_hw
    finite = np.asarray(np.isfinite(boxes).all(axis=1))
    # a box that is not finite is told of first; the other checks must not warn about its numbers
    x0, y0, x1, y1 = np.clip(np.where(finite[:, None], boxes, 0), -1e300, 1e300).T
    for bad, reason in (
        (~finite, "is not finite"),
        (~((x1 - x0 >= 1) & (y1 - y0 >= 1)), "is under one pixel wide or high (the order is x0, y0, x1, y1)"),
        ((x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height), f"lies outside the {width} x {height} image"),
        (np.maximum(x1 - x0, y1 - y0) > 100 * max(size_hw), "is over 100 times the image"),
    ):
        if bad.any():
            i = int(np.argmax(bad))
            raise BoxError(f"box {i} {boxes[i].tolist()} {reason}; check the detector or the box's frame of reference")
    return boxes


def _no_timer(stage: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()
