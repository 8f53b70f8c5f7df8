from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from kp_runtime import geometry
from kp_runtime.errors import InputError, KpWarning, MissingExtraError
from kp_runtime.geometry import (
    CropPlan,
    apply_matrix,
    box_of_face,
    boxes_from_points,
    boxes_to_compare,
    crop_from_luma,
    crop_from_window,
    crop_plan,
    frame_box,
    invert_matrix,
    matrices_from_boxes,
    mirrored_matrices,
)
from tests.reference import bilinear, reference_bits, reference_blocks, reference_crop, waves
from tests.tolerances import CROP_GREY, CROP_GREY_MEAN, CROP_NOISE, CROP_NOISE_MEAN, MAP_PX, assert_close

SIZE, MARGIN = 64, 1.3
BOXES = {
    "20 px": (100.2, 80.7, 120.2, 99.1),
    "100 px": (90.5, 60.25, 190.5, 150.0),
    "over the left top": (-60.0, -40.0, 70.0, 80.0),
    "over the right bottom": (330.0, 250.5, 450.0, 380.0),
    "blocks of 2": (50.0, 40.0, 155.0, 130.0),
    "blocks of 5": (60.0, 20.3, 330.0, 280.0),
    "larger than the image": (-200.0, -300.0, 700.0, 600.0),
}


def one_matrix(box: tuple[float, ...], angle: float = 0.0, size: int = SIZE) -> np.ndarray:
    return matrices_from_boxes(np.array([box]), size, MARGIN, angle=angle)[0]


def check_crop(luma: np.ndarray, box: tuple[float, ...], angle: float, size: int, most: float, mean: float) -> None:
    crop = crop_from_luma(luma, one_matrix(box, angle, size), size)
    wanted = reference_crop(luma, np.array(box), size, MARGIN, angle)
    assert_close(crop, wanted, most, "crop")
    assert np.abs(crop - wanted).mean() <= mean


@pytest.mark.parametrize("angle", [0.0, 0.4, -2.0])
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
def test_crop_follows_the_rule(box: tuple[float, ...], angle: float, rng: np.random.Generator) -> None:
    period = max(24.0, (box[2] - box[0]) / 4)
    check_crop(waves(301, 403, period), box, angle, SIZE, CROP_GREY, CROP_GREY_MEAN)
    noise = rng.integers(0, 256, (301, 403), dtype=np.uint8)
    check_crop(noise, box, angle, SIZE, CROP_NOISE, CROP_NOISE_MEAN)


@pytest.mark.parametrize("angle", [0.0, 0.4])
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
def test_a_mirrored_matrix_cuts_the_crop_mirrored(box: tuple[float, ...], angle: float) -> None:
    luma, matrix = waves(301, 403, max(24.0, (box[2] - box[0]) / 4)), one_matrix(box, angle)
    mirrored = mirrored_matrices(matrix[None], SIZE)[0]
    assert np.linalg.det(mirrored[:, :2]) < 0
    # positions are rounded to 1/32 px, and the mirrored ones the other way
    assert_close(crop_from_luma(luma, mirrored, SIZE)[:, ::-1], crop_from_luma(luma, matrix, SIZE), CROP_GREY, "crop")
    np.testing.assert_allclose(mirrored_matrices(mirrored[None], SIZE)[0], matrix, rtol=1e-12)


@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_face_of_2000_px(angle: float, rng: np.random.Generator) -> None:
    box = (251.0, 130.5, 2251.0, 2030.0)
    assert crop_plan(one_matrix(box, angle, 224), 224, (2203, 2502)).block == 11
    check_crop(waves(2203, 2502, 500), box, angle, 224, CROP_GREY, CROP_GREY_MEAN)
    noise = rng.integers(0, 256, (2203, 2502), dtype=np.uint8)
    check_crop(noise, box, angle, 224, CROP_NOISE, CROP_NOISE_MEAN)


def test_identity_matrix_copies_the_pixels(rng: np.random.Generator) -> None:
    luma = rng.integers(0, 256, (80, 90), dtype=np.uint8)
    matrix = matrices_from_boxes(np.array([[10, 5, 74, 69]]) - 0.5, 64, 1.0)[0]
    assert np.array_equal(crop_from_luma(luma, matrix, 64), luma[5:69, 10:74])


def test_blocks_of_an_even_scale_are_exact_means(rng: np.random.Generator) -> None:
    luma = rng.integers(0, 256, (3 * 64, 3 * 64), dtype=np.uint8)
    matrix = matrices_from_boxes(np.array([[0, 0, 192, 192]]) - 0.5, 64, 1.0)[0]
    assert np.array_equal(crop_from_luma(luma, matrix, 64), np.floor(reference_blocks(luma, 3) + 0.5))


