from __future__ import annotations

import numpy as np
import pytest

from kp_runtime.draw import draw_keypoints, put_boxes, put_label
from kp_runtime.errors import InputError
from kp_runtime.frame import Frame
from kp_train.synthetic import mean_shape

FACE = mean_shape() * 60 + (100, 120)


@pytest.fixture
def image() -> np.ndarray:
    return np.full((240, 200, 3), 40, np.uint8)


def test_points_are_where_they_belong(image: np.ndarray) -> None:
    drawn = draw_keypoints(image, FACE[None])
    for x, y in np.rint(FACE).astype(int):
        assert drawn[y, x].min() > 120
    touched = np.argwhere((drawn != image).any(axis=2))[:, ::-1]
    assert (touched.min(axis=0) >= FACE.min(axis=0) - 4).all()
    assert (touched.max(axis=0) <= FACE.max(axis=0) + 4).all()


@pytest.mark.parametrize("grey", [0, 40, 128, 210, 255])
@pytest.mark.parametrize("every", [1, 14])
def test_points_are_seen_on_any_grey(grey: int, every: int) -> None:
    """Of contrast 3 to 1 or more against the grey or against their own edge, as WCAG asks of graphics."""
    drawn = draw_keypoints(np.full((240, 200, 3), grey, np.uint8), FACE[::every], lines=False)
    seen = np.unique(drawn).astype(float)
    light = np.where(seen <= 10, seen / 3294.6, ((seen / 255 + 0.055) / 1.055) ** 2.4) + 0.05
    assert light.max() / light.min() > 3


def test_points_do_not_hide_a_small_face() -> None:
    small = (FACE - FACE.mean(axis=0)) * 24 / np.ptp(FACE, axis=0).max() + 30
    drawn = draw_keypoints(np.zeros((60, 60, 3), np.uint8), small)
    assert (drawn.max(axis=2) > 100).sum() < 0.55 * 24 * 24
    on_white = draw_keypoints(np.full((60, 60, 3), 255, np.uint8), small)
    assert on_white[..., 2].min() < 100  # in the colour of the lines


@pytest.mark.parametrize("grey", [0, 140, 255])
@pytest.mark.parametrize("side", [24, 100, 2000])
def test_a_label_is_as_large_as_its_box_asks_and_stays_on_the_picture(grey: int, side: int) -> None:
    blank = np.full((side * 3 // 2, side * 2, 3), grey, np.uint8)
    heights = []
    for top in (side * 3 / 4, -side / 2):
        drawn = blank.copy()
        put_label(drawn, "7", [side / 2, top, side * 1.5, top + side])
        rows = np.flatnonzero((drawn != grey).any(axis=(1, 2)))
        assert drawn.max() > 200
        assert drawn.min() < 60
        assert rows[0] > 0
        heights.append(np.ptp(rows))
    assert heights[0] == heights[1]
    assert min(side / 20, 60) < heights[0] < max(side / 5, 16)


def test_contours_can_be_left_out_and_coloured(image: np.ndarray) -> None:
    red = draw_keypoints(image, FACE[None], color=(0, 0, 255))
    points = draw_keypoints(image, FACE[None], lines=False)
    assert ((red[:, :, 2] > 200) & (red[:, :, 0] < 60)).any()
    assert (points != image).any(axis=2).sum() < (red != image).any(axis=2).sum()
    assert (points[:, :, 0] == points[:, :, 2]).all()


def test_a_colour_is_three_whole_numbers_of_any_kind(image: np.ndarray) -> None:
    """OpenCV refuses NumPy's by an error of its own, as in a colour of a palette."""
    red, palette = draw_keypoints(image, FACE, color=(0, 0, 255)), np.array([[0, 0, 255]], np.uint8)
    assert (draw_keypoints(image, FACE, color=tuple(palette[0])) == red).all()
    for wrong in ("red", (255, 0), (300, 0, 0), (0.5, 0, 0), None):
        with pytest.raises(InputError, match="a colour is three whole numbers from 0 to 255"):
            draw_keypoints(image, FACE, color=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(240, 200), (240, 200, 1), (240, 200, 3), (240, 200, 4)])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_any_image_and_any_number_of_faces(shape: tuple[int, ...], n: int) -> None:
    image = np.full(shape, 40, np.uint8)
    drawn = draw_keypoints(image, np.repeat(FACE[None], n, axis=0))
    assert drawn.shape == (240, 200, 3)
    assert (image == 40).all()
    assert (drawn == 40).all() == (n == 0)
    assert not np.shares_memory(drawn, image)


def test_frames_are_drawn_in_their_own_colours() -> None:
    """What a model takes, `draw_keypoints` and the effects take too."""
    none, blue = np.empty((0, 68, 2)), np.full((40, 50, 3), (200, 90, 10), np.uint8)
    grey, opaque = np.full((40, 50), 77, np.uint8), np.full((40, 50, 1), 255, np.uint8)
    frames = {
        "bgr": blue, "rgb": blue[:, :, ::-1], "bgra": np.dstack([blue, opaque]),
        "rgba": np.dstack([blue[:, :, ::-1], opaque]),
    }  # fmt: skip
    for layout, data in frames.items():
        np.testing.assert_array_equal(draw_keypoints(Frame(data, layout), none), blue)
    for data in (grey, grey[:, :, None]):
        assert (draw_keypoints(Frame(data, "gray"), none) == np.full((40, 50, 3), 77)).all()
    video = draw_keypoints(Frame(np.vstack([grey, opaque[:20, :, 0]]), "nv12", "limited"), none)
    assert video.shape == (40, 50, 3)
    assert (video == round((77 - 16) * 255 / 219)).all()


@pytest.mark.parametrize("scale", [0.01, 1e4, 1e9])
def test_tiny_and_huge_faces(scale: float, image: np.ndarray) -> None:
    assert draw_keypoints(image, (FACE * scale)[None]).shape == image.shape


def test_boxes(image: np.ndarray) -> None:
    drawn = image.copy()
    put_boxes(drawn, [[20, 30, 120, 150], [-1e9, -5, 1e9, 500]])
    assert (drawn[30, 20:121] != 40).any(axis=1).all()
    assert (drawn[60:140, 40:100] == 40).all()
    put_boxes(image, [])
    assert (image == 40).all()


@pytest.mark.parametrize("points", [FACE * np.nan, FACE * np.inf, FACE[:, :1], FACE[0]])
def test_points_that_are_none(points: np.ndarray, image: np.ndarray) -> None:
    with pytest.raises(InputError, match="keypoints must be finite numbers"):
        draw_keypoints(image, points)
