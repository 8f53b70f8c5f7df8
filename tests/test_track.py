"""The tracker on made-up faces: ids, detections, settings and looks."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_runtime.detector_by_name import load_detector
from kp_runtime.errors import ImageError, InputError
from kp_runtime.frame import Frame
from kp_runtime.geometry import boxes_from_points, overlaps
from kp_runtime.pipeline import load
from kp_runtime.results import Keypoints
from kp_runtime.track import LOST, Tracker, TrackerSettings, disagreement, second_looks
from kp_train.synthetic import mean_shape
from tests.conftest import DETECTOR
from tests.face_world import IMAGE, World, ids

LITE = Path(__file__).resolve().parents[1] / "engines" / "resnet18-68-lite"

pytestmark = pytest.mark.usefixtures("says")


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
