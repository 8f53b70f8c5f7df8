"""The project's own face detector: a small network, by ONNX Runtime on the CPU, that sees an image at several sizes.

The network finds faces of 22 to 72 pixels (its bundle says which), so the image is halved until the largest face is
that small. Boxes of several cells and sizes around one face become one: their mean, weighted by their scores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.backend_ort import open_session
from kp_runtime.cores import check_process, checked_threads
from kp_runtime.detect import check_score, check_smallest, largest_first
from kp_runtime.errors import BackendError, reason_of
from kp_runtime.frame import Frame, as_frame, import_cv2
from kp_runtime.geometry import overlaps
from kp_runtime.golden import GOLDEN_NAME, arrays_from_npz
from kp_runtime.manifest import DetectorManifest
from kp_runtime.signing import PublicKey
from kp_runtime.spec import DetectorSpec

__all__ = ["CenterDetector", "Found", "merged"]

MODEL_NAME = "model.fp32.onnx"
GOLDEN_TOLERANCE = 0.01
"""Largest difference of a golden cell's score; a hundred times that in pixels for its distances."""

_SAME = 0.35
"""Boxes that overlap by more are of one face."""

_INSIDE = 0.8
"""A box that has more of the smaller one's area in common with a better one is none: no face lies in another."""


@dataclass(frozen=True, eq=False)
class Found:
    """Boxes `(n, 4)` float64, tight around the 68 points, pixels of the image; and their scores `(n,)`, 0 to 1."""

    boxes_xyxy: NDArray[np.float64]
    scores: NDArray[np.float64]


