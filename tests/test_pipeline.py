from __future__ import annotations

import os
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kp_runtime import BackendError, BoxError, Frame, ImageError, InputError, MissingExtraError, Model, StageTimer, load
from kp_runtime.backend import Backend
from kp_runtime.cores import usable_cores
from kp_runtime.geometry import boxes_from_points
from kp_runtime.pipeline import boxes_of_next_look, checked_boxes
from kp_runtime.scheme68 import MIRROR
from kp_runtime.spec import ModelSpec
from tests.conftest import no_thread_at
from tests.models import SIZE, tiny_keypoints
from tests.reference import reference_crop, waves
from tests.tolerances import MAP_PX, assert_close

BOX = [100.0, 60.0, 180.0, 150.0]
LEVEL_PX = 0.4 / 255 * 90 * 1.3 / SIZE + MAP_PX
"""The tiny network moves by the crop's mean grey level, which the crop gives to 0.4; in pixels of the image."""


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return load(bundle, threads=1)


@pytest.fixture
def image() -> np.ndarray:
    grey = waves(240, 320, 40)
    return np.dstack([grey, grey, grey])


def test_keypoints_in_pixels_of_the_image(model: Model, image: np.ndarray) -> None:
    result = model(image, [BOX])
    crop = reference_crop(image[:, :, 0], np.array(BOX), SIZE, 1.3)
    xy_crop = tiny_keypoints(crop[None, None])[0].astype(np.float64)
    wanted = (xy_crop - (SIZE - 1) / 2) * (1.3 * 90 / SIZE) + (140, 105)
    assert_close(result.xy[0], wanted, LEVEL_PX, "keypoints")
    assert (result.xy.dtype, result.size_hw, len(result)) == (np.float32, (240, 320), 1)
    assert result.boxes_xyxy.tolist() == [BOX]


def test_a_machine_that_cuts_crops_wrongly_opens_no_model(
    bundle: Path, bundle_with_image: Path, request: pytest.FixtureRequest
) -> None:
    assert load(bundle_with_image, threads=1).backend.check_crops() == 0
    request.getfixturevalue("half_a_pixel_off")
    with pytest.raises(BackendError, match=r"golden crop is cut with a grey level \d+ off \(at most 1 is right\)"):
        load(bundle_with_image, threads=1)
    load(bundle_with_image, threads=1, golden=False)
    assert load(bundle, threads=1).backend.check_crops() is None  # a golden crop of before, without an image


def test_a_model_for_crops_of_one_s_own_opens_without_opencv(
    bundle_with_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    model = load(bundle_with_image, threads=1)
    assert model.backend.check_crops() is None
    with pytest.raises(MissingExtraError, match="opencv"):
        model(np.zeros((240, 320, 3), np.uint8), [BOX])


@pytest.mark.parametrize("n", [0, 1, 100])
def test_any_number_of_faces(n: int, model: Model, image: np.ndarray, rng: np.random.Generator) -> None:
    corner = rng.uniform(-10, 200, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(20, 90, (n, 2))], axis=1)
    result = model(image, boxes)
    assert (result.xy.shape, result.crop_from_image.shape) == ((n, 68, 2), (n, 2, 3))
    for box, xy in zip(boxes, result.xy, strict=True):
        assert_close(model(image, [box]).xy[0], xy, MAP_PX, "one face alone")


@pytest.mark.parametrize("empty", [[], np.empty((0, 4)), [[]]])
def test_every_way_to_say_no_box(empty: object, model: Model, image: np.ndarray) -> None:
    assert model(image, empty).xy.shape == (0, 68, 2)  # type: ignore[arg-type]


