"""A program as a user writes it, for strict type checks: OpenCV types a frame as any number's array."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

import kp_runtime

ENGINES = Path(__file__).resolve().parents[1] / "engines"


class OwnDetector:
    """Finds what the caller has found already; as float32 and lists come from other networks."""

    def __init__(self, boxes_xyxy: ArrayLike) -> None:
        self.boxes_xyxy = boxes_xyxy

    def __call__(self, image: NDArray[np.uint8]) -> ArrayLike:
        """The boxes."""
        return self.boxes_xyxy


def test_frames_as_opencv_types_them(astronaut: Path) -> None:
    image = cv2.imread(str(astronaut))
    assert image is not None
    model = kp_runtime.load(ENGINES / "resnet18-68-lite")
    detector = kp_runtime.CenterDetector(ENGINES / "face-detector")
    least: float = detector.score
    boxes = detector(image)
    keypoints = model(image, boxes)
    tracker = kp_runtime.Tracker(model, OwnDetector(boxes.astype(np.float32)))
    tracks = tracker(image, 0.0)
    found: int = tracker.detector_runs + tracker.faces - tracker.lost
    drawn = kp_runtime.draw_keypoints(kp_runtime.open_effect("blur")(image, keypoints.xy), keypoints.xy)
    assert (len(boxes), len(tracks), found, least > 0) == (1, 1, 2, True)
    assert len(model.submit(kp_runtime.Frame(image, "bgr"), boxes.tolist()).result()) == 1
    assert drawn.shape == image.shape


def test_a_misspelt_name_is_an_error_to_a_type_checker_too() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Modle'"):
        _ = kp_runtime.Modle  # type: ignore[attr-defined]
