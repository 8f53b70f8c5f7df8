"""Faces followed from frame to frame: pure logic on boxes and points, nothing is read or written here.

The box of the next frame is that of the last points, so the detector runs only now and then. Whether a
face is still there the model says itself (`ModelSpec.lost_limit`). One that does not is asked for a second look, in a
box that is shifted and larger: on a face both looks find the same points, elsewhere they do not
(`docs/video_measured.md` has the measurements).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, SupportsFloat

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kp_runtime.errors import InputError
from kp_runtime.frame import Frame, as_frame
from kp_runtime.geometry import boxes_to_compare, overlaps
from kp_runtime.pipeline import LARGEST_BOX
from kp_runtime.results import Keypoints
from kp_runtime.smooth import OneEuro

__all__ = ["LOST", "FindFaces", "FindPoints", "Track", "Tracker", "TrackerSettings", "disagreement", "second_looks"]

LOST = 0.03
"""Above this `disagreement` there is no face; measured by `scripts/lost_faces.py`."""

_SHIFT, _ENLARGED = 0.07, 1.12
"""The second look's box: right and down by this share of the longer side, and this much larger."""

_SMALLEST = 4.0
"""Least longer side of a face's box in pixels."""

_COVERED = 5
"""Frames on which the box of a face that something begins to cover may slide along with it, until the face is lost."""

_GONE = 1.0
"""The `lost_score` of a lost face that is given on: about what a model says where there is none."""

_STALL_S = 5.0
"""Seconds without a frame after which the same people are expected, as after a hiccup of a stream."""


class FindPoints(Protocol):
    """What a tracker needs of a `Model`."""

    def __call__(self, image: Any, boxes_xyxy: ArrayLike, /) -> Keypoints:
        """The keypoints in each box.

        Args:
            image: a frame, as the tracker got it.
            boxes_xyxy: `(n, 4)`, pixels of the frame.
        """
        ...


class FindFaces(Protocol):
    """What a tracker needs of a `Detector`."""

    def __call__(self, image: Any, /) -> ArrayLike:
        """`(n, 4)` boxes, tight around the 68 points; `image` is what the tracker was given."""
        ...


@dataclass(frozen=True, eq=False)
class Track:
    """One face on one frame.

    Attributes:
        id: the same number as long as the face is followed.
        box_xyxy: `(4,)` float64, where the points were looked for, pixels of the image.
        xy: `(points, 2)` float32, pixels of the image, smoothed where the tracker smooths.
        lost_score: the model's own, or the `disagreement` of two looks; above the tracker's limit the face is lost.
    """

    id: int
    box_xyxy: NDArray[np.float64]
    xy: NDArray[np.float32]
    lost_score: float


_EVERY, _FRAMES = ("1 or more", 1.0, math.inf), ("0 or more", 0.0, math.inf)
_SHARE = ("over 0 and at most 1", math.ulp(0.0), 1.0)
_RANGES = {
    "lost": ("a number", -math.inf, math.inf),
    "detect_every": _EVERY,
    "search_every": _EVERY,
    "again": _FRAMES,
    "keep": _FRAMES,
    "match": _SHARE,
    "same": _SHARE,
}


@dataclass(frozen=True)
class TrackerSettings:
    """How a `Tracker` decides.

    Attributes:
        lost: the highest `lost_score` of a face; None takes the model's `lost_limit`, or `LOST` where it has none.
        detect_every: frames from one run of the detector to the next, for new faces.
        search_every: the same while a face is lost, or none was found.
        again: frames on which a lost face is still looked for in its place: one bad frame loses nobody.
        keep: frames that a lost face may be away and still come back with its id.
        match: least overlap (IoU) of a detection with the place where a face is awaited.
        same: overlap from which two tracks are taken for one face; likewise a detection that is trusted and a track.
        smooth: smooth the points (One-Euro); off for measurements.
        trust_detector: what the detector takes for a face is one on that frame, even where its points tell otherwise,
            and a face that is lost is given on for `keep` frames with its last points, in two tracks of its id: where
            it was last seen and where it is awaited. For hiding faces, where one too many is better than one too few.

    Raises:
        InputError: a setting is no number, or one that can't be.
    """

    lost: float | None = None
    detect_every: int = 30
    search_every: int = 5
    again: int = 2
    keep: int = 30
    match: float = 0.3
    same: float = 0.6
    smooth: bool = True
    trust_detector: bool = False

    def __post_init__(self) -> None:
        for name, value in ((each.name, getattr(self, each.name)) for each in fields(self)):
            if not isinstance(value, SupportsFloat) and (name, value) != ("lost", None):
                raise InputError(f"a tracker's {name} must be a number, got {value!r:.40}")
            what, least, most = _RANGES.get(name, ("", -math.inf, math.inf))
            if value is not None and not least <= float(value) <= most:
                raise InputError(f"a tracker's {name} must be {what}, got {value!r:.40}")