def test_grey_rgb_and_rgba_images(model: Model, rng: np.random.Generator) -> None:
    bgr = rng.integers(0, 256, (240, 320, 3), dtype=np.uint8)
    wanted = model(bgr, [BOX]).xy
    alpha = np.full((240, 320), 9, np.uint8)
    for image, layout in (
        (bgr[:, :, ::-1], "rgb"),
        (np.dstack([bgr, alpha]), "bgr"),
        (np.dstack([bgr[:, :, ::-1], alpha]), "rgb"),
        (Frame(bgr, "bgr").luma(0, 0, 320, 240), "bgr"),
    ):
        assert np.array_equal(model(image, [BOX], layout=layout).xy, wanted)
    assert not np.array_equal(model(bgr, [BOX], layout="rgb").xy, wanted)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0, 0, np.nan, 9]], r"box 0 \[0\.0, 0\.0, nan, 9\.0\] is not finite"),
        ([BOX, [np.inf, 0, np.inf, 9]], "box 1 .* is not finite"),
        ([[-np.inf, 0, 9, 9]], "is not finite"),
        ([[10, 10, 10, 10]], "is under one pixel wide and high"),
        ([[10, 10, 10.9, 10.9]], "is under one pixel wide and high"),
        ([[40, 40, 10, 10]], r"ends before it begins \(the order is x0, y0, x1, y1\)"),
        ([[40, 10, 39, 40]], "ends before it begins"),
        ([[320, 10, 400, 40]], "lies outside the 320 x 240 image"),
        ([[-50, 10, 0, 40]], "lies outside the 320 x 240 image"),
        ([[10, -50, 40, 0]], "lies outside the 320 x 240 image"),
        ([[10, 240, 40, 290]], "lies outside the 320 x 240 image"),
        ([[-1e5, 10, 10, 40]], "is over 100 times the image"),
        ([[-1e308, -1e308, 1e308, 1e308]], "is over 100 times the image"),
        (BOX, r"got shape \(4,\); one box is \[\[x0, y0, x1, y1\]\]"),
        ([[1, 2, 3]], r"must be \(n, 4\) as x0, y0, x1, y1, got shape \(1, 3\)"),
        ([[BOX]], r"got shape \(1, 1, 4\)"),
        ([BOX, [1, 2]], "boxes must be numbers"),
        ("left", "boxes must be numbers.*could not convert"),
        ([["a", "b", "c", "d"]], "boxes must be numbers"),
        ([[0, 0, 10**400, 9]], "boxes must be numbers"),
        (None, r"got shape \(\)"),
    ],
)
def test_bad_boxes(boxes: object, message: str) -> None:
    with pytest.raises(BoxError, match=message):
        checked_boxes(boxes, (240, 320))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "box", [[-60, -60, 1, 1], [319, 239, 400, 400], [5, 5, 6, 6], [5, 5, 5, 6], [-5000, -5000, 5000, 5000]]
)
def test_boxes_at_the_limits_work(box: list[float], model: Model, image: np.ndarray) -> None:
    assert np.isfinite(model(image, [box]).xy).all()


def test_bad_image_and_bad_box_are_refused_by_the_model(model: Model, image: np.ndarray) -> None:
    with pytest.raises(ImageError, match="got uint16"):
        model(image.astype(np.uint16), [BOX])  # type: ignore[arg-type]
    with pytest.raises(BoxError, match="outside the 320 x 240"):
        model(image, [[400, 10, 500, 90]])


def test_stages_are_timed_in_order(model: Model, image: np.ndarray) -> None:
    timer = StageTimer()
    for _ in range(3):
        model(image, [BOX], timer=timer)
    assert {name: len(times) for name, times in timer.seconds.items()} == {"crop": 3, "infer": 3, "map back": 3}
    assert list(timer.seconds) == ["crop", "infer", "map back"]


def test_a_result_keeps_its_boxes_when_the_caller_uses_the_array_again(model: Model, image: np.ndarray) -> None:
    boxes = np.array([[10.0, 10, 50, 50]])
    found = model(image, boxes)
    boxes += 5
    assert found.boxes_xyxy.tolist() == [[10, 10, 50, 50]]


def test_out_is_the_result_and_may_be_used_again(model: Model, image: np.ndarray) -> None:
    out = np.zeros((1, 68, 2), np.float32)
    result = model(image, [BOX], out=out)
    assert result.xy is out
    assert np.array_equal(out, model(image, [BOX]).xy)
    for wrong in (np.zeros((2, 68, 2), np.float32), np.zeros((1, 68, 2))):
        with pytest.raises(InputError, match=r"out must be a writable float32 array \(1, 68, 2\), got float"):
            model(image, [BOX], out=wrong)
    locked = np.empty((1, 68, 2), np.float32)
    locked.flags.writeable = False
    for wrong in ([1], locked):
        with pytest.raises(InputError, match="out must be a writable float32 array"):
            model(image, [BOX], out=wrong)  # type: ignore[arg-type]