class CenterDetector:
    """Finds faces with a network of `kp train-detector`.

    Args:
        bundle: the detector's folder, such as `engines/face-detector`.
        score: least score of a face, over 0 and under 1; the bundle's when None.
        smallest: longer side of the smallest box, as a share of the image's shorter side.
        threads: of the engine; all cores when None.
        public_key: whose signature the bundle must have; see `load`.

    Attributes:
        sha256: of the model file, as the manifest has it.

    Raises:
        BundleError, IntegrityError: no detector's bundle there, or a file that is not the manifest's.
        SignatureError: it is not signed by `public_key`.
        BackendError: ONNX Runtime refuses the file, or gives other cells than PyTorch did.
        InputError: `score` or `smallest` out of range, `threads` are not there, or `public_key` is no key.
        MissingExtraError: OpenCV or ONNX Runtime is not installed.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        score: float | None = None,
        smallest: float = 0.05,
        threads: int | None = None,
        public_key: PublicKey | None = None,
    ) -> None:
        manifest = DetectorManifest.read(bundle, public_key)
        import_cv2()  # which the first image takes
        self.spec: DetectorSpec = manifest.spec
        self.score: float = self.spec.score if score is None else score
        check_score(self.score)
        check_smallest(smallest)
        self._smallest, self._model = smallest, Path(bundle) / MODEL_NAME
        self._threads, self._process = checked_threads(threads), os.getpid()
        self._session = open_session(self._model, lambda: manifest.read_file(bundle, MODEL_NAME), self._threads)
        self.sha256: str = manifest.entry(bundle, MODEL_NAME).sha256
        self._check(manifest.read_file(bundle, GOLDEN_NAME), str(Path(bundle) / GOLDEN_NAME))

    def __repr__(self) -> str:
        return f"CenterDetector({str(self._model.parent)!r}, {self.score}, {self._smallest})"

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
            BackendError: ONNX Runtime failed, or this process was forked since it was opened.
        """
        frame = as_frame(image, layout)
        return largest_first(self.find(frame).boxes_xyxy, frame)

    def find(self, image: Frame | NDArray[Any], layout: str = "bgr") -> Found:
        """All faces of an image with their scores, best first; takes and raises what a call does."""
        frame = as_frame(image, layout)
        boxes, scores = [np.empty((0, 4))], [np.empty(0)]
        for level, scale_xy in self._levels(frame):
            cells = self.cells(level)
            rows, columns = np.nonzero(cells[0] >= self.score)
            left, top, right, low = cells[1:, rows, columns].astype(np.float64)
            x, y = columns * float(self.spec.stride), rows * float(self.spec.stride)
            # pixel centres: 0.5 of a small pixel lies at 0.5 of the large ones that it is made of
            corners = np.stack([x - left, y - top, x + right, y + low], axis=1).reshape(-1, 2, 2)
            corners = (corners + 0.5) / scale_xy - 0.5
            # a damaged file may say anything
            whole = np.isfinite(corners).all(axis=(1, 2)) & (corners[:, 1] - corners[:, 0] >= 1).all(axis=1)
            boxes.append(corners[whole].reshape(-1, 4))
            scores.append(cells[0, rows, columns][whole].astype(np.float64))
        return merged(np.concatenate(boxes), np.concatenate(scores))

    def cells(self, luma: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What the network says of a grey image `(h, w)` uint8: `(5, rows, columns)`, see `DetectorSpec`."""
        if self._threads > 1:
            check_process(self._process)
        try:
            cells: Any = self._session.run(["cells"], {"image": np.ascontiguousarray(luma)[None, None]})[0]
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise BackendError(
                f"ONNX Runtime failed on {self._model}: {reason_of(error)}; export the detector again"
            ) from error
        wanted = (1, 5, *(-(-side // self.spec.stride) for side in luma.shape))
        if cells.shape != wanted or cells.dtype != np.float32:
            raise BackendError(
                f"{self._model} gave {cells.dtype} {cells.shape} instead of float32 {wanted}; export the detector again"
            )
        return cells[0]  # type: ignore[no-any-return]

    def _levels(self, frame: Frame) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float64]]]:
        """The image from the size in which the smallest faces are just found to that of the largest, and its scales."""
        cv2 = import_cv2()
        height, width = frame.size_hw
        luma = frame.luma(0, 0, width, height)
        scale = min(1.0, self.spec.least_px / (self._smallest * min(height, width)))
        while True:
            wanted = (max(1, round(width * scale)), max(1, round(height * scale)))
            if wanted != luma.shape[::-1]:
                luma = cv2.resize(luma, wanted, interpolation=cv2.INTER_AREA)
            yield luma, np.array(wanted) / (width, height)
            if scale * min(height, width) <= self.spec.most_px:
                return
            scale /= 2

    def _check(self, golden: bytes, origin: str) -> None:
        """Compares the cells of the golden image with PyTorch's."""
        image, wanted = arrays_from_npz(golden, ("image", "cells"), origin)
        if image.dtype != np.uint8 or image.ndim != 2 or wanted.ndim != 3 or wanted.dtype != np.float32:
            raise BackendError(f"{origin} holds no golden image and cells; export the detector again")
        found = self.cells(image)
        with np.errstate(invalid="ignore"):  # infinite ones on both sides
            off = np.abs(found - wanted) if found.shape == wanted.shape else np.full((5, 1, 1), np.inf)
        off[1:] /= 100
        worst = float(off.max())  # NaN where any is
        if not worst <= GOLDEN_TOLERANCE:
            raise BackendError(
                f"{self._model} gives other cells of the golden image than PyTorch did (off by {worst:.3g}, at most "
                f"{GOLDEN_TOLERANCE}); export the detector again, or update onnxruntime"
            )


def merged(boxes_xyxy: NDArray[np.float64], scores: NDArray[np.float64]) -> Found:
    """One box for each group that overlaps its best one: their mean, weighted by the scores; best first.

    Of two such boxes, one in the other, only the better is kept.

    Args:
        boxes_xyxy: `(n, 4)`, each with an area.
        scores: `(n,)`, over 0.
    """
    order = np.argsort(-scores, kind="stable")
    boxes, weights = boxes_xyxy[order], scores[order]
    faces: list[NDArray[np.float64]] = []
    best: list[float] = []
    while len(boxes):
        same = overlaps(boxes[:1], boxes)[0] > _SAME
        face = np.average(boxes[same], axis=0, weights=weights[same])
        if not faces or (overlaps(face[None], np.array(faces), of_smaller=True) <= _INSIDE).all():
            faces.append(face)
            best.append(float(weights[0]))
        boxes, weights = boxes[~same], weights[~same]
    return Found(np.array(faces).reshape(-1, 4), np.array(best))