@dataclass
class _Face:
    """What is remembered of a followed face: its last boxes and points, its motion a frame, how long it is away."""

    id: int
    box: NDArray[np.float64]
    xy: NDArray[np.float32]
    motion: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    away: int = 0
    smooth: OneEuro = field(default_factory=OneEuro)
    past: deque[NDArray[np.float64]] = field(default_factory=lambda: deque(maxlen=2 * _COVERED))

    @property
    def seen(self) -> NDArray[np.float64]:
        """Where it was found for the last time."""
        return self.past[-1]

    @property
    def awaited(self) -> NDArray[np.float64]:
        """Where it should be on this frame, if it goes on as before."""
        return self.box + np.tile(self.motion, 2)

    @property
    def awaited_uncovered(self) -> NDArray[np.float64]:
        """The same by what it did before anything may have begun to cover it, once it was in view for long enough."""
        if len(self.past) < 2 * _COVERED:
            return self.awaited
        first, last = self.past[0], self.past[_COVERED - 1]
        motion = (last - first).reshape(2, 2).mean(axis=0) / (_COVERED - 1)
        place: NDArray[np.float64] = last + np.tile(motion, 2) * (_COVERED + 1 + self.away)
        return place

    def move_to(self, box: NDArray[np.float64], xy: NDArray[np.float32]) -> None:
        if self.away:  # it comes from elsewhere: neither speed nor old points tell anything
            self.motion, self.smooth = np.zeros(2), OneEuro()
            self.past.clear()
        else:
            self.motion = (self.motion + (box - self.box).reshape(2, 2).mean(axis=0)) / 2
        self.box, self.xy, self.away = box, xy, 0
        self.past.append(box)


@dataclass(frozen=True)
class _Look:
    """What the network found in a box, and how far that is from a face."""

    searched: NDArray[np.float64]
    xy: NDArray[np.float32]
    box: NDArray[np.float64]
    score: float