def test_a_second_look_is_a_call_with_the_box_of_the_points(model: Model, image: np.ndarray) -> None:
    boxes = [[20, 30, 80, 100], [60, 40, 130, 90]]
    first = model(image, boxes)
    second = model(image, boxes_from_points(first.xy))
    for looks, right in ((1, first), (2, second), (3, model(image, boxes_from_points(second.xy)))):
        found = model(image, boxes, looks=looks)
        assert np.array_equal(found.xy, right.xy)
        assert np.array_equal(found.crop_from_image, right.crop_from_image)
        assert np.array_equal(found.boxes_xyxy, boxes)
    out = np.empty((2, 68, 2), np.float32)
    assert model(image, boxes, looks=2, out=out).xy is out
    assert np.array_equal(out, second.xy)
    assert len(model(image, [], looks=2)) == 0


def test_a_second_look_is_taken_as_the_first_was(model: Model, image: np.ndarray) -> None:
    colours, boxes, timer = (image * (1.0, 0.5, 0.2)).astype(np.uint8), [[20, 30, 80, 100]], StageTimer()
    first = model(colours, boxes, layout="rgb", mirror=True)
    second = model(colours, boxes_from_points(first.xy), layout="rgb", mirror=True)
    assert np.array_equal(model(colours, boxes, layout="rgb", mirror=True, looks=2, timer=timer).xy, second.xy)
    assert {name: len(times) for name, times in timer.seconds.items()} == {"crop": 2, "infer": 2, "map back": 2}


class OneSpot(Backend):
    name = "one spot"

    def _run(self, crops: np.ndarray) -> list[np.ndarray]:
        return [np.full((len(crops), 68, 2), 5, np.float32)]


@pytest.mark.parametrize(("output", "wrong"), [(0, np.nan), (0, -np.inf), (1, np.nan)])
def test_points_that_are_no_numbers_are_no_answer(
    output: int, wrong: float, bundle: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They went into files as they were: NaN is no JSON."""
    model, boxes, out = load(bundle, threads=1), [BOX, [20, 30, 80, 100]], np.ones((2, 68, 2), np.float32)
    right = model.backend._run

    def overflowing(crops: np.ndarray) -> list[np.ndarray]:
        given = [array.copy() for array in right(crops)]
        given[output][1, -1] = wrong
        return given

    monkeypatch.setattr(model.backend, "_run", overflowing)
    message = "model.fp32.onnx on ort-cpu answers points that are not finite, as fp16 does that overflows; take fp32"
    for call in (
        lambda: model(image, boxes, out=out),
        lambda: model(image, boxes, timer=StageTimer(), mirror=True),
        lambda: model.submit(image, boxes).result(60),
    ):
        with pytest.raises(BackendError, match=message):
            call()
    assert (out == 1).all()
    model.close()


def test_a_second_look_that_has_no_box_leaves_the_first(image: np.ndarray) -> None:
    model = Model(OneSpot(ModelSpec("x", SIZE)))
    assert np.array_equal(model(image, [[20, 30, 80, 100]], looks=2).xy, model(image, [[20, 30, 80, 100]]).xy)


def test_a_second_look_at_points_on_one_line_goes_by_their_length() -> None:
    boxes = boxes_of_next_look(np.array([[[30.0, 40], [70, 40]]]), np.array([[10.0, 10, 90, 90]]), [(100, 100)])
    assert checked_boxes(boxes, (100, 100)).tolist() == [[30, 40, 70, 40]]


def test_a_look_at_the_mirror_image_counts_as_much_as_the_plain_one(model: Model, image: np.ndarray) -> None:
    boxes = np.array([[20, 30, 80, 100], [60, 40, 130, 90]])
    last = image.shape[1] - 1
    plain, both = model(image, boxes), model(image, boxes, mirror=True)
    in_mirror = model(image[:, ::-1], np.stack([last - boxes[:, 2], boxes[:, 1], last - boxes[:, 0], boxes[:, 3]], 1))
    back = in_mirror.xy[:, MIRROR] * (-1, 1) + (last, 0)
    assert np.abs(back - plain.xy).max() > 1  # the two are not alike
    assert_close(both.xy, (plain.xy + back) / 2, LEVEL_PX, "keypoints")
    assert_close(both.lost_score, (plain.lost_score + in_mirror.lost_score) / 2, 1e-5, "lost scores")
    assert np.array_equal(both.crop_from_image, plain.crop_from_image)
    assert np.array_equal(model(image, boxes, mirror=True, looks=2).boxes_xyxy, boxes)
    out = np.empty((2, 68, 2), np.float32)
    assert model(image, boxes, mirror=True, out=out).xy is out
    assert np.array_equal(out, both.xy)
    assert len(model(image, [], mirror=True)) == 0


def test_looks_that_cannot_be(model: Model, image: np.ndarray) -> None:
    for looks in (0, "2", 2.0):
        with pytest.raises(InputError, match=f"looks must be 1 or more; got {looks!r}"):
            model(image, [[20, 30, 80, 100]], looks=looks)  # type: ignore[arg-type]
    whole = Model(OneSpot(ModelSpec("x", SIZE, box="frame")))
    with pytest.raises(InputError, match="looks must be 1, since this model sees whole frames; got 2"):
        whole(image, [[20, 30, 80, 100]], looks=2)
    five = Model(OneSpot(ModelSpec("x", SIZE, points=5, scheme="own")))
    with pytest.raises(InputError, match="this model has 5: leave mirror out"):
        five(image, [], mirror=True)


def test_a_model_is_made_of_an_engine() -> None:
    with pytest.raises(InputError, match=r"a Model is made of an open engine, got str; load\(…\) opens a bundle"):
        Model("bundle")  # type: ignore[arg-type]


def test_working_memory_is_used_again_and_results_are_not_shared(model: Model, image: np.ndarray) -> None:
    """A thousand calls leave less behind than a hundredth of a crop each: the interpreter's free lists."""
    first = model(image, [BOX])
    kept = first.xy.copy()
    for _ in range(10):
        model(image, [[20.0, 20.0, 200.0, 200.0]])
    tracemalloc.start()
    try:
        for _ in range(10):
            model(image, [[20.0, 20.0, 200.0, 200.0]])
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1000):
            model(image, [[20.0, 20.0, 200.0, 200.0]])
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 1000 * SIZE * SIZE / 100
    assert np.array_equal(first.xy, kept)


