from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import numpy as np
import pytest

from kp_runtime.draw import draw_keypoints
from kp_runtime.effect_pictures import open_effect
from kp_runtime.errors import InputError
from kp_runtime.geometry import boxes_from_points
from kp_runtime.results import Keypoints
from kp_runtime.scheme68 import REGIONS
from tests.tolerances import MAP_PX, assert_close


def made_up(n: int) -> Keypoints:
    xy = np.random.default_rng(1).uniform(-5, 300, (n, 68, 2)).astype(np.float32)
    return Keypoints(xy, np.arange(n * 4, dtype=float).reshape(n, 4) / 3, np.zeros((n, 2, 3)), (240, 320))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_json_there_and_back(n: int) -> None:
    keypoints = made_up(n)
    raw = json.loads(json.dumps(keypoints.to_json()))
    assert (raw["height"], raw["width"], len(raw["faces"]), len(keypoints)) == (240, 320, n, n)
    for face, xy, box in zip(raw["faces"], keypoints.xy, keypoints.boxes_xyxy, strict=True):
        assert_close(face["keypoints_xy"], xy, MAP_PX, "points")
        assert_close(face["box_xyxy"], box, MAP_PX, "box")


def test_json_has_thousandths_of_a_pixel() -> None:
    for face in made_up(2).to_json()["faces"]:
        numbers = np.array([*np.ravel(face["keypoints_xy"]), *face["box_xyxy"]])
        assert (numbers == np.round(numbers, 3)).all()
        assert (numbers != np.round(numbers, 2)).any()


def test_a_lost_score_is_there_where_the_model_gives_one() -> None:
    plain = made_up(2)
    assert all("lost_score" not in face for face in plain.to_json()["faces"])
    scored = dataclasses.replace(plain, lost_score=np.array([0.12345, 1.5], np.float32))
    assert [face.pop("lost_score") for face in scored.to_json()["faces"]] == [0.123, 1.5]


def test_pts_counts_pixels_from_one() -> None:
    keypoints = made_up(2)
    lines = keypoints.to_pts(1).splitlines()
    assert (lines[:3], lines[-1], len(lines)) == (["version: 1", "n_points: 68", "{"], "}", 72)
    assert keypoints.to_pts(1).endswith("}\n")
    points = np.array([line.split(" ") for line in lines[3:-1]], float)
    assert_close(points - 1, keypoints.xy[1], MAP_PX, "points")


def test_a_face_that_there_is_not() -> None:
    assert made_up(2).to_pts(-1) == made_up(2).to_pts(1)
    with pytest.raises(InputError, match="there is no face 2 among 2, which are counted from 0"):
        made_up(2).to_pts(2)


@pytest.mark.parametrize("wrong", [made_up(1), "abc", [[1, 2], [3]]])
def test_points_that_are_no_array_of_numbers(wrong: Any) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    for use in (
        functools.partial(draw_keypoints, image),
        functools.partial(open_effect("blur"), image),
        boxes_from_points,
    ):
        with pytest.raises(
            InputError, match=r"points must be an array of numbers, got .* those of Keypoints are its xy"
        ):
            use(wrong)


def test_a_region_that_there_is_not() -> None:
    with pytest.raises(InputError, match="no region 'ear'; the regions of 68 points: jaw, brows, nose, eyes, mouth"):
        made_up(1).region("ear")
    own = dataclasses.replace(made_up(1), xy=np.zeros((1, 5, 2), np.float32))
    with pytest.raises(InputError, match="the regions of 5 points: none of a mark-up of your own: index xy instead"):
        own.region("jaw")


@pytest.mark.parametrize("name", REGIONS)
def test_region(name: str) -> None:
    keypoints = made_up(2)
    assert np.array_equal(keypoints.region(name), np.stack([keypoints.xy[:, i] for i in REGIONS[name]], axis=1))