class Tracker:
    """Follows faces: `tracker(image, seconds)` gives the `Track`s of the next frame. One for each stream and thread.

    Args:
        model: finds points in boxes, such as `kp_runtime.load(…)`; its `spec`, where it has one, tells whether it says
            itself that a face is lost.
        detector: finds boxes, such as `kp_runtime.HaarDetector()`.
        settings: how it decides.

    Attributes:
        detector_runs: on how many frames the detector was asked.
        faces: how many tracks there were.
        lost: how often a face that was in view was not found on the next frame.
    """

    def __init__(self, model: FindPoints, detector: FindFaces, settings: TrackerSettings | None = None) -> None:
        self._model, self._detector = model, detector
        self._settings = settings or TrackerSettings()
        says = getattr(getattr(model, "spec", None), "lost_limit", None)
        self._model_says = says is not None
        own = LOST if says is None else says
        self._limit = own if self._settings.lost is None else self._settings.lost
        self._known: list[_Face] = []
        self._until_detection = 0
        self._seconds, self._step = -math.inf, math.inf
        self.detector_runs: int = 0
        self.faces: int = 0
        self.lost: int = 0

    def __call__(self, image: Frame | NDArray[Any], seconds: float) -> tuple[Track, ...]:
        """Follows the faces to the next frame.

        Args:
            image: a `Frame`, or uint8 `(h, w, 3)` BGR or grey `(h, w)`; the same size as the frames before. The model
                and the detector are given it as it is.
            seconds: the frame's time, for the smoothing. Where it is not after the last frame's, this begins anew.
                After a gap of over 5 s, and of over `keep` times the step before, nobody is awaited any more.

        Returns:
            A track a face in view, in order of their ids.

        Raises:
            ImageError: an image that is not taken.
            InputError: a time that is not finite.
            KpError: what the model and the detector raise.
        """
        if not (isinstance(seconds, SupportsFloat) and math.isfinite(seconds)):
            raise InputError(f"a frame's time must be a finite number of seconds, got {seconds!r:.40}")
        size_wh = as_frame(image).size_hw[::-1]
        trust = self._settings.trust_detector
        step = float(seconds) - self._seconds
        if step > max(_STALL_S, self._settings.keep * self._step):  # others may be there; what is hidden stays so
            self._known, self._until_detection = self._known if trust else [], 0
        again, is_there = (self._settings.keep, _touches) if trust else (self._settings.again, _on_image)
        asked = [face for face in self._known if face.away <= again and is_there(face.box, size_wh)]
        looks = zip(asked, self._look(image, size_wh, [face.box for face in asked]), strict=True)
        found = {face.id: look for face, look in looks if self._is_face(look, size_wh)}
        self._drop_doubles(found)
        self._until_detection -= 1
        if self._until_detection <= 0 or any(face.away == 0 and face.id not in found for face in self._known):
            self._detect(image, size_wh, found)
        for face in self._known:
            if face.id in found:
                face.move_to(found[face.id].box, found[face.id].xy)
            else:
                self.lost += not face.away
                face.box, face.away = face.awaited, face.away + 1
        self._known = [face for face in self._known if face.away <= self._settings.keep]
        if not found or any(face.away for face in self._known):
            self._until_detection = min(self._until_detection, self._settings.search_every)
        if step <= 0:  # what it says of speeds would be wrong, and the last answer is of another frame
            for face in self._known:
                face.smooth = OneEuro()
        self._seconds, self._step = float(seconds), step
        tracks = []
        for face in self._known:
            if face.id in found:
                tracks.append(self._track(face, found[face.id], seconds))
            elif trust:
                tracks += self._hidden(face, found, size_wh)
        return tuple(tracks)

    def _look(self, image: Any, size_wh: tuple[int, ...], boxes: Sequence[NDArray[np.float64]]) -> list[_Look]:
        """A look at all boxes, or two where the model does not say what is lost, by one call of it."""
        if not boxes:
            return []
        searched = np.stack(boxes)
        if self._model_says:
            found = self._model(image, searched)
            xy, scores = found.xy, np.asarray(found.lost_score, np.float64)
        else:
            second_boxes = second_looks(searched, size_wh)
            both = self._model(image, np.concatenate([searched, second_boxes])).xy
            xy, second = both[: len(boxes)], both[len(boxes) :]
            scores = disagreement(xy, second, searched)
        return [_Look(*look) for look in zip(searched, xy, boxes_to_compare(xy), scores.tolist(), strict=True)]

    def _is_face(self, look: _Look, size_wh: tuple[int, ...]) -> bool:
        """Whether it is a face that can be followed."""
        return look.score <= self._limit and _on_image(look.box, size_wh)

    def _hidden(self, face: _Face, found: dict[int, _Look], size_wh: tuple[int, ...]) -> list[Track]:
        """A lost face as it was last seen, there and where it is awaited, but for where one that is found hides it."""
        return [
            Track(face.id, box, (face.xy + (box - face.seen)[:2]).astype(np.float32), _GONE)
            for box in (face.seen, face.box)
            if _touches(box, size_wh)
            and all(_overlap(box, other.box) < self._settings.same for other in found.values())
        ]

    def _drop_doubles(self, found: dict[int, _Look]) -> None:
        """Where two tracks slid onto one face, the one that was awaited there stays."""
        by_id = {face.id: face for face in self._known}
        kept: list[int] = []
        for key in sorted(found, key=lambda key: (by_id[key].away, -_overlap(found[key].box, by_id[key].awaited))):
            if all(_overlap(found[key].box, found[other].box) < self._settings.same for other in kept):
                kept.append(key)
        for key in set(found) - set(kept):
            del found[key]

    def _detect(self, image: Any, size_wh: tuple[int, ...], found: dict[int, _Look]) -> None:
        """Runs the detector: faces that were lost are found again, others are new; both join `found`."""
        self.detector_runs += 1
        self._until_detection = self._settings.detect_every
        boxes = np.asarray(self._detector(image), np.float64)
        trust = self._settings.trust_detector
        least = self._settings.same if trust else self._settings.match  # neighbours overlap too
        taken = {row for row, _ in _matches(boxes, [look.box for look in found.values()], least)}
        free = [row for row in range(len(boxes)) if row not in taken]
        if not free:
            return
        # a detector's box is rough: what is judged is the box of the points in it
        points = self._model(image, boxes[free]).xy
        around, is_there = boxes_to_compare(points), _touches if trust else _on_image
        there = [row for row, box in enumerate(around) if is_there(box, size_wh)]
        for row, look in zip(there, self._look(image, size_wh, [around[row] for row in there]), strict=True):
            others = [other.box for other in found.values()]
            if trust and any(_overlap(look.box, box) >= least for box in others):  # it slid onto a neighbour
                look = _Look(boxes[free[row]], points[row], look.searched, look.score)
            is_face = trust or self._is_face(look, size_wh)
            if not is_face or any(_overlap(look.box, box) >= least for box in others):
                continue
            lost = [face for face in self._known if face.id not in found]
            places = [face.awaited for face in lost] + [face.awaited_uncovered for face in lost]
            match = _matches(look.box[None], places, self._settings.match)
            # it may have stopped; only now, as where one of two who cross is awaited, the other was seen
            match = match or _matches(look.box[None], [face.seen for face in lost], self._settings.match)
            if match:
                face = lost[match[0][1] % len(lost)]
                face.away = max(face.away, 1)
            else:
                self.faces += 1
                face = _Face(self.faces, look.box, look.xy)
                self._known.append(face)
            found[face.id] = look

    def _track(self, face: _Face, look: _Look, seconds: float) -> Track:
        xy = look.xy
        if self._settings.smooth:
            xy = face.smooth(xy, seconds, unit=float((look.box[2:] - look.box[:2]).max())).astype(np.float32)
        return Track(face.id, look.searched, xy, look.score)


