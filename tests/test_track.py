"""The tracker on made-up faces, whose network finds the face that is nearest and scatters where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_runtime.detector_by_name import load_detector
from kp_runtime.errors import ImageError, InputError
from kp_runtime.frame import Frame
from kp_runtime.geometry import boxes_from_points, overlaps
from kp_runtime.pipeline import checked_boxes, load
from kp_runtime.results import Keypoints
from kp_runtime.spec import ModelSpec
from kp_runtime.track import LOST, Track, Tracker, TrackerSettings, _Face, disagreement, second_looks
from kp_train.synthetic import mean_shape
from tests.conftest import DETECTOR

LITE = Path(__file__).resolve().parents[1] / "engines" / "resnet18-68-lite"
IMAGE = np.zeros((720, 1280, 3), np.uint8)
Way = Callable[[int], "tuple[float, float] | None"]
"""Where a face's centre is on a frame; None where it is away or hidden."""


class Grown:
    """A model whose points lie far apart from the fourth frame on."""

    def __init__(self, world: World, side: int) -> None:
        self.world, self.spec, self.side = world, world.spec, side

    def __call__(self, image: np.ndarray, boxes_xyxy: object, /) -> Keypoints:
        found = self.world(image, boxes_xyxy)
        shape = mean_shape() / np.ptp(mean_shape(), axis=0).max()
        far = (shape * self.side + (640, 360)).astype(np.float32)
        return replace(found, xy=np.broadcast_to(far, found.xy.shape)) if self.world.now > 3 else found


