"""Steadiness of models whose answers are known: fixed points of the crop, or its brightest pixel."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_export.evaluate import Evaluation, OpenModel, evaluate
from kp_export.robustness import ENLARGED, SHAKES, _Enlarged, folders, groups, robustness, turns
from kp_runtime.backend import Answer
from kp_runtime.manifest import Manifest
from kp_runtime.scheme68 import MIRROR
from kp_runtime.spec import ModelSpec
from kp_train.data import Face, read_source
from kp_train.synthetic import mean_shape, write_csv_source

SIZE = 64


@pytest.fixture
def faces(tmp_path: Path) -> tuple[Face, ...]:
    return read_source(write_csv_source(tmp_path, people=6)).faces


def fixed(points: np.ndarray) -> OpenModel:
    """A model that puts the same points into every crop: they follow the box."""
    spec = ModelSpec("x", SIZE)
    return OpenModel("fixed", Manifest(spec=spec), lambda crops: Answer(np.repeat(points[None], len(crops), axis=0)))


def symmetric() -> np.ndarray:
    shape = mean_shape() * 0.3
    mirrored = shape[MIRROR] * (-1, 1)
    return ((shape + mirrored) / 2 * SIZE + (SIZE - 1) / 2).astype(np.float32)


def test_points_that_follow_the_box_move_as_it_was_shaken(faces: tuple[Face, ...]) -> None:
    found = robustness(fixed(symmetric()), faces)
    assert found.faces == len(faces)
    assert found.nme == pytest.approx(evaluate(fixed(symmetric()), faces).accuracy.nme, rel=1e-6)
    wanted = []
    for right, down, larger in SHAKES:
        for face in faces:
            low, high = face.xy.min(axis=0), face.xy.max(axis=0)
            side, centre = (high - low).max(), (low + high) / 2
            points = (symmetric() - (SIZE - 1) / 2) * 1.3 * side / SIZE * (1 + 0.1 * larger)
            points += centre + 0.1 * side * np.array([right, down])
            eyes = np.linalg.norm(face.xy[36] - face.xy[45])
            wanted.append(np.linalg.norm(points - face.xy, axis=-1).mean() / eyes)
    assert found.jitter_nme == pytest.approx(np.mean(wanted), rel=1e-4)


def test_boxes_are_shaken_to_both_sides_alike() -> None:
    """Each way alone, and two corners."""
    assert len(set(SHAKES)) == 8
    assert {(-right, -down, -larger) for right, down, larger in SHAKES} == set(SHAKES)
    assert sorted(np.abs(SHAKES).sum(axis=1)) == [1] * 6 + [3] * 2


def test_enlarging_and_mirroring_move_nothing_of_a_symmetric_answer(faces: tuple[Face, ...]) -> None:
    found = robustness(fixed(symmetric()), faces)
    assert list(found.enlarged) == [2, 4, 8]
    assert max(found.enlarged.values()) < 1e-4
    assert found.mirrored < 1e-4


def test_an_answer_that_leans_to_one_side_shows_in_the_mirror(faces: tuple[Face, ...]) -> None:
    found = robustness(fixed(symmetric() + np.array([2, 0], np.float32)), faces)
    # two crop pixels to the right here, to the left in the mirror: four apart
    wanted = []
    for face in faces:
        side = np.ptp(face.xy, axis=0).max()
        wanted.append(4 * 1.3 * side / SIZE / np.linalg.norm(face.xy[36] - face.xy[45]))
    assert found.mirrored == pytest.approx(np.mean(wanted), rel=1e-4)
    assert max(found.enlarged.values()) < 1e-4


def test_looks_at_the_mirror_image_too_are_the_same_in_the_mirror(faces: tuple[Face, ...]) -> None:
    found = robustness(fixed(symmetric() + np.array([2, 0], np.float32)), faces, mirror=True)
    assert found.mirrored < 1e-4
    assert found.nme == pytest.approx(robustness(fixed(symmetric()), faces).nme, rel=1e-4)


def test_a_second_look_is_taken_where_it_is_asked_for(faces: tuple[Face, ...]) -> None:
    """The points of a fixed answer lie elsewhere in the box around themselves."""
    once, twice = (robustness(fixed(symmetric()), faces, looks=looks) for looks in (1, 2))
    assert twice.nme == pytest.approx(evaluate(fixed(symmetric()), faces, looks=2).accuracy.nme, rel=1e-6)
    assert abs(twice.nme - once.nme) > 0.01


def test_photos_are_seen_enlarged_and_mirrored(faces: tuple[Face, ...]) -> None:
    """A model that reads the crop sees much the same crop whatever the photo's resolution and side."""
    spec = ModelSpec("x", SIZE)

    def answer(crops: np.ndarray) -> Answer:
        y, x = np.mgrid[:SIZE, :SIZE]
        weight = crops[:, 0].astype(np.float64)
        centre = np.stack([(weight * x).sum((1, 2)), (weight * y).sum((1, 2))], axis=-1) / weight.sum((1, 2))[:, None]
        return Answer(np.repeat(centre[:, None], 68, axis=1).astype(np.float32))

    found = robustness(OpenModel("centre of light", Manifest(spec=spec), answer), faces)
    assert 0 < max(found.enlarged.values()) < 0.001
    assert 0 < found.mirrored < 0.001


