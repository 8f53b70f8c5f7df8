"""The way from an image and face boxes to keypoints, composed of the other modules in order."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kp_runtime.backend import Backend, open_backend
from kp_runtime.default_model import default_bundle
from kp_runtime.errors import BoxError, InputError
from kp_runtime.frame import Frame, Scratch, as_frame
from kp_runtime.geometry import apply_matrix, invert_matrix, matrices_from_boxes
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.results import Keypoints
from kp_runtime.spec import ModelSpec
from kp_runtime.timing import StageTimer

__all__ = ["Model", "checked_boxes", "load"]


class Model:
    """A loaded model: `model(image, boxes_xyxy)` gives `Keypoints`.

    May be called from several threads when its backend may (ONNX Runtime on the CPU may). Each
    thread keeps the working memory of its largest call (a crop of every face, the grey levels of the
    largest face) and uses it again; a result is the caller's own.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._threads = threading.local()

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
        out: NDArray[np.float32] | None = None,
    ) -> Keypoints:
        """Finds the 68 keypoints of each face.

        Args:
            image: a `Frame`, or uint8 `(h, w, 3)`, `(h, w, 4)` or grey `(h, w)`.
            boxes_xyxy: `(n, 4)` float, x0, y0, x1, y1 in pixels of the image, tight around the
                68 points (brows to chin), as the detectors of `kp_runtime` give them; `n` may be 0.
            layout: channel order of a colour array, `bgr` as OpenCV reads or `rgb`.
            timer: collects the times of the stages crop, infer, map back.
            out: `(n, 68, 2)` float32, becomes the result's `xy`: a loop can use it again.

        Raises:
            InputError: `out` has another shape or dtype.
            ImageError: an image that is not taken.
            BoxError: a box that is not finite, has no size, or does not touch the image.
            BackendError: the engine failed.
        """
        stage: Any = timer or _no_timer
        frame = as_frame(image, layout)
        boxes = checked_boxes(boxes_xyxy, frame.size_hw)
        size, n = self.spec.size, len(boxes)
        if out is not None and (out.shape != (n, self.spec.points, 2) or out.dtype != np.float32):
            raise InputError(f"out must be float32 ({n}, {self.spec.points}, 2), got {out.dtype} {out.shape}")
        scratch = self._scratch()
        with stage("crop"):
            matrices = matrices_from_boxes(boxes, size, self.spec.margin)
            crops = crops_from_frame(frame, matrices, size, scratch.array("crops", (n, 1, size, size)), scratch)
        with stage("infer"):
            xy_crop = self.backend.infer(crops)
        with stage("map back"):
            xy = np.empty(xy_crop.shape, np.float32) if out is None else out
            xy[...] = apply_matrix(invert_matrix(matrices), xy_crop)
        return Keypoints(xy, boxes, matrices, frame.size_hw)

    def _scratch(self) -> Scratch:
        """This thread's working memory."""
        found: Scratch | None = getattr(self._threads, "scratch", None)
        if found is None:
            found = self._threads.scratch = Scratch()
        return found


def load(
    bundle: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    threads: int | None = None,
    *,
    precision: str = "auto",
    public_key: str | os.PathLike[str] | bytes | None = None,
    golden: bool = True,
) -> Model:
    """Opens a bundle; see `backend.open_backend` for the arguments and errors.

    Without one it is the default model's: what `KP_MODEL` names, else the installed model wheel
    (`pip install 'kp-edge[model]'`), else a `BundleError`; see `default_model.default_bundle`.
    """
    found = default_bundle() if bundle is None else bundle
    return Model(open_backend(found, backend, precision, threads, public_key, golden=golden))


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
    for i, box in enumerate(boxes.tolist()):
        if reason := _box_fault(box, size_hw):
            raise BoxError(f"box {i} {box} {reason}; check the detector or the box's frame of reference")
    return boxes


def _box_fault(box: list[float], size_hw: tuple[int, int]) -> str | None:
    """What is wrong with a box; plain numbers cost a tenth of what small arrays do."""
    x0, y0, x1, y1 = box
    height, width = size_hw
    if not all(map(math.isfinite, box)):
        return "is not finite"
    if not (x1 - x0 >= 1 and y1 - y0 >= 1):
        return "is under one pixel wide or high (the order is x0, y0, x1, y1)"
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        return f"lies outside the {width} x {height} image"
    if max(x1 - x0, y1 - y0) > 100 * max(height, width):
        return "is over 100 times the image"
    return None


def _no_timer(stage: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()