def second_looks(boxes_xyxy: NDArray[np.floating], size_wh: tuple[int, ...] | None = None) -> NDArray[np.float64]:
    """The boxes of the second look: `(n, 4)` to `(n, 4)` float64; within an image's size none is moved off it."""
    boxes = np.asarray(boxes_xyxy, np.float64)
    half = (boxes[:, 2:] - boxes[:, :2]) / 2
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    shift = np.broadcast_to(2 * _SHIFT * half.max(axis=1, keepdims=True), half.shape)
    if size_wh is not None:
        shift = np.where(centre + shift - _ENLARGED * half < size_wh, shift, 0.0)
    centre = centre + shift
    return np.concatenate([centre - _ENLARGED * half, centre + _ENLARGED * half], axis=1)


def disagreement(
    xy: NDArray[np.floating], second_xy: NDArray[np.floating], boxes_xyxy: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Mean distance between the points of two looks, in longer sides of the first look's box.

    Args:
        xy: `(n, points, 2)` of the first look, pixels of the image.
        second_xy: the same of the second.
        boxes_xyxy: `(n, 4)` of the first.

    Returns:
        `(n,)` float64.
    """
    side = np.asarray(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], np.float64).max(axis=1)
    distance = np.linalg.norm(np.asarray(xy, np.float64) - second_xy, axis=-1).mean(axis=1)
    share: NDArray[np.float64] = distance / side
    return share


def _on_image(box: NDArray[np.float64], size_wh: tuple[int, ...]) -> bool:
    """Whether a box has its centre on the image and a size that can be looked at."""
    centre = (box[:2] + box[2:]) / 2
    return bool((centre >= 0).all() and (centre < size_wh).all() and _has_size(box, size_wh))


def _touches(box: NDArray[np.float64], size_wh: tuple[int, ...]) -> bool:
    """Whether any of a box is on the image, and it has a size that can be looked at."""
    return bool((box[2:] > 0).all() and (box[:2] < size_wh).all() and _has_size(box, size_wh))


def _has_size(box: NDArray[np.float64], size_wh: tuple[int, ...]) -> bool:
    """Whether a face can have this box, and a model takes it, that of the second look too."""
    side = float((box[2:] - box[:2]).max())
    return _SMALLEST <= side < LARGEST_BOX / _ENLARGED * max(size_wh)


def _overlap(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(overlaps(a[None], b[None])[0, 0])


def _matches(boxes: NDArray[np.float64], awaited: Sequence[NDArray[np.float64]], least: float) -> list[tuple[int, int]]:
    """Pairs of a box and an awaited one, best overlap first, each used once."""
    if not len(boxes) or not awaited:
        return []
    shares = overlaps(boxes, np.stack(awaited))
    pairs = []
    while shares.max() >= least:
        row, column = np.unravel_index(int(shares.argmax()), shares.shape)
        pairs.append((int(row), int(column)))
        shares[row], shares[:, column] = -1, -1
    return pairs
