"""The lost score: views, places and the ridge regression by known answers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from kp_runtime.frame import Frame
from kp_runtime.geometry import boxes_from_points, overlaps
from kp_train.data import Face
from kp_train.lost_score import GONE, AnyPlace, ScoreQuality, elsewhere, score_quality, solved_score
from kp_train.synthetic import mean_shape


@pytest.fixture
def faces(tmp_path: Path, rng: np.random.Generator) -> list[Face]:
    """Small faces in large photos, and one that fills its photo."""
    found = []
    for i, size in enumerate((300, 400, 500, 90)):
        cv2.imwrite(str(tmp_path / f"{i}.png"), rng.integers(0, 255, (size, size), np.uint8))
        found.append(Face(tmp_path / f"{i}.png", (mean_shape() * 35 + size - 45).astype(np.float32)))
    return found


def test_an_error_that_is_linear_is_found_and_cut_off() -> None:
    """Twice the error is no more lost: the score ends at about 1."""
    torch.manual_seed(0)
    features = torch.cat([torch.rand(4000, 1), torch.ones(4000, 1)], dim=1).double()
    below = solved_score(features, 0.5 * GONE * features[:, 0])
    assert torch.allclose(features @ below, 0.5 * features[:, 0], atol=0.02)
    far, farther = (solved_score(features, unit * GONE * features[:, 0]) for unit in (1e3, 1e6))
    assert torch.allclose(far, farther, atol=1e-2)
    assert torch.allclose(features @ far, torch.ones(4000).double(), atol=0.05)


def test_what_is_between_a_face_and_none_counts_for_neither() -> None:
    nme = torch.tensor([0.01, 0.08, 0.03, 0.1, 0.19, 0.2, 0.9])
    score = torch.tensor([0.1, 0.6, 0.5, 0.9, 0.1, 0.5, 0.51])
    assert not score_quality(score[:0], nme[:0]).is_of_use
    assert ScoreQuality(100, 0.05, 100, 0.05).is_of_use
    assert not ScoreQuality(100, 0.06, 100, 0).is_of_use
    assert not ScoreQuality(100, 0, 100, 0.06).is_of_use
    assert not ScoreQuality(100, 0, 0, 0).is_of_use
    assert not ScoreQuality(0, 0, 100, 0).is_of_use
    assert score_quality(score, nme) == ScoreQuality(faces=3, given_up=pytest.approx(1 / 3), lost=2, missed=0.5)


def test_squares_lie_in_place_off_and_beside_the_face() -> None:
    torch.manual_seed(0)
    drawn = [AnyPlace().draw_jitter((100, 100)) for _ in range(3000)]
    ways = np.array([math.hypot(*d["shift"]) * d["zoom"] for d in drawn])  # in squares of the face's own size
    zooms, turns = np.array([d["zoom"] for d in drawn]), np.array([d["angle"] for d in drawn])
    for values, ranges in (
        (ways, ((0, 0), (0, 0.25), (0.25, 0.7))),
        (np.log(zooms), ((0, 0), (-0.3, 0.3), (-0.9, 0.8))),
        (turns, ((0, 0), (-0.4, 0.4), (-1.6, 1.6))),
    ):
        assert 0.3 < (values == 0).mean() < 0.37
        assert values.min() >= min(low for low, _ in ranges)
        assert values.max() <= max(high for _, high in ranges)
        assert values.max() > 0.9 * ranges[2][1]
    assert abs(np.corrcoef(ways, zooms)[0, 1]) < 0.1
    quarters = np.array([(d["shift"] > 0) @ (1, 2) for d in drawn if d["shift"].any()])
    assert np.allclose(np.bincount(quarters) / len(quarters), 0.25, atol=0.05)


def test_places_hold_neither_a_labelled_nor_a_found_face(faces: list[Face]) -> None:
    def finds(frame: Frame) -> np.ndarray:  # a face without a label in the left half of each photo
        height, width = frame.size_hw
        return np.array([[0.0, 0, width / 2, height]])

    for detector in (None, finds):
        of, boxes = elsewhere(faces, faces, detector)
        assert of == faces[:3]
        for face, box in zip(of, boxes, strict=True):
            own = boxes_from_points(face.xy)
            assert detector is None or box[0] > 0.45 * 300
            assert overlaps(own[None], box[None])[0, 0] < 0.02
            assert box[2] - box[0] == pytest.approx(box[3] - box[1])
            assert 0.6 <= (box[2] - box[0]) / (own[2:] - own[:2]).max() <= 1.4
    again = elsewhere(faces, faces, finds)[1]
    assert np.array_equal(again, boxes)
    assert elsewhere([], [], None)[1].shape == (0, 4)


def test_a_place_holds_no_other_labelled_face_of_its_photo(faces: list[Face]) -> None:
    first, *_ = faces
    others = [dataclasses.replace(first, xy=first.xy - np.float32(off)) for off in ((200, 0), (100, 0), (0, 150))]
    _, boxes = elsewhere([first] * 50, [first, *others], None)
    assert len(boxes) > 10
    for other in (first, *others):
        assert overlaps(boxes_from_points(other.xy)[None], boxes).max() < 0.02


def test_a_place_holds_no_points_on_one_line(faces: list[Face]) -> None:
    pupils = np.array([[120, 100], [180, 100]], np.float32)
    face = dataclasses.replace(faces[0], xy=pupils)
    of, boxes = elsewhere([face] * 50, [face], None)
    assert len(of) > 10
    assert not ((boxes[:, :2] < pupils.min(axis=0)) & (boxes[:, 2:] > pupils.max(axis=0))).all(axis=1).any()


def test_a_place_lies_in_its_photo(tmp_path: Path) -> None:
    """There is none where the photo is narrower than the face, however long it is."""
    cv2.imwrite(str(tmp_path / "strip.png"), np.zeros((400, 40), np.uint8))
    face = Face(tmp_path / "strip.png", np.array([[0, 0], [80, 0], [80, 80]], np.float32))
    assert elsewhere([face] * 5, [face], None)[0] == []


def test_places_lie_in_a_wide_photo(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "wide.png"), np.zeros((200, 600), np.uint8))
    face = Face(tmp_path / "wide.png", (mean_shape() * 35 + 60).astype(np.float32))
    _, boxes = elsewhere([face] * 50, [face], None)
    assert len(boxes) == 50
    assert (boxes[:, 2:] <= (600, 200)).all()
    assert boxes[:, 2].max() > 400