def test_threads_do_not_share_working_memory(model: Model, image: np.ndarray) -> None:
    boxes = [[[10.0 + i, 20.0, 90.0 + 3 * i, 120.0]] for i in range(40)]
    wanted = [model(image, box).xy for box in boxes]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(lambda box: model(image, box).xy, boxes), wanted, strict=True):
                assert np.array_equal(got, want)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_faces_are_cut_on_the_engines_number_of_threads(threads: int, bundle: Path, image: np.ndarray) -> None:
    if threads > usable_cores():
        pytest.skip("one core")
    boxes = np.tile([[20.0, 30, 80, 100]], (8, 1)) + np.arange(8)[:, None]
    with load(bundle, threads=threads) as model:
        found = model(image, boxes)
        cutting = [thread for thread in threading.enumerate() if thread.name.startswith("kp-crops")]
        assert len(cutting) == threads - 1
        assert np.array_equal(found.xy, np.concatenate([model(image, box[None]).xy for box in boxes]))
    assert not any(thread.is_alive() for thread in cutting)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_many_faces_are_cut_on_the_engines_cores(image: np.ndarray) -> None:
    backend, core = OneSpot(ModelSpec("x", SIZE)), min(os.sched_getaffinity(0))
    backend.threads, backend.cores = 2, frozenset([core])
    with Model(backend) as model:
        model(image, [BOX] * 8)
        (cutting,) = [thread for thread in threading.enumerate() if thread.name.startswith("kp-crops")]
        assert os.sched_getaffinity(cutting.native_id or 0) == {core}


def test_a_submitted_call_is_the_same_call(bundle: Path, image: np.ndarray) -> None:
    colours, out = (image * (1.0, 0.5, 0.2)).astype(np.uint8), np.empty((1, 68, 2), np.float32)
    with load(bundle, threads=1) as model:
        assert model.submit(colours, [BOX], layout="rgb", out=out).result(60).xy is out
        assert np.array_equal(out, model(colours, [BOX], layout="rgb").xy)
    closed = load(bundle, threads=1)
    closed.close()
    for call in (lambda: closed.submit(colours, [BOX]), closed.warmup):
        with pytest.raises(BackendError, match="this model is closed"):
            call()


def test_a_submit_without_a_thread_leaves_the_next_one_right(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, boxes = np.zeros((80, 80, 3), np.uint8), [[10, 10, 60, 60]]
    with load(bundle, threads=1) as model:
        no_thread_at(monkeypatch, 1)
        with pytest.raises(BackendError, match="no thread could be started"):
            model.submit(image, boxes)
        assert np.array_equal(model.submit(image, boxes).result(60).xy, model(image, boxes).xy)
