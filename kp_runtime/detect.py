"""Face boxes: OpenCV's Haar cascade (comes with OpenCV 4), or YuNet when its model file is given.

Detectors draw their boxes each in its own way. A model wants the tight box of the 68 points, so
each detector here carries a `BoxMap`, fitted on training faces by `scripts/fit_box_maps.py`, and
gives boxes in that one convention.
"""

from __future__ import annotations

import math
import os
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, SupportsFloat, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from kp_runtime.errors import BackendError, InputError, reason_of
from kp_runtime.files import as_path
from kp_runtime.frame import Frame, as_frame, bgr_copy, cv2_name, import_cv2
from kp_runtime.spec import ModelSpec

__all__ = [
    "BoxMap",
    "Detector",
    "HaarDetector",
    "YuNetDetector",
    "box_advice",
    "check_score",
    "check_smallest",
    "largest_first",
    "map_from_pairs",
]


@dataclass(frozen=True)
class BoxMap:
    """A detector's box to the tight box of the 68 points.

    All in widths and heights of the detector's box: where the new centre lies from the old
    one, and the new size.
    """

    dx: float
    dy: float
    width: float
    height: float

    def apply(self, boxes_xyxy: NDArray[np.floating]) -> NDArray[np.float64]:
        """`(n, 4)` boxes of the detector to `(n, 4)` float64 boxes of the keypoints."""
        boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
        size = boxes[:, 2:] - boxes[:, :2]
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + size * (self.dx, self.dy)
        half = size * (self.width, self.height) / 2
        return np.concatenate([centre - half, centre + half], axis=1)


def map_from_pairs(detected: NDArray[np.floating], wanted: NDArray[np.floating]) -> BoxMap:
    """The `BoxMap` of matched boxes, both `(n, 4)`: medians, so that a false match does no harm."""
    size = detected[:, 2:] - detected[:, :2]
    offset = ((wanted[:, :2] + wanted[:, 2:]) - (detected[:, :2] + detected[:, 2:])) / 2 / size
    factor = (wanted[:, 2:] - wanted[:, :2]) / size
    dx, dy, width, height = np.median(np.concatenate([offset, factor], axis=1), axis=0).round(4).tolist()
    return BoxMap(dx, dy, width, height)


def box_advice(spec: ModelSpec) -> str | None:
    """What to tell where a detector's boxes need not be those that a model was trained with."""
    if spec.scheme != "own" or spec.box != "keypoints":
        return None
    return (
        f"detectors give the tight box of 68 points, this model wants that of its own {spec.points}: where these span "
        "less of a face, give boxes (docs/own_points.md)"
    )


class Detector(Protocol):
    """Finds the faces of an image. Those of this project may be shared between threads."""

    def __call__(self, image: Frame | NDArray[Any], layout: str = "bgr") -> NDArray[np.float64]:
        """`(n, 4)` float64 boxes, tight around the 68 points, largest face first.

        Args:
            image: a `Frame`, or uint8 `(h, w, 3)`, `(h, w, 4)` or grey `(h, w)`.
            layout: channel order of a colour array, `bgr` or `rgb`.
        """
        ...


class _OpenCvDetector(ABC):
    """A detector of OpenCV's, which keeps what it works on: threads take turns."""

    BOX_MAP: BoxMap

    def __init__(self) -> None:
        self._cv2 = import_cv2()
        self._process, self._turn = os.getpid(), threading.Lock()

    def __call__(self, image: Frame | NDArray[Any], layout: str = "bgr") -> NDArray[np.float64]:
        """Finds the faces of an image.

        Args:
            image: a `Frame`, or uint8 `(h, w, 3)`, `(h, w, 4)` or grey `(h, w)`.
            layout: channel order of a colour array, `bgr` or `rgb`.

        Returns:
            `(n, 4)` float64 boxes, x0, y0, x1, y1 in pixels of the image, tight around the 68 points, largest face
            first; `(0, 4)` where there is none.

        Raises:
            ImageError: an image that is not taken.
            BackendError: OpenCV failed.
        """
        frame = as_frame(image, layout)
        if os.getpid() != self._process:  # forked, maybe while another thread had its turn
            self._process, self._turn = os.getpid(), threading.Lock()
        with self._turn:
            try:
                boxes = self.raw(frame)
            except self._cv2.error as error:
                height, width = frame.size_hw
                raise BackendError(f"OpenCV can't find faces on {width} x {height} px: {reason_of(error)}") from error
        return largest_first(self.BOX_MAP.apply(boxes), frame)

    @abstractmethod
    def raw(self, frame: Frame) -> NDArray[np.float64]:
        """The detector's own boxes, `(n, 4)` x0, y0, x1, y1; one thread at a time."""


