"""Made-up faces for the tracker: a network that finds the one that is nearest and scatters where there is none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kp_runtime.geometry import boxes_from_points
from kp_runtime.pipeline import checked_boxes
from kp_runtime.results import Keypoints
from kp_runtime.spec import ModelSpec
from kp_runtime.track import Track, Tracker, TrackerSettings
from kp_train.synthetic import mean_shape

IMAGE = np.zeros((720, 1280, 3), np.uint8)
Way = Callable[[int], "tuple[float, float] | None"]
"""Where a face's centre is on a frame; None where it is away or hidden."""


class World:
    """Faces of 100 px that move as told; model and detector at once, with a count of their calls."""

    says = False

    def __init__(self, *ways: Way, false_boxes: tuple[tuple[float, ...], ...] = ()) -> None:
        self.ways, self.false_boxes, self.now = ways, false_boxes, 0
        self.spec = ModelSpec("world", lost_limit=0.5 if self.says else None)
        self.batches: list[int] = []
        self._rng = np.random.default_rng(1)

    def places(self) -> list[tuple[float, float]]:
        return [place for way in self.ways if (place := way(self.now)) is not None]

    def faces(self) -> list[np.ndarray]:
        return [mean_shape() * 50 + place for place in self.places()]

    def detect(self, image: np.ndarray) -> np.ndarray:
        boxes = [boxes_from_points(face) + 6 for face in self.faces()] + [np.array(box) for box in self.false_boxes]
        boxes = [box for box in boxes if (box[2:] > 0).all() and (box[:2] < (1280, 720)).all()]
        return np.stack(boxes) if boxes else np.empty((0, 4))

    def __call__(self, image: np.ndarray, boxes_xyxy: object, /) -> Keypoints:
        boxes = checked_boxes(boxes_xyxy, (720, 1280))  # type: ignore[arg-type]
        self.batches.append(len(boxes))
        found = [self._face(box) for box in boxes]
        xy = np.stack([self._nothing(box) if face is None else face for face, box in zip(found, boxes, strict=True)])
        scores = np.array([0.9 if face is None else 0.1 for face in found], np.float32) if self.says else None
        return Keypoints(xy.astype(np.float32), boxes, np.zeros((len(boxes), 2, 3)), (720, 1280), scores)

    def _face(self, box: np.ndarray) -> np.ndarray | None:
        side, centre = (box[2:] - box[:2]).max(), (box[:2] + box[2:]) / 2
        faces = sorted(self.faces(), key=lambda face: np.linalg.norm(face.mean(axis=0) - centre))
        if faces and np.linalg.norm(boxes_from_points(faces[0]).reshape(2, 2).mean(axis=0) - centre) < 0.5 * side:
            return faces[0]
        return None

    def _nothing(self, box: np.ndarray) -> np.ndarray:
        side, centre = (box[2:] - box[:2]).max(), (box[:2] + box[2:]) / 2
        return mean_shape() * side / 2 + centre + self._rng.normal(0, 0.1 * side, (68, 2))

    def tracker(self, **settings: object) -> Tracker:
        return Tracker(self, self.detect, TrackerSettings(**{"smooth": False, **settings}))  # type: ignore[arg-type]

    def run(self, tracker: Tracker, frames: range) -> list[tuple[Track, ...]]:
        found = []
        for self.now in frames:
            found.append(tracker(IMAGE, self.now / 30))
        return found


def ids(tracks: tuple[Track, ...]) -> list[int]:
    return [track.id for track in tracks]