@pytest.fixture(params=[False, True], ids=["two looks", "own score"], autouse=True)
def says(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that do not say that a face is lost, and ones that do."""
    monkeypatch.setattr(World, "says", request.param)


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


def test_a_face_in_view_costs_the_detector_few_frames() -> None:
    world = World(lambda t: (300 + 2 * t, 300 + 40 * np.sin(t / 9)))
    tracker = world.tracker()
    found = world.run(tracker, range(300))
    assert [ids(tracks) for tracks in found] == [[1]] * 300
    assert 1 < tracker.detector_runs <= 0.05 * 300
    for world.now, (track,) in enumerate(found):
        np.testing.assert_allclose(track.xy, world.faces()[0], atol=1e-3)
        assert track.lost_score <= (world.spec.lost_limit or LOST)
    # the next box is that of the last points
    world.now = 41
    np.testing.assert_allclose(found[42][0].box_xyxy, boxes_from_points(world.faces()[0]), atol=1e-3)


def test_a_detector_may_give_its_boxes_as_lists() -> None:
    world = World(lambda _: (300, 300))
    tracker = Tracker(world, lambda image: world.detect(image).tolist())  # type: ignore[arg-type, return-value]
    assert [ids(tracks) for tracks in world.run(tracker, range(3))] == [[1]] * 3


def test_what_a_tracker_does_not_take() -> None:
    with pytest.raises(ImageError, match="an image must be a numpy array, got str"):
        World().tracker()("frame.png", 0.0)  # type: ignore[arg-type]
    for wrong in ({"detect_every": "5"}, {"match": None}):
        with pytest.raises(InputError, match=f"a tracker's {next(iter(wrong))} must be a number, got "):
            TrackerSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"lost": math.nan}, "a number"),
        ({"detect_every": 0}, "1 or more"),
        ({"search_every": 0}, "1 or more"),
        ({"again": -1}, "0 or more"),
        ({"keep": -1}, "0 or more"),
        ({"match": -2}, "over 0 and at most 1"),
        ({"match": math.nan}, "over 0 and at most 1"),
        ({"same": 1.1}, "over 0 and at most 1"),
    ],
)
def test_settings_that_would_find_nobody_or_never_end(wrong: dict[str, float], what: str) -> None:
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(InputError, match=f"a tracker's {name} must be {what}, got {value}"):
        TrackerSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [0.0, -0.5], ids=["stands", "goes back"])
def test_points_follow_a_face_while_time_does_not_go_on(step: float) -> None:
    world = World(lambda t: (300 + 4 * t, 300))
    tracker = world.tracker(smooth=True)
    for world.now in range(25):
        (track,) = tracker(IMAGE, 5 + step * world.now)
        np.testing.assert_allclose(track.xy, world.faces()[0], atol=1e-3)
    for wrong in (math.nan, None):
        with pytest.raises(InputError, match=f"a frame's time must be a finite number of seconds, got {wrong}"):
            tracker(IMAGE, wrong)  # type: ignore[arg-type]


def test_faces_of_a_frame_are_one_batch() -> None:
    world = World(*[lambda t, x=x: (x, 300) for x in (200, 500, 800)])
    tracker = world.tracker()
    world.run(tracker, range(1))
    world.batches.clear()
    assert ids(world.run(tracker, range(1, 2))[0]) == [1, 2, 3]
    assert world.batches == [3 if world.says else 6]


def test_the_settings_limit_goes_before_the_models() -> None:
    world = World(lambda t: (300, 300))
    limit = 0.05 if world.says else 1e-9  # scores are 0.1, and with two looks 0
    found = world.run(world.tracker(lost=limit), range(3))
    assert [ids(tracks) for tracks in found] == ([[]] * 3 if world.says else [[1]] * 3)


def test_a_lost_face_is_noticed_at_once_and_comes_back_with_its_id() -> None:
    world = World(lambda t: (300 + t, 300) if not 50 <= t < 62 else None)
    tracker = world.tracker()
    found = world.run(tracker, range(100))
    assert all(ids(tracks) == [1] for tracks in found[:50])
    assert all(not tracks for tracks in found[50:62])
    assert [t for t in range(62, 100) if not found[t]] == [t for t in range(62, 67) if not found[t]]
    assert all(ids(tracks) == [1] for tracks in found[67:])
    assert (tracker.faces, tracker.lost) == (1, 1)


def test_one_bad_frame_loses_nobody_whom_the_detector_can_not_find() -> None:
    world = World(lambda t: (300 + t, 300) if t != 50 else None)
    tracker = world.tracker()
    world.run(tracker, range(40))
    world.detect = lambda image: np.empty((0, 4))  # type: ignore[method-assign]
    tracker._detector = world.detect
    found = world.run(tracker, range(40, 70))
    assert [ids(tracks) for tracks in found] == [[1]] * 10 + [[]] + [[1]] * 19


@pytest.mark.parametrize(("away", "found"), [(2, [1]), (3, [])])
def test_a_lost_face_is_looked_for_in_its_place_on_as_many_frames_as_were_asked(away: int, found: list[int]) -> None:
    world = World(lambda t: (300, 300) if not 50 <= t < 50 + away else None)
    tracker = world.tracker(again=2)
    world.run(tracker, range(50))
    tracker._detector = lambda image: np.empty((0, 4))
    assert ids(world.run(tracker, range(50, 60))[-1]) == found


@pytest.mark.parametrize(
    ("keep", "away", "found"),
    [({"keep": 10}, 10, [1]), ({"keep": 10}, 11, [2]), ({}, 30, [1]), ({}, 31, [2])],
    ids=str,
)
def test_a_lost_face_keeps_its_id_for_as_many_frames_as_were_asked(
    keep: dict[str, int], away: int, found: list[int]
) -> None:
    world = World(lambda t: (300, 300) if not 50 <= t < 50 + away else None)
    assert ids(world.run(world.tracker(search_every=1, **keep), range(90))[-1]) == found


def test_a_lost_face_is_searched_for_while_another_is_in_view() -> None:
    world = World(lambda t: (300, 300), lambda t: (700, 300) if not 50 <= t < 62 else None)
    found = world.run(world.tracker(detect_every=30, search_every=5), range(70))
    assert ids(found[61]) == [1]
    assert ids(found[67]) == [1, 2]


def test_points_of_before_a_face_was_lost_are_not_smoothed_into_those_of_after() -> None:
    world = World(lambda t: (300, 300) if t < 50 else (340, 300) if t >= 60 else None)
    found = world.run(world.tracker(smooth=True), range(70))
    back = next(tracks for tracks in found[60:] if tracks)
    assert ids(back) == [1]
    np.testing.assert_allclose(back[0].xy, world.faces()[0], atol=1e-3)


def test_points_of_before_a_face_jumped_are_not_smoothed_into_those_of_after() -> None:
    """It is out of its box, so the detector finds it again, on the same frame."""
    world = World(lambda t: (300, 300) if t < 50 else (351, 300))
    tracker = world.tracker(smooth=True)
    before = world.run(tracker, range(50))[-1]
    runs = tracker.detector_runs
    (track,) = world.run(tracker, range(50, 51))[0]
    assert (track.id, tracker.detector_runs) == (before[0].id, runs + 1)
    np.testing.assert_allclose(track.xy, world.faces()[0], atol=1e-3)


def test_how_a_face_moved_before_it_was_lost_tells_nothing_of_after() -> None:
    face = _Face(1, np.array([0.0, 0, 100, 100]), np.zeros((68, 2), np.float32))
    for _ in range(20):
        face.move_to(face.box + 5, face.xy)
    face.away = 3
    face.move_to(face.box + 400, face.xy)
    np.testing.assert_array_equal(face.awaited, face.box)
    np.testing.assert_array_equal(face.awaited_uncovered, face.box)


def test_a_lost_face_is_awaited_farther_on_with_each_frame() -> None:
    world = World(lambda t: None if 6 <= t < 18 else (200 + 12 * t, 300))
    found = world.run(world.tracker(search_every=1), range(24))
    assert [ids(tracks) for tracks in found] == [[1]] * 6 + [[]] * 12 + [[1]] * 6


@pytest.mark.parametrize("back", [300, 300 + 4 * 12], ids=["where it began", "where it was last seen"])
def test_a_face_that_moved_and_stopped_comes_back_with_its_id(back: int) -> None:
    """As a head does that leans or turns away; by then it is awaited elsewhere."""
    world = World(lambda t: (300 + 4 * min(max(t - 4, 0), 12), 300) if t < 17 else (back, 300) if t >= 42 else None)
    found = world.run(world.tracker(search_every=1), range(46))
    assert [ids(tracks) for tracks in found] == [[1]] * 17 + [[]] * 25 + [[1]] * 4


def test_two_who_cross_unseen_keep_their_ids_though_each_comes_back_where_the_other_was() -> None:
    """As behind a pole, a little faster there: what is found is first compared with where each is awaited."""

    def way(t: int, sign: int) -> tuple[float, float] | None:
        return None if 20 <= t < 30 else (500 + sign * (4 * t - (106 if t < 20 else 90)), 300)

    world = World(lambda t: way(t, 1), lambda t: way(t, -1))
    found = world.run(world.tracker(search_every=1), range(40))
    before, after = ({track.id: track.xy[:, 0].mean() for track in found[t]} for t in (15, 35))
    assert not any(found[20:30])
    assert set(before) == set(after) == {1, 2}
    assert (before[1] < before[2]) != (after[1] < after[2])


@pytest.mark.parametrize(
    ("step", "gap", "found"), [(1 / 30, 50, [2]), (1 / 30, 4, [1]), (10, 10, [1]), (10, 299, [1])], ids=str
)
@pytest.mark.parametrize("trust", [False, True])
def test_after_a_long_gap_another_may_be_in_the_place(step: float, gap: float, found: list[int], trust: bool) -> None:
    """Long by the pace of the frames: a picture each ten seconds has none; what is hidden stays so."""
    world = World(lambda t: (300, 300))
    tracker = world.tracker(trust_detector=trust)
    for world.now in range(40):
        tracker(IMAGE, step * world.now)
    runs = tracker.detector_runs
    tracks = tracker(IMAGE, step * 39 + gap)
    assert ids(tracks) == ([1] if trust else found)
    assert (tracker.detector_runs > runs) == (found == [2])


def test_a_lost_face_does_not_cost_the_detector_every_frame() -> None:
    world = World(lambda t: (300, 300) if t < 10 else None)
    tracker = world.tracker()
    world.run(tracker, range(40))
    assert tracker.detector_runs == 2 + 29 // 5  # at the begin, at the loss, and every fifth frame from then on


@pytest.mark.parametrize(("x", "found"), [(351, [1]), (355, [2]), (800, [2])])
def test_another_place_is_another_face(x: float, found: list[int]) -> None:
    """The places overlap by 0.32, 0.29 and nothing."""
    world = World(lambda t: (300, 300) if t < 50 else (x, 300))
    tracks = world.run(world.tracker(), range(60))
    assert ids(tracks[49]) == [1]
    assert [ids(each) for each in tracks[50:]] == [found] * 10


def test_a_new_face_is_found_within_the_interval() -> None:
    world = World(lambda t: (300, 300), lambda t: (700, 300) if t >= 35 else None)
    found = world.run(world.tracker(detect_every=20), range(80))
    assert next(t for t in range(80) if ids(found[t]) == [1, 2]) == 40
    assert all(ids(tracks) == [1, 2] for tracks in found[40:])


def test_an_empty_place_is_searched_now_and_then() -> None:
    world = World(lambda t: None)
    tracker = world.tracker(search_every=5)
    assert world.run(tracker, range(50)) == [()] * 50
    assert tracker.detector_runs == 10
    assert world.batches == []


def test_false_detections_are_refused() -> None:
    world = World(lambda t: (300, 300), false_boxes=((900.0, 500.0, 990.0, 600.0),))
    tracker = world.tracker()
    assert all(ids(tracks) == [1] for tracks in world.run(tracker, range(60)))
    assert tracker.faces == 1


def test_the_detector_is_believed_where_a_face_too_many_is_better() -> None:
    world = World(lambda t: (300, 300), false_boxes=((900.0, 500.0, 990.0, 600.0),))
    tracker = world.tracker(trust_detector=True, detect_every=1)
    assert all(len(tracks) == 2 for tracks in world.run(tracker, range(60)))
    assert tracker.faces < 10  # mostly the same one: its points scatter


def test_believed_faces_may_overlap() -> None:
    world = World(lambda t: (300, 300), lambda t: (351, 300))  # an IoU of 0.32
    tracker = world.tracker(trust_detector=True, detect_every=1)
    assert all(ids(tracks) == [1, 2] for tracks in world.run(tracker, range(20)))


def test_a_believed_face_whose_second_look_slides_onto_its_neighbour_keeps_the_first() -> None:
    class Sliding(World):
        def _face(self, box: np.ndarray) -> np.ndarray | None:
            first, second = self.faces()
            return first if np.allclose(box, boxes_from_points(second), atol=0.01) else super()._face(box)

    world = Sliding(lambda t: (300, 300), lambda t: (351, 300))
    for tracks in world.run(world.tracker(trust_detector=True, detect_every=1), range(20)):
        assert ids(tracks) == [1, 2]
        np.testing.assert_allclose(tracks[1].xy, world.faces()[1], atol=0.01)
        np.testing.assert_allclose(tracks[1].box_xyxy, boxes_from_points(world.faces()[1]) + 6)


def test_a_believed_face_counts_as_long_as_a_part_of_it_is_on_the_image() -> None:
    """Its eyes may be there where the middle of it is not."""
    world = World(lambda t: (1260, 680 + 5 * t))
    tracker = world.tracker(trust_detector=True, detect_every=1)
    found = world.run(tracker, range(15))
    assert [ids(tracks) for tracks in found] == [[1]] * 15
    assert not any(world.run(world.tracker(), range(10, 15)))


def test_a_believed_face_that_is_lost_is_given_on_where_it_was_seen_and_where_it_is_awaited() -> None:
    """It may have stopped, as a head that tilts, or gone on, as one behind a pole."""
    world = World(lambda t: (300 + 3 * t, 300) if t < 20 or 28 <= t < 40 else None)
    found = world.run(world.tracker(trust_detector=True, detect_every=1, keep=10), range(60))
    gone = [20 <= t < 28 or 40 <= t < 50 for t in range(60)]
    assert [ids(tracks) for tracks in found] == [[1, 1] if g else [1] if t < 40 else [] for t, g in enumerate(gone)]
    for t in range(20, 28):
        stayed, moved = found[t]
        np.testing.assert_allclose(stayed.xy, mean_shape() * 50 + (300 + 3 * 19, 300), atol=0.01)
        np.testing.assert_allclose(moved.xy, mean_shape() * 50 + (300 + 3 * t, 300), atol=0.01)
        assert stayed.lost_score > (world.spec.lost_limit or LOST)


def test_a_believed_face_that_is_awaited_beyond_the_edge_is_still_hidden_where_it_was_seen() -> None:
    world = World(lambda t: (1000 + 12 * t, 300) if t < 20 else None)
    found = world.run(world.tracker(trust_detector=True, detect_every=1), range(45))
    assert ids(found[44]) == [1]
    np.testing.assert_allclose(found[44][0].xy, mean_shape() * 50 + (1000 + 12 * 19, 300), atol=0.01)


@pytest.mark.parametrize("trust", [False, True])
def test_a_face_that_shrinks_to_a_spot_is_lost(trust: bool) -> None:
    class Shrinking(World):
        def faces(self) -> list[np.ndarray]:
            return [300 + mean_shape() * max(50 - 5 * self.now, 0.2)]

        def detect(self, image: np.ndarray) -> np.ndarray:
            return np.array([[290.0, 290, 310, 310]])

    world = Shrinking()
    found = world.run(world.tracker(trust_detector=trust, detect_every=1, keep=0), range(15))
    assert [len(tracks) for tracks in found] == [1] * 10 + [0] * 5


@pytest.mark.parametrize("side", [91 * 1280, 105 * 1280])
@pytest.mark.parametrize("trust", [False, True])
def test_a_face_that_grows_beyond_all_images_is_lost(trust: bool, side: int) -> None:
    """A model refuses such boxes, and the second look's, which are larger; it had ended the run."""
    world = World(lambda i: (640, 360))
    tracker = Tracker(Grown(world, side), world.detect, TrackerSettings(trust_detector=trust, smooth=False))
    for world.now in range(8):
        tracker(IMAGE, world.now / 30)


@pytest.mark.parametrize("trust", [False, True])
def test_points_on_a_line_are_followed(trust: bool) -> None:
    """Two pupils, or eyes that are closed: the longer side counts, and a pixel up or down is no other face."""

    class Pupils(World):
        def faces(self) -> list[np.ndarray]:
            return [np.array([[x - 30, y], [x + 30, y + self.now // 2 % 2]]) for x, y in self.places()]

        def detect(self, image: np.ndarray) -> np.ndarray:
            return np.array([[x - 60, y - 45, x + 60, y + 75] for x, y in self.places()])

    world = Pupils(lambda t: (300 + t, 300 + t % 2), lambda _: (700, 300))
    found = world.run(world.tracker(trust_detector=trust, detect_every=5), range(40))
    assert [ids(tracks) for tracks in found] == [[1, 2]] * 40


def test_a_second_look_stays_on_the_image() -> None:
    box = np.array([[100, 476.5, 160, 481.4], [600, 100, 640, 160]])
    plain, kept = second_looks(box), second_looks(box, (640, 480))
    assert plain[0, 1] > 480
    assert kept[0, 1] < 476.5
    np.testing.assert_array_equal(kept[0, ::2], plain[0, ::2])
    np.testing.assert_array_equal(kept[1], plain[1])


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    "way",
    [
        lambda t: (1100 + 10 * t, 300),
        lambda t: (180 - 10 * t, 300),
        lambda t: (300, 540 + 10 * t),
        lambda t: (300, 180 - 10 * t),
    ],
    ids=["right", "left", "bottom", "top"],
)
def test_a_face_that_leaves_the_image_is_lost(way: Way, trust: bool) -> None:
    """A believed one with the last of it, and hidden for some frames more."""
    world = World(lambda t: way(t) if t < 30 else None)
    found = world.run(world.tracker(trust_detector=trust, keep=5), range(60))
    assert ids(found[21 if trust else 15]) == [1]
    assert not any(found[23 + 5 if trust else 19 :])


def test_a_frame_of_video_is_given_on_as_it_is_and_ends_where_its_picture_does() -> None:
    """The rows of colour below the luma of NV12 are no part of the picture."""
    world = World(lambda t: (300, 500 + 10 * t) if t < 25 else None)
    frame, seen = Frame(np.zeros((1080, 1280), np.uint8), "nv12", "limited"), []

    def asked(image: object, *boxes: object) -> object:
        seen.append(image)
        return world(image, *boxes) if boxes else world.detect(image)  # type: ignore[arg-type]

    asked.spec = world.spec  # type: ignore[attr-defined]
    tracker, found = Tracker(asked, asked), []  # type: ignore[arg-type]
    for world.now in range(40):
        found.append(ids(tracker(frame, world.now / 30)))
    assert found[:20] == [[1]] * 20
    assert not any(found[23:])
    assert all(image is frame for image in seen)


def crossing(t: int) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """One face from left to right, before another that comes from the right and is hidden meanwhile."""
    front, behind = (200.0 + 6 * t, 300.0), (1000.0 - 6 * t, 320.0)
    return front, behind if abs(front[0] - behind[0]) > 70 else None


def test_crossing_faces_keep_their_ids() -> None:
    world = World(lambda t: crossing(t)[0], lambda t: crossing(t)[1])
    found = world.run(world.tracker(), range(130))
    before, after = ({t.id: t.xy[:, 0].mean() for t in found[i]} for i in (0, -1))
    assert set(before) == set(after) == {1, 2}
    for key in (1, 2):
        assert (before[key] < 600) != (after[key] < 600)
    assert all(len(tracks) <= 1 for tracks in found[63:70])  # one face, one track


def slid_along(t: int) -> tuple[float, float] | None:
    """The face behind, whose visible rest is dragged along on the four frames before the other one hides it whole."""
    place = crossing(t)[1]
    return (1000.0 - 6 * 57 + 2 * (t - 57), 320.0) if place is not None and 57 <= t < 61 else place


def test_a_face_that_is_covered_bit_by_bit_comes_back_with_its_id() -> None:
    world = World(lambda t: crossing(t)[0], slid_along)
    tracker = world.tracker()
    found = world.run(tracker, range(130))
    before, after = ({t.id: t.xy[:, 0].mean() for t in found[i]} for i in (0, -1))
    assert set(before) == set(after) == {1, 2}
    for key in (1, 2):
        assert (before[key] < 600) != (after[key] < 600)
    assert tracker.faces == 2


def test_two_tracks_never_share_a_face() -> None:
    world = World(lambda t: (400 - min(t, 60), 300), lambda t: (600 - 3 * t, 300) if t < 55 else None)
    found = world.run(world.tracker(), range(120))
    assert max(map(len, found)) == 2
    for tracks in found:
        boxes = [boxes_from_points(track.xy) for track in tracks]
        assert all(overlaps(a[None], b[None])[0, 0] < 0.6 for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("trust", [False, True])
def test_of_two_tracks_on_one_face_the_one_that_was_awaited_there_stays(trust: bool) -> None:
    world = World(lambda t: (300, 300) if t < 50 else None, lambda t: (645 - 6 * t, 300))
    found = world.run(world.tracker(trust_detector=trust), range(55))
    assert ids(found[49]) == [1, 2]
    assert [ids(tracks)[-1:] for tracks in found[50:]] == [[2]] * 5
    if trust:  # the other may be behind it
        assert ids(found[50]) == [1, 1, 2]
    assert ids(found[54]) == [2]


def test_smoothing_is_for_the_caller_alone() -> None:
    world = World(lambda t: (300 + (t % 2), 300))
    plain, steady = world.run(world.tracker(), range(40)), world.run(world.tracker(smooth=True), range(40))
    move = [np.ptp([tracks[0].xy[0, 0] for tracks in found[20:]]) for found in (plain, steady)]
    assert move[1] < move[0] / 3
    np.testing.assert_array_equal(plain[30][0].box_xyxy, steady[30][0].box_xyxy)


def test_disagreement_is_in_sides_of_the_box() -> None:
    boxes = np.array([[10.0, 10, 50, 30], [0, 0, 10, 100]])
    xy = np.zeros((2, 68, 2), np.float32)
    np.testing.assert_allclose(disagreement(xy, xy + np.float32([3, 4]), boxes), [5 / 40, 5 / 100])
    np.testing.assert_allclose(second_looks(boxes[:1]), [[10.4, 11.6, 55.2, 34.0]], atol=1e-9)


@pytest.mark.parametrize(("share", "found"), [(0.029, [1]), (0.031, [])])
def test_looks_that_differ_by_little_of_the_boxs_side_find_a_face(share: float, found: list[int]) -> None:
    face = mean_shape() * 50 + 300
    box = boxes_from_points(face)

    def model(image: np.ndarray, boxes: np.ndarray, /) -> Keypoints:
        xy = np.float32([face] * len(boxes))
        xy[1:] += (share * (box[2:] - box[:2]).max(), 0)
        return Keypoints(xy, boxes, np.zeros((len(boxes), 2, 3)), (720, 1280), None)

    assert ids(Tracker(model, lambda image: box[None])(IMAGE, 0.0)) == found


@pytest.fixture(scope="module")
def lite() -> object:
    return load(LITE, threads=1)


def test_the_shipped_network_follows_a_face_and_notices_its_loss(lite: object, astronaut: Path) -> None:
    photo = cv2.resize(cv2.imread(str(astronaut))[:300, 60:460], None, fx=0.8, fy=0.8)

    def frame(t: int) -> np.ndarray:
        shift = np.array([[1, 0, 20 + 2 * t], [0, 1, 30 + 10 * np.sin(t / 7)]])
        return cv2.warpAffine(photo, shift, (480, 300), borderMode=cv2.BORDER_REFLECT)

    tracker = Tracker(lite, load_detector(f"own={DETECTOR}"))  # type: ignore[arg-type]
    found = [tracker(frame(t), t / 30) for t in range(60)]
    assert [ids(tracks) for tracks in found] == [[1]] * 60
    assert tracker.detector_runs <= 3
    empty = np.random.default_rng(0).integers(0, 255, (300, 480, 3), np.uint8)
    assert tracker(cv2.GaussianBlur(empty, None, 3), 2.0) == ()


def test_a_second_look_is_shifted_wherever_the_image_reaches() -> None:
    face, asked = mean_shape() * 50 + (900, 300), []

    def model(image: np.ndarray, boxes: np.ndarray, /) -> Keypoints:
        asked.append(np.asarray(boxes))
        return Keypoints(np.float32([face] * len(boxes)), boxes, np.zeros((len(boxes), 2, 3)), (720, 1280), None)

    track = Tracker(model, lambda image: np.array([[850.0, 250, 950, 350]]))
    track(np.zeros((720, 1280, 3), np.uint8), 0.0)
    first, second = asked[-1]
    np.testing.assert_allclose(second, second_looks(first[None])[0])