_HAAR_SUMS = 1 << 28
"""Pixels at all sizes that are looked at, in OpenCV's table of sums. It is as wide as the widest frame that a cascade
has seen, and high enough for the highest: of a high and a wide one OpenCV's counts of 31 bits end the process."""


class HaarDetector(_OpenCvDetector):
    """OpenCV's frontal face cascade (Viola and Jones 2001), the file that OpenCV 4 carries.

    Args:
        scale: factor between two sizes that are looked for.
        neighbors: how many raw hits make a face.
        smallest: least side of a raw box, as a share of the image's shorter side.

    Raises:
        BackendError: this OpenCV has no cascades (OpenCV 5 dropped them).
        InputError: an argument is out of range.
        MissingExtraError: OpenCV is not installed.
    """

    BOX_MAP = BoxMap(dx=0.0057, dy=0.1518, width=0.8605, height=0.8288)

    def __init__(self, scale: float = 1.1, neighbors: int = 5, smallest: float = 0.05) -> None:
        super().__init__()
        check_smallest(smallest)
        if not (
            isinstance(scale, SupportsFloat)
            and 1 < scale < math.inf
            and isinstance(neighbors, SupportsIndex)
            and neighbors >= 0
        ):
            raise InputError(
                f"scale must be a number over 1 and neighbors 0 or more; got {scale!r:.40} and {neighbors!r:.40}"
            )
        cv2 = self._cv2
        self._scale, self._neighbors, self._smallest = scale, neighbors, smallest
        if not hasattr(cv2, "CascadeClassifier"):
            raise BackendError(
                f"OpenCV {cv2.__version__} has no Haar cascades (version 5 dropped them); "
                "use the project's own detector (pip install 'kp-edge[model,ort]') or YuNet, or give the boxes; "
                "or run: pip install 'opencv-python-headless<5'"
            )
        # the wheels from PyPI bring the cascades along, Debian and JetPack keep them in a system folder
        folder = cv2.data.haarcascades if hasattr(cv2, "data") else "/usr/share/opencv4/haarcascades"
        path = Path(folder) / "haarcascade_frontalface_default.xml"
        self._path = path
        self._cascade, self._most_hw = self._opened(), (0, 0)
        if self._cascade.empty():
            raise BackendError(f"OpenCV can't read the cascade {path}; install opencv-data or opencv-python-headless")

    def __repr__(self) -> str:
        return f"HaarDetector({self._scale}, {self._neighbors}, {self._smallest})"

    def raw(self, frame: Frame) -> NDArray[np.float64]:
        """The cascade's own boxes, `(n, 4)` x0, y0, x1, y1."""
        height, width = frame.size_hw
        luma = frame.luma(0, 0, width, height)
        self._most_hw = max(height, self._most_hw[0]), max(width, self._most_hw[1])
        if math.prod(self._most_hw) > max(height * width, _HAAR_SUMS * (1 - 1 / float(self._scale))):
            self._cascade, self._most_hw = self._opened(), (height, width)
        least = max(24, round(self._smallest * min(height, width)))
        found = self._cascade.detectMultiScale(luma, self._scale, self._neighbors, minSize=(least, least))
        boxes = np.asarray(found, np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes

    def _opened(self) -> Any:
        return self._cv2.CascadeClassifier(str(self._path))


_YUNET_LEAST = 64
"""Least side of YuNet's input: up to 32 px its coarsest map has one row, and OpenCV 4.14 reads unset memory."""


class YuNetDetector(_OpenCvDetector):
    """YuNet (Wu et al. 2023) through OpenCV; the model file is the user's (`docs/detectors.md`).

    Args:
        model: path of `face_detection_yunet_*.onnx` or `yunet_n_*.onnx`.
        score: least score of a face, 0 to 1.

    Raises:
        BackendError: OpenCV can't read the file, or it is another network.
        InputError: `score` is out of range.
        MissingExtraError: OpenCV is not installed.
    """

    BOX_MAP = BoxMap(dx=0.0038, dy=0.1268, width=1.0507, height=0.7675)

    def __init__(self, model: str | os.PathLike[str], score: float = 0.6) -> None:
        super().__init__()
        check_score(score)
        cv2 = self._cv2
        if not os.path.isfile(as_path(model, "a YuNet model")):  # noqa: PTH113  pathlib's raises where it may not look
            raise BackendError(f"there is no YuNet model at {model}; docs/detectors.md says where it is published")
        try:
            self._net: Any = cv2.FaceDetectorYN.create(cv2_name(model), "", (320, 320), score)
        except cv2.error as error:
            raise BackendError(
                f"OpenCV {cv2.__version__} can't read {model} as a YuNet model; take OpenCV 4.8 or newer and a file "
                f"that docs/detectors.md names, such as yunet_n_640_640.onnx: {reason_of(error)}"
            ) from error
        self._model = model

    def __repr__(self) -> str:
        return f"YuNetDetector({str(self._model)!r})"

    def raw(self, frame: Frame) -> NDArray[np.float64]:
        """The network's own boxes, `(n, 4)` x0, y0, x1, y1."""
        cv2 = self._cv2
        height, width = frame.size_hw
        bgr = frame.data if frame.layout == "bgr" else bgr_copy(frame)
        if min(height, width) < _YUNET_LEAST:
            low, right = max(0, _YUNET_LEAST - height), max(0, _YUNET_LEAST - width)
            bgr = cv2.copyMakeBorder(bgr, 0, low, 0, right, cv2.BORDER_CONSTANT)
        try:
            self._net.setInputSize((bgr.shape[1], bgr.shape[0]))
            _, faces = self._net.detect(bgr)
        except cv2.error as error:
            raise BackendError(f"OpenCV can't run {self._model} as YuNet: {reason_of(error)}") from error
        boxes = np.asarray([] if faces is None else faces[:, :4], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes


def check_score(score: float) -> None:
    """Refuses what is no least score of a face.

    Raises:
        InputError: `score` is not over 0 and under 1.
    """
    if not (isinstance(score, SupportsFloat) and 0 < score < 1):
        raise InputError(f"a detector's score must be over 0 and under 1, got {score!r:.40}")


def check_smallest(smallest: float) -> None:
    """Refuses what is no share of the image's shorter side.

    Raises:
        InputError: `smallest` is not over 0 and up to 1.
    """
    if not (isinstance(smallest, SupportsFloat) and 0 < smallest <= 1):
        raise InputError(f"the smallest face is a share of the shorter side, over 0 and up to 1; got {smallest!r:.40}")


def largest_first(boxes: NDArray[np.float64], frame: Frame) -> NDArray[np.float64]:
    """Those of the boxes `(n, 4)` that a model takes, on the frame and a pixel wide, by their area."""
    size = boxes[:, 2:] - boxes[:, :2]
    touches = (boxes[:, 2:] > 0).all(axis=1) & (boxes[:, :2] < frame.size_hw[::-1]).all(axis=1)
    boxes = boxes[touches & (size >= 1).all(axis=1)]
    return boxes[np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(axis=1), kind="stable")]
