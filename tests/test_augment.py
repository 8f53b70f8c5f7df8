"""Augmentation: points follow the picture, left and right swap, nothing else moves."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import typer.main
from torchvision import tv_tensors

from kp_cli import app
from kp_runtime.geometry import boxes_from_points, invert_matrix
from kp_runtime.scheme68 import MIRROR
from kp_runtime.spec import ModelSpec
from kp_train.augment import MirrorFace, augment_from_name, bent, grey_levels
from kp_train.config import AUGMENTS
from kp_train.data import read_source
from kp_train.dataset import FaceDataset
from kp_train.label_bias import with_bias
from kp_train.synthetic import mean_shape, write_csv_source


def test_a_mirrored_face_swaps_left_and_right() -> None:
    xy = torch.tensor(mean_shape() * 20 + 32).float()
    image = torch.zeros(1, 64, 64, dtype=torch.uint8)
    image[0, round(float(xy[36, 1])), round(float(xy[36, 0]))] = 255  # a dot on the left eye's corner
    mirrored, points = MirrorFace(p=1.0)(tv_tensors.Image(image), tv_tensors.KeyPoints(xy, canvas_size=(64, 64)))
    y, x = (mirrored[0] == 255).nonzero()[0].tolist()
    assert [x, y] == [round(v) for v in points[45].tolist()]
    np.testing.assert_allclose(points[:, 0].numpy(), 63 - xy[MIRROR.copy(), 0].numpy())
    again, back = MirrorFace(p=1.0)(mirrored, points)
    assert torch.equal(again, image)
    np.testing.assert_allclose(back.numpy(), xy.numpy(), atol=1e-5)


def test_help_and_docs_name_every_augmentation() -> None:
    train = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    (told,) = [parameter.help for parameter in train.params if parameter.name == "augment"]
    page = Path(__file__).resolve().parents[1] / "docs" / "training.md"
    table = re.findall(r"^\| `(\w+)`[^|]* \| ", page.read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"\w+", told)) - {"or"} == set(AUGMENTS)
    assert set(AUGMENTS) <= set(table)


@pytest.mark.parametrize("name", ["faces", "varied", "bent", "shaken", "tight"])
def test_faces_stay_under_their_points(tmp_path: object, name: str) -> None:
    """The white of the drawn eyes lies under the eye points however the crop is varied."""
    faces = read_source(write_csv_source(tmp_path, people=12)).faces  # type: ignore[arg-type]
    torch.manual_seed(0)
    data = FaceDataset(faces, ModelSpec("x", 112), augment_from_name(name))
    brighter = []
    for index in range(len(data)):
        crop, xy = data[index]
        grey = crop[0].float()
        eye = xy[36:42].mean(dim=0).round().long().clamp(3, 108)
        brighter.append(float(grey[eye[1] - 2 : eye[1] + 3, eye[0] - 6 : eye[0] + 7].std() - grey.std() * 0.3))
    assert np.mean(np.array(brighter) > 0) > 0.8


@pytest.mark.parametrize("name", ["faces", "varied", "bent", "shaken", "tight", "light", "crop"])
def test_a_seed_fixes_the_variation(tmp_path: object, name: str) -> None:
    faces = read_source(write_csv_source(tmp_path, people=2)).faces  # type: ignore[arg-type]
    data = FaceDataset(faces, ModelSpec("x", 64), augment_from_name(name))
    torch.manual_seed(5)
    first = data[0]
    second = data[0]
    torch.manual_seed(5)
    third = data[0]
    assert torch.equal(first[0], third[0])
    assert torch.equal(first[1], third[1])
    assert not torch.equal(first[1], second[1])


def test_a_crop_of_a_seed_leaves_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch keeps each seed for a GPU that may come, with a traceback, a third of the time of a crop."""
    data = FaceDataset(
        read_source(write_csv_source(tmp_path, people=1)).faces, ModelSpec("x", 64), augment_from_name("faces")
    )
    torch.manual_seed(7)
    wanted, state = data[1], torch.get_rng_state()

    def seeded(seed: int) -> None:
        raise AssertionError("a GPU was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    crop, xy = data[1, 7]
    assert torch.equal(crop, wanted[0])
    assert torch.equal(xy, wanted[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_original_crop_lies_anywhere_in_its_250_px_image() -> None:
    augment = augment_from_name("crop")
    assert augment is not None
    assert augment.mirror is None
    drawn = [augment.draw_jitter((200, 300)) for _ in range(500)]
    shifts = np.abs([jitter["shift"] for jitter in drawn]).max(axis=0)
    # scaled to 250 x 375, a 224 window can move by 13 px down and by 75.5 px aside from the middle
    assert 12 / 224 < shifts[1] <= 13 / 224
    assert 73 / 224 < shifts[0] <= 75.5 / 224
    assert {jitter["zoom"] for jitter in drawn} == {1.0}
    assert {jitter["angle"] for jitter in drawn} == {0.0}


@pytest.mark.parametrize(
    ("name", "wide", "turn"),
    [("faces", 0.4, 8), ("bent", 0.4, 10), ("shaken", 1.0, 10), ("tight", 1.0, 10), ("light", 0.0, 5)],
)
def test_boxes_err_as_widely_as_the_name_says(name: str, wide: float, turn: float) -> None:
    """By the mean square of a spread that is 2.5 times as wide for some faces; what it is cut off at takes little."""
    augment = augment_from_name(name)
    assert augment is not None
    assert augment.bend == (0.015 if name in ("bent", "shaken") else 0)
    torch.manual_seed(0)
    drawn = [augment.draw_jitter((200, 300)) for _ in range(3000)]
    mixed = (1 - wide + wide * 2.5**2) ** 0.5
    shifts = np.stack([jitter["shift"] for jitter in drawn])
    np.testing.assert_allclose(shifts.std(axis=0), 0.02 * mixed, rtol=0.06)
    np.testing.assert_allclose(np.log([jitter["zoom"] for jitter in drawn]).std(), 0.04 * mixed, rtol=0.06)
    np.testing.assert_allclose(np.degrees([jitter["angle"] for jitter in drawn]).std(), turn, rtol=0.06)
    assert np.abs(shifts).max() <= np.float32(augment.max_shift)
    assert np.abs([jitter["angle"] for jitter in drawn]).max() <= np.radians(2.5 * turn) * (1 + 1e-6)


@pytest.mark.parametrize("name", ["faces", "varied", "light"])
def test_half_of_the_faces_are_mirrored_and_nearly_all_in_another_light(name: str) -> None:
    plain = mean_shape() * 20 + 32
    image = tv_tensors.Image(torch.full((1, 64, 64), 100, dtype=torch.uint8))
    points = tv_tensors.KeyPoints(torch.from_numpy(plain).float(), canvas_size=(64, 64))
    torch.manual_seed(0)
    augment = augment_from_name(name)
    assert augment is not None
    images, moved = zip(*[augment(image, points) for _ in range(300)], strict=True)
    assert np.mean([not torch.equal(each, image) for each in images]) > 0.9  # in another light
    drawn = np.stack([each.numpy() for each in moved])
    mirrored = plain[MIRROR] * (-1, 1) + (63, 0)
    shares = [np.isclose(drawn, wanted, atol=1e-4).all(axis=(1, 2)).mean() for wanted in (plain, mirrored)]
    assert sum(shares) == 1
    assert 0.4 < shares[0] < 0.6


@pytest.mark.parametrize("right", [0.0, 0.05])
def test_four_boxes_in_ten_are_tight_around_the_varied_labels(tmp_path: Path, right: float) -> None:
    """Turned, stretched and mirrored ones, of labels that lie to the right of what they name, too."""
    source = read_source(write_csv_source(tmp_path, people=1))
    bias = np.linspace([right, 0.0], [0.0, right], 68)  # as measured: each point has its own
    face = with_bias(source.faces[:1], bias)[0]
    data, size = FaceDataset([face], ModelSpec("x", 64), augment_from_name("tight")), 64
    seen = np.stack([data[0, seed][1].numpy() for seed in range(400)]).astype(np.float64)
    boxes = boxes_from_points(seen)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    longer = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    tight = np.isclose(middle, (size - 1) / 2, atol=1e-3).all(axis=1) & np.isclose(longer * 1.3, size, atol=1e-3)
    assert 0.33 < tight.mean() < 0.47
    across = np.linalg.norm(seen[:, 45] - seen[:, 36], axis=1) / np.linalg.norm(seen[:, 8] - seen[:, 27], axis=1)
    assert np.std(across[tight]) / np.mean(across[tight]) == pytest.approx(0.05, abs=0.02)  # stretched
    eyes = seen[tight, 45] - seen[tight, 36]
    turns = np.degrees(np.arctan2(eyes[:, 1], eyes[:, 0]))
    there = turns > 0  # this face is turned itself, and the other way when it is mirrored
    assert 0.38 < there.mean() < 0.62
    assert [turns[there].std(), turns[~there].std()] == pytest.approx([10, 10], abs=2.5)


@pytest.mark.parametrize("name", ["bent", "shaken"])
def test_faces_are_bent_where_the_name_says(name: str) -> None:
    points = tv_tensors.KeyPoints(torch.from_numpy(mean_shape() * 20 + 32).float(), canvas_size=(64, 64))
    torch.manual_seed(0)
    augment = augment_from_name(name, mirror=None)
    assert augment is not None
    _, there = augment(tv_tensors.Image(torch.zeros(1, 64, 64, dtype=torch.uint8)), points)
    assert (there - points).norm(dim=1).max() > 0.5


@pytest.mark.parametrize(("name", "patches"), [("faces", 0.05), ("varied", 0.15)])
def test_each_change_of_the_grey_levels_comes_as_often_as_it_should(name: str, patches: float) -> None:
    pattern = torch.arange(32 * 32).reshape(1, 32, 32) * 37 % 251
    image = tv_tensors.Image(pattern.to(torch.uint8))
    torch.manual_seed(0)
    augment = augment_from_name(name)
    assert augment is not None
    steps = augment.grey.transforms  # type: ignore[attr-defined]
    shares = [np.mean([not torch.equal(step(image), image) for _ in range(400)]) for step in steps]
    np.testing.assert_allclose(shares, [1, 0.2, 0.05, 0.1, 0.1, patches], atol=0.03)


def test_noise_makes_no_white_pixel_black() -> None:
    torch.manual_seed(0)
    noisy = grey_levels(light=0, patches=0, largest=0.1, noise=40, p=0.5)
    white = tv_tensors.Image(torch.full((1, 64, 64), 255, dtype=torch.uint8))
    seen = torch.stack([noisy(white) for _ in range(20)])
    assert 30 < seen.min() < 250


def test_a_stretched_crop_keeps_its_middle_and_its_area() -> None:
    augment = augment_from_name("varied")
    assert augment is not None
    plain = np.array([[1.2, 0.3, -8.0], [-0.3, 1.2, 5.0]])
    middle = invert_matrix(plain[None])[0] @ [55.5, 55.5, 1]
    torch.manual_seed(0)
    drawn = np.stack([augment.deform(plain, 112) for _ in range(400)])
    np.testing.assert_allclose(drawn @ [*middle, 1], 55.5, atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(drawn[:, :, :2]), np.linalg.det(plain[:, :2]))
    linear = drawn[:, :, :2] @ np.linalg.inv(plain[:, :2])
    np.testing.assert_allclose(np.log(linear[:, 0, 0] / linear[:, 1, 1]).std(), 0.05, rtol=0.15)
    np.testing.assert_allclose(linear[:, 0, 1].std(), 0.05, rtol=0.15)
    other = augment_from_name("faces")
    assert other is not None
    assert other.deform(plain, 112) is plain


@pytest.mark.parametrize(("name", "stretched"), [("faces", False), ("varied", True)])
def test_crops_are_stretched_where_the_name_says(tmp_path: Path, name: str, stretched: bool) -> None:
    data = FaceDataset(
        read_source(write_csv_source(tmp_path, people=1)).faces, ModelSpec("x", 64), augment_from_name(name)
    )
    shapes = []
    for seed in range(40):
        across, down = (xy := data[0, seed][1])[45] - xy[36], xy[8] - xy[27]
        shapes.append(float(across.norm() / down.norm()))
    assert np.std(shapes) / np.mean(shapes) == pytest.approx(0.05 if stretched else 0, abs=0.02)


def test_points_stay_on_what_they_name_in_a_bent_face() -> None:
    """A blot drawn at each point is found again, by its centre of gravity, where the bent point says."""
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8)), axis=-1).reshape(-1, 2) * 22.0 + 34.3
    image = np.zeros((224, 224), np.float32)
    for x, y in grid:
        image += 250 * np.exp(-((np.arange(224) - x) ** 2 + (np.arange(224)[:, None] - y) ** 2) / 8)
    picture = tv_tensors.Image(torch.from_numpy(image.round().astype(np.uint8))[None])
    points = tv_tensors.KeyPoints(torch.from_numpy(grid).float(), canvas_size=(224, 224))
    torch.manual_seed(0)
    for deviation in (0.0, 0.02, 0.03):
        seen, there = bent(picture, points, deviation)
        moved = (there - points).norm(dim=1)
        for x, y in there.numpy():
            corner = np.round([x, y]).astype(int) - 7
            patch = seen[0, corner[1] : corner[1] + 15, corner[0] : corner[0] + 15].numpy()
            found = cv2.moments(patch)
            centre = corner + np.array([found["m10"], found["m01"]]) / found["m00"]
            np.testing.assert_allclose(centre, [x, y], atol=0.7)
        assert (moved.max() > 224 * deviation) if deviation else (moved.max() == 0)
        assert seen.dtype == torch.uint8
