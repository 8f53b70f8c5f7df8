from __future__ import annotations

import numpy as np
import pytest

from kp_runtime.scheme68 import CONTOURS, EYE_CORNERS, MIRROR, POINTS, REGIONS, point_names
from kp_train.synthetic import mean_shape
from tests.tolerances import assert_close


def test_regions_share_out_all_points() -> None:
    assert sorted(i for region in REGIONS.values() for i in region) == list(range(POINTS))


def test_contours_reach_all_points_and_close_eyes_and_lips() -> None:
    assert {i for contour in CONTOURS.values() for i in contour} == set(range(POINTS))
    closed = {name for name, contour in CONTOURS.items() if contour[0] == contour[-1]}
    assert closed == {"left_eye", "right_eye", "outer_lip", "inner_lip"}


def test_mirror_undoes_itself_and_keeps_the_middle() -> None:
    assert np.array_equal(MIRROR[MIRROR], np.arange(POINTS))
    middle = [8, 27, 28, 29, 30, 33, 51, 57, 62, 66]
    assert np.flatnonzero(np.arange(POINTS) == MIRROR).tolist() == middle


def test_mirror_is_the_mirrored_face() -> None:
    face = mean_shape()
    assert_close(face[MIRROR] * (-1, 1), face, 1e-9, "mirrored face")


@pytest.mark.parametrize("name", REGIONS)
def test_mirror_stays_in_its_region(name: str) -> None:
    assert set(MIRROR[list(REGIONS[name])]) == set(REGIONS[name])


def test_mirror_can_not_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        MIRROR[0] = 1


def test_names() -> None:
    names = point_names()
    assert len(set(names)) == POINTS
    assert (names[0], names[30], names[67]) == ("jaw_0", "nose_bridge_3", "inner_lip_7")
    assert [names[i] for i in EYE_CORNERS] == ["left_eye_0", "right_eye_3"]