@pytest.mark.parametrize("k", [2, 3, 4, 15, 16, 40])
def test_block_means_are_exact_for_every_size(k: int, rng: np.random.Generator) -> None:
    luma = rng.integers(0, 256, (5 * k - 1, 7 * k - 2), dtype=np.uint8)
    luma[:k, :k] = 255
    plan = CropPlan(0, 0, luma.shape[1], luma.shape[0], k, np.array([[1.0, 0, 0], [0, 1.0, 0]]))
    wanted = np.floor(reference_blocks(luma, k) + 0.5)
    assert np.array_equal(crop_from_window(luma, plan, 5)[:, :5], wanted[:5, :5])


@pytest.mark.parametrize("k", [15, 16, 17, 4096, 4105])
def test_white_blocks_of_any_size_stay_white(k: int) -> None:
    plan = CropPlan(0, 0, 40, 30, k, np.array([[1.0, 0, 0], [0, 1.0, 0]]))
    assert (crop_from_window(np.full((30, 40), 255, np.uint8), plan, 2) == 255).all()


@pytest.mark.parametrize("angle", [0.0, 0.1, 0.15, 0.4])  # the scale of some is a bit off in floats
@pytest.mark.parametrize(("side", "k"), [(10, 1), (127, 1), (128, 1), (129, 2), (191, 2), (192, 3), (640, 10)])
def test_block_is_the_floor_of_the_scale(side: float, k: int, angle: float) -> None:
    matrix = matrices_from_boxes(np.array([[5, 5, 5 + side, 5 + side]]), 64, 1.0, angle=angle)[0]
    assert crop_plan(matrix, 64, (900, 900)).block == k


def origin(plan: CropPlan) -> np.ndarray:
    """What a plan's map gains when the window is the whole image, in blocks."""
    return np.array([[0, 0, plan.x0 / plan.block], [0, 0, plan.y0 / plan.block]])


def warp_in_floats(source: np.ndarray, matrix: np.ndarray, size_wh: tuple[int, int], **_: object) -> np.ndarray:
    """An OpenCV's that samples as version 5 does."""
    y, x = np.mgrid[: size_wh[1], : size_wh[0]]
    (a, b, c), (d, e, f) = matrix
    return np.rint(bilinear(source, a * x + b * y + c, d * x + e * y + f)).astype(np.uint8)


@pytest.fixture
def way_asked_anew() -> Iterator[None]:
    """What an OpenCV can is found anew, in the test and after it."""
    asked = geometry.way_to_sample, geometry._halves_exactly
    for question in asked:
        question.cache_clear()
    yield
    for question in asked:
        question.cache_clear()


@pytest.mark.usefixtures("way_asked_anew")
def test_the_fastest_way_that_gives_the_bits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    four = cv2.__version__.startswith("4.")
    assert geometry.way_to_sample() is (geometry._by_warp if four else geometry._by_remap)
    geometry.way_to_sample.cache_clear()
    monkeypatch.setattr(cv2, "warpAffine", warp_in_floats)
    assert geometry.way_to_sample() is geometry._by_remap
    geometry.way_to_sample.cache_clear()
    monkeypatch.setattr(cv2, "remap", lambda source, pixels, *_, **__: np.zeros(pixels.shape[:2], np.uint8))
    with pytest.warns(KpWarning, match="samples otherwise than the models were trained with; crops are right"):
        crop_from_luma(waves(60, 60, 20), one_matrix((5, 5, 40, 40)), SIZE)
    assert geometry.way_to_sample() is geometry._by_numpy


