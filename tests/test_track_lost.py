"""Faces that the tracker has lost: where they are awaited, by what id they come back, and when they are given up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kp_runtime.results import Keypoints
from kp_runtime.track import LOST, Tracker, TrackerSettings, _Face
from kp_train.synthetic import mean_shape
from tests.face_world import IMAGE, Way, World, ids

pytestmark = pytest.mark.usefixtures("says")


class Grown:
    """A model whose points lie far apart from the fourth frame on."""

    def __init__(self, world: World, side: int) -> None:
        self.world, self.spec, self.side = world, world.spec, side

    def __call__(self, image: np.ndarray, boxes_xyxy: object, /) -> Keypoints:
        found = self.world(image, boxes_xyxy)
        shape = mean_shape() / np.ptp(mean_shape(), axis=0).max()
        far = (shape * self.side + (640, 360)).astype(np.float32)
        return replace(found, xy=np.broadcast_to(far, found.xy.shape)) if self.world.now > 3 else found


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