@pytest.mark.parametrize("size_hw", [(1, 2), (5, 3), (61, 90)])
def test_a_window_of_an_enlarged_photo_is_that_of_the_whole(
    size_hw: tuple[int, int], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, at the photo's edges too; and no more than the window and what lies around it is enlarged."""
    luma, resize, made = rng.integers(0, 256, size_hw, np.uint8), cv2.resize, []

    def counted(*args: object, **options: object) -> np.ndarray:
        made.append(resize(*args, **options))
        return made[-1]

    monkeypatch.setattr(cv2, "resize", counted)
    for k in ENLARGED:
        whole, frame = resize(luma, None, fx=k, fy=k, interpolation=cv2.INTER_LINEAR), _Enlarged(luma, "gray", times=k)
        assert frame.size_hw == whole.shape
        for _ in range(50):
            (y0, y1), (x0, x1) = (np.sort(rng.choice(side + 1, 2, replace=False)).tolist() for side in whole.shape)
            for window in ((x0, y0, x1, y1), (0, y0, x1, whole.shape[0]), (x0, 0, whole.shape[1], y1)):
                x, y, right, bottom = window
                np.testing.assert_array_equal(frame.luma(*window), whole[y:bottom, x:right])
                assert made[-1].size <= (right - x + 4 * k) * (bottom - y + 4 * k)
    known = _Enlarged(np.array([[0, 100]], np.uint8), "gray", times=2)
    np.testing.assert_array_equal(known.luma(0, 0, 4, 2), [[0, 25, 75, 100]] * 2)


def turned(turn: float, eyes: float) -> Face:
    xy = mean_shape().astype(np.float64)
    xy *= eyes / np.linalg.norm(xy[36] - xy[45])
    middle, half = (xy[0] + xy[16]) / 2, (xy[16] - xy[0]) / 2
    xy[30] = middle + turn * half
    return Face(Path("a.jpg"), xy.astype(np.float32))


def test_groups_by_size_and_turn() -> None:
    faces = (turned(0.0, 20), turned(0.2, 50), turned(-0.2, 55), turned(0.9, 200))
    errors = np.array([0.01, 0.02, 0.04, 0.08])
    result = Evaluation(faces, np.empty(0), np.empty(0), errors, 0, None, None, None)  # type: ignore[arg-type]
    found = {(g.by, g.low, g.high): (g.faces, g.nme) for g in groups(result)}
    assert found == {
        ("eye distance px", 0, 30): (1, 0.01),
        ("eye distance px", 45, 60): (2, pytest.approx(0.03)),
        ("eye distance px", 90, None): (1, 0.08),
        ("turn", 0, 0.15): (1, 0.01),
        ("turn", 0.15, 0.3): (2, pytest.approx(0.03)),
        ("turn", 0.5, None): (1, 0.08),
    }


def test_own_points_have_no_groups() -> None:
    faces = (Face(Path("a.jpg"), np.array([[20, 20], [40, 20], [30, 40]], np.float32)),)
    result = Evaluation(faces, np.empty(0), np.empty(0), np.array([0.01]), 0, None, None, None)  # type: ignore[arg-type]
    assert groups(result) == []


def of_images(*images: str) -> Evaluation:
    faces = tuple(Face(Path(image), np.zeros((68, 2), np.float32)) for image in images)
    errors = np.arange(1, len(faces) + 1) / 100
    return Evaluation(faces, np.empty(0), np.empty(0), errors, 0, None, None, None)  # type: ignore[arg-type]


def test_each_folder_has_a_measure_of_its_own() -> None:
    """Data sets that were measured together, by where their paths part, and who stands behind a number."""
    many = [f"/data/photos/afw/{i}_1.jpg" for i in range(8)]
    found = folders(of_images("/data/rows/test/a.png", "/data/photos/b.jpg", *many))
    assert [dataclasses.astuple(one)[:3] for one in found] == [
        ("photos", 1, 0.02), ("photos/afw", 8, pytest.approx(0.065)), ("rows/test", 1, 0.01),
    ]  # fmt: skip
    one, few = folders(of_images(*many, "/data/photos/helen/a.jpg"))
    low, high = one.nme_interval or (0, 0)
    assert 0.01 < low < one.nme < high < 0.08
    assert few.nme_interval is None


def test_one_folder_and_a_folder_a_person_are_no_data_sets() -> None:
    assert folders(of_images("/data/a.jpg", "/data/b.jpg")) == []
    assert len(folders(of_images(*(f"/data/{i}/a.jpg" for i in range(10))))) == 10
    assert folders(of_images(*(f"/data/{i}/a.jpg" for i in range(11)))) == []


def test_a_turn_has_a_side_and_needs_no_width() -> None:
    faces = np.stack([turned(0.2, 50).xy, turned(-0.6, 50).xy, np.full((68, 2), 3.0)]).astype(np.float64)
    np.testing.assert_allclose(turns(faces), (0.2, -0.6, 1), atol=1e-5)