@pytest.mark.usefixtures("way_asked_anew")
@pytest.mark.parametrize("wrong", ["takes one pixel of four", "rounds halves down"])
def test_an_opencv_that_averages_otherwise_is_not_used_for_it(
    wrong: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    luma, matrix = rng.integers(0, 256, (141, 150), dtype=np.uint8), one_matrix((20, 10, 130, 120))
    assert crop_plan(matrix, SIZE, luma.shape).block == 2
    wanted = crop_from_luma(luma, matrix, SIZE)
    assert geometry._halves_exactly()
    geometry._halves_exactly.cache_clear()

    def resize(source: np.ndarray, size_wh: tuple[int, int], dst: np.ndarray, interpolation: int) -> None:
        four = source.reshape(size_wh[1], 2, size_wh[0], 2).astype(int)
        dst[:] = four[:, 0, :, 0] if wrong == "takes one pixel of four" else (four.sum(axis=(1, 3)) + 1) // 4

    monkeypatch.setattr(cv2, "resize", resize)
    assert np.array_equal(crop_from_luma(luma, matrix, SIZE), wanted)


@pytest.mark.parametrize("way", ["as installed", "_by_remap", "_by_numpy"])
@pytest.mark.parametrize(
    "kind", ["upright", "mirrored", "turned", "sheared", "leaning", "far away", "farther", "a point"]
)
def test_every_bit_is_the_same_in_every_way(
    kind: str, way: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "as installed":
        monkeypatch.setattr(geometry, "way_to_sample", lambda: getattr(geometry, way))
    luma = rng.integers(0, 256, (120, 150), dtype=np.uint8)
    for _ in range(20):
        scale, angle = rng.uniform(0.1, 2), rng.uniform(-3, 3)
        matrix = np.array([[scale, 0, rng.uniform(-60, 150)], [0, scale, rng.uniform(-60, 120)]])
        if kind == "mirrored":
            matrix[0, 0] *= -1
        elif kind == "turned":
            matrix[:, :2] = [
                [scale * np.cos(angle), -scale * np.sin(angle)],
                [scale * np.sin(angle), scale * np.cos(angle)],
            ]
        elif kind == "sheared":
            matrix[:, :2] = rng.uniform(-2, 2, (2, 2))
        elif kind == "leaning":
            matrix[(0, 1), (1, 0)] = rng.permutation([0.0, rng.uniform(-2, 2)])
        elif kind in ("far away", "farther"):
            matrix[rng.integers(2), 2] = rng.choice([-1, 1]) * (40_000 if kind == "far away" else 500_000)
        elif kind == "a point":
            matrix[:, :2] = 0
        plan = CropPlan(0, 0, 150, 120, 1, matrix)
        for size in (37, SIZE):
            assert np.array_equal(crop_from_window(luma, plan, size), reference_bits(luma, matrix, size))


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
def test_window_gives_the_same_bits_as_the_whole_image(box: tuple[float, ...], rng: np.random.Generator) -> None:
    luma = rng.integers(0, 256, (301, 403), dtype=np.uint8)
    for angle in (0.0, *rng.uniform(-3, 3, 8)):
        matrix = one_matrix(box, float(angle))
        plan = crop_plan(matrix, SIZE, (301, 403))
        moved = plan.source_from_crop + origin(plan)
        whole = dataclasses.replace(plan, x0=0, y0=0, x1=403, y1=301, source_from_crop=moved)
        cut = crop_from_window(luma[plan.y0 : plan.y1, plan.x0 : plan.x1], plan, SIZE)
        assert np.array_equal(cut, crop_from_window(luma, whole, SIZE))


@pytest.mark.parametrize("box", [(-500, -500, -400, -400), (5000, 10, 5100, 110), (0, 9000, 3000, 12000)])
def test_window_outside_the_image_is_never_empty(box: tuple[float, ...]) -> None:
    window = crop_plan(one_matrix(box), SIZE, (301, 403))
    assert 0 <= window.x0 < window.x1 <= 403
    assert 0 <= window.y0 < window.y1 <= 301


def test_window_of_a_small_face_is_small() -> None:
    window = crop_plan(one_matrix((1000, 1000, 1020, 1020)), SIZE, (4000, 4000))
    assert max(window.x1 - window.x0, window.y1 - window.y0) <= 34


def test_out_is_filled_in_place_and_the_image_is_not_touched(rng: np.random.Generator) -> None:
    luma = rng.integers(0, 256, (301, 403), dtype=np.uint8)
    before = luma.copy()
    luma.setflags(write=False)
    for box in BOXES.values():
        out = np.zeros((SIZE, SIZE), np.uint8)
        plan = crop_plan(one_matrix(box), SIZE, (301, 403))
        crop = crop_from_window(luma[plan.y0 : plan.y1, plan.x0 : plan.x1], plan, SIZE, out=out)
        assert np.shares_memory(crop, out)
        assert np.array_equal(out, crop_from_luma(luma, one_matrix(box), SIZE))
    assert np.array_equal(luma, before)


def test_square_centre_and_side() -> None:
    matrix = one_matrix((100, 50, 180, 90))
    side = MARGIN * 80
    corners = np.array([[140 - side / 2, 70 - side / 2], [140 + side / 2, 70 + side / 2]])
    assert_close(apply_matrix(matrix, corners), [[-0.5, -0.5], [63.5, 63.5]], MAP_PX, "corners of the square")


def test_angle_shift_and_zoom() -> None:
    box = np.array([[100.0, 50.0, 180.0, 90.0]])
    matrix = matrices_from_boxes(box, SIZE, MARGIN, angle=[np.pi / 2], shift=(0.1, -0.2), zoom=2.0)[0]
    side = MARGIN * 80 * 2
    centre = np.array([140 + 0.1 * side, 70 - 0.2 * side])
    got = apply_matrix(matrix, centre + np.array([[0, 0], [side / 4, 0]]))
    # a square turned by +90 degrees (y down) sees the image's right at its top
    assert_close(got, [[31.5, 31.5], [31.5, 31.5 - 16]], MAP_PX, "centre, and a quarter to the right")


def test_there_and_back(rng: np.random.Generator) -> None:
    corner = rng.uniform(-100, 2000, (50, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 2000, (50, 2))], axis=1)
    matrices = matrices_from_boxes(boxes, 224, MARGIN, angle=rng.uniform(-3, 3, 50))
    xy = rng.uniform(0, 224, (50, 68, 2))
    back = apply_matrix(matrices, apply_matrix(invert_matrix(matrices), xy))
    assert_close(back, xy, MAP_PX, "crop to image to crop")


def test_zero_boxes() -> None:
    matrices = matrices_from_boxes(np.empty((0, 4)), SIZE, MARGIN)
    assert matrices.shape == (0, 2, 3)
    assert invert_matrix(matrices).shape == (0, 2, 3)
    assert apply_matrix(matrices, np.empty((0, 68, 2))).shape == (0, 68, 2)


def test_boxes_from_points() -> None:
    xy = np.array([[[3, 4], [1, 9], [2, 5]], [[0, 0], [5, -1], [1, 1]]], np.float32)
    assert boxes_from_points(xy).tolist() == [[1, 4, 3, 9], [0, -1, 5, 1]]
    assert boxes_from_points(xy[:0]).shape == (0, 4)
    for wrong in (xy[0, 0], xy[:, :0], np.concatenate([xy, xy], axis=2)):
        with pytest.raises(
            InputError, match=rf"points must be \(\.\.\., p, 2\) .*got shape {re.escape(str(wrong.shape))}"
        ):
            boxes_from_points(wrong)


@pytest.mark.parametrize("size_hw", [(250, 250), (250, 400), (600, 250)])
def test_frame_box_is_the_original_view(size_hw: tuple[int, int]) -> None:
    x0, y0, x1, y1 = frame_box(size_hw)
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == ((size_hw[1] - 1) / 2, (size_hw[0] - 1) / 2)
    assert x1 - x0 == pytest.approx(224)
    assert y1 - y0 == pytest.approx(224)


def test_without_opencv_the_error_has_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kp-edge\[image\]'"):
        crop_from_luma(np.zeros((50, 50), np.uint8), one_matrix((5, 5, 40, 40)), SIZE)


def test_a_detectors_box_of_a_face_overlaps_most_and_by_over_a_quarter() -> None:
    truth, quarter = np.repeat([[0.0, 0], [8, 8]], 34, axis=0), np.array([0.0, 0, 4, 4])
    boxes = np.array([quarter, [0, 0, 8, 5], [0, 0, 8, 7], [50, 50, 90, 90]])
    assert box_of_face(boxes, truth).tolist() == [0, 0, 8, 7]
    assert box_of_face(boxes[[0, 3]], truth) is None
    assert box_of_face(np.empty((0, 4)), truth) is None


@pytest.mark.parametrize("height", [0.0, 1.0, 40.0])
def test_a_box_of_the_68_is_of_a_face_whose_own_points_span_less(height: float) -> None:
    eyes = np.array([[30.0, 40], [70, 40 + height]])
    of_it, neighbour, in_it = [0.0, 0, 100, 100], [65.0, 0, 165, 100], [45.0, 35, 55, 45]
    assert box_of_face(np.array([neighbour, of_it, in_it]), eyes).tolist() == of_it
    assert box_of_face(np.array([neighbour]), eyes) is None


def test_flat_boxes_are_compared_thicker_with_the_same_crop() -> None:
    level, usual = np.array([[10.0, 20], [70, 20]]), np.array([[10.0, 20], [70, 40]])
    assert boxes_to_compare(np.stack([level, usual])).tolist() == [[10, 10, 70, 30], [10, 20, 70, 40]]
    assert boxes_to_compare(level[:, ::-1]).tolist() == [10, 10, 30, 70]
