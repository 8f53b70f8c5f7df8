"""Labels that lie to one side: measured, and kept to that side in mirrored and turned faces."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from kp_runtime.errors import KpError
from kp_runtime.scheme68 import MIRROR
from kp_runtime.spec import ModelSpec
from kp_train.augment import Augment
from kp_train.callbacks import Together
from kp_train.checkpoint import load_checkpoint
from kp_train.config import recipe
from kp_train.data import Face, Source, is_held_out, read_source
from kp_train.dataset import FaceDataset
from kp_train.label_bias import bias_of, measured_bias, with_bias
from kp_train.refit import refit
from kp_train.synthetic import mean_shape, write_csv_source
from kp_train.train import train

SPEC = ModelSpec("x", 112)
SHAPE = (mean_shape() + (mean_shape() * [-1, 1])[MIRROR]) / 2  # as wide on both sides


LEAN = np.where(SHAPE[:, :1] > 0, [[0.0, 1.0]], [[0.0, -1.0]])  # down on the right, up on the left: a turn, nearly
LEAN[np.arange(68) == MIRROR] = 0


def test_it_is_the_median() -> None:
    """Of an even number of people, the mean of the two in the middle."""
    off = torch.arange(1.0, 9.0, dtype=torch.float64)[:, None, None].expand(8, 68, 2) * torch.tensor([0.001, 0])
    bias = bias_of(off, [f"{i}" for i in range(8)], MIRROR)
    assert bias is not None
    np.testing.assert_allclose(bias[:, 0], 0.0045)


@pytest.mark.parametrize(("standard_errors", "is_told"), [(2.95, False), (3.05, True), (-2.95, False), (-3.05, True)])
def test_it_is_told_from_three_standard_errors_on(standard_errors: float, is_told: bool) -> None:
    spread = torch.tensor([-1.0, 1.0] * 8, dtype=torch.float64)
    off = 0.01 * (spread + standard_errors * spread.std() / 4)
    xy = off[:, None, None] * torch.tensor([1.0, 0]).expand(68, 2)
    people = [f"{i}" for i in range(16)]
    assert (bias_of(xy, people, MIRROR) is not None) == is_told
    assert bias_of(xy[:7] + 1, people[:7], MIRROR) is None, "of seven people nothing is told"


class Line(nn.Module):
    """A network that sees a bright upright line, and answers a face about it, its points `off` px off."""

    def __init__(self, off: np.ndarray) -> None:
        super().__init__()
        self.xy = torch.from_numpy(SHAPE * 20 + off).float()

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        light = crops[:, 0].float().sum(dim=1)
        x = (light * torch.arange(crops.shape[-1])).sum(dim=1) / light.sum(dim=1)
        xy = self.xy.repeat(len(crops), 1, 1)
        xy[..., 0] += x[:, None]
        xy[..., 1] += 50
        return xy


def lines(folder: Path, bias: np.ndarray, spread: float = 0.0, count: int = 60, each: int = 1) -> list[Face]:
    """Photos of upright lines, each labelled with a face about it, off by `bias` and chance, in sides of its crop.

    All `each` photos of one person are off alike.
    """
    rng, faces = np.random.default_rng(3), []
    side = float(np.ptp(SHAPE, axis=0).max()) * 30 * SPEC.margin
    for number in range(count):
        image, x = np.zeros((160, 160), np.uint8), int(rng.integers(70, 90))
        image[:, x] = 255
        path = folder / f"{number // each}_{number % each}.png"
        cv2.imwrite(str(path), image)
        if number % each == 0:
            off = (bias + rng.normal(0, spread, 2) if spread else bias) * side
        faces.append(Face(path, (SHAPE * 30 + [x, 80] + off).astype(np.float32)))
    return faces


def measured(faces: list[Face], off: np.ndarray) -> np.ndarray | None:
    return measured_bias(Line(off), faces, SPEC, MIRROR)  # type: ignore[arg-type]


@pytest.mark.parametrize("right", [0.02, -0.013])
@pytest.mark.parametrize("learned", [0.0, 1.5])
def test_a_bias_is_measured_whatever_the_network_has_learned_of_it(
    tmp_path: Path, right: float, learned: float
) -> None:
    """A network that was taught one puts every face's points to that side, the mirrored ones too."""
    bias = LEAN * 0.004 + [right, 0]
    faces = lines(tmp_path, bias, spread=0.004)
    found = measured(faces, bias * 112 * learned)
    assert found is not None
    np.testing.assert_allclose(found, bias, atol=0.003)
    assert (found == (found * [1, -1])[MIRROR]).all(), "what is alike on both sides is not theirs"
    again = measured(with_bias(faces, bias * 9), bias * 112 * learned)
    assert again is not None
    assert (again == found).all()


@pytest.mark.parametrize("training", [False, True])
def test_a_network_is_looked_through_as_in_use_and_left_as_it_was(tmp_path: Path, training: bool) -> None:
    net = Line(np.zeros((68, 2)))
    modes: list[bool] = []
    net.register_forward_pre_hook(lambda net, _: modes.append(net.training))
    measured_bias(net.train(training), lines(tmp_path, np.zeros((68, 2)), count=8), SPEC, MIRROR)  # type: ignore[arg-type]
    assert (set(modes), net.training) == ({False}, training)


def test_chance_is_no_bias(tmp_path: Path) -> None:
    none = np.zeros((68, 2))
    assert measured(lines(tmp_path, none + np.array([0.0005, 0]), spread=0.01), none) is None
    for few in (7, 0):
        assert measured(lines(tmp_path, none + np.array([0.02, 0]))[:few], none) is None
    assert measured(lines(tmp_path, none + np.array([0.02, 0]), each=10)[:70], none) is None


@pytest.mark.parametrize("each", [1, 25])
def test_frames_of_one_person_are_no_more_evidence_than_one(tmp_path: Path, each: int) -> None:
    """Ten people off by half as much again to any side: 250 frames of them show no more than ten."""
    faces = lines(tmp_path, np.zeros((68, 2)) + np.array([0.004, 0]), spread=0.006, count=10 * each, each=each)
    assert measured(faces, np.zeros((68, 2))) is None


def items(face: Face, augment: Augment | None, bias: np.ndarray | None, seed: int) -> np.ndarray:
    return FaceDataset(with_bias([face], bias), SPEC, augment)[0, seed][1].numpy()


def test_varied_labels_keep_their_side(tmp_path: Path) -> None:
    """They are those of the true points, varied, and then off by what each one's bias is at the face's size."""
    face = read_source(write_csv_source(tmp_path, people=1)).faces[0]
    bias = LEAN * 0.01 + [0.02, 0]
    mirror = Augment(shift=0.0, max_shift=0.0, zoom=0.0, turn=0.0, mirror=MIRROR, grey=v2.Identity())
    seen = set()
    for seed in range(20):
        change = items(face, mirror, bias, seed) - items(face, mirror, None, seed)
        mirrored = np.abs(change).max() > 1e-3
        # plain, nothing; mirrored, from the left to the right, and what leaned one way leans the other
        np.testing.assert_allclose(change, 2 * 112 * bias * mirrored, atol=1e-3)
        seen.add(bool(mirrored))
    assert seen == {False, True}
    turning = Augment(shift=0.1, max_shift=0.2, zoom=0.3, turn=40.0, mirror=None, grey=v2.Identity())
    for seed in range(5):
        torch.manual_seed(seed)
        jitter = turning.draw_jitter((160, 150))
        cos, sin = math.cos(jitter["angle"]), math.sin(jitter["angle"])
        length = bias * 112 / jitter["zoom"]
        change = items(face, turning, bias, seed) - items(face, turning, None, seed)
        np.testing.assert_allclose(change, length - length @ [[cos, -sin], [sin, cos]], atol=1e-3)
    assert (items(face, None, bias, 0) == items(face, None, None, 0)).all()


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Takes the measuring's place and finds 1% to the right; how many faces it was asked by, and the crops' size."""
    asked: list[tuple[int, int]] = []

    def found(net: object, faces: list[Face], spec: ModelSpec, order: np.ndarray, bar: object) -> np.ndarray:
        assert net.size == spec.size  # type: ignore[attr-defined]
        asked.append((len(faces), spec.size))
        return np.tile([0.01, 0.0], (68, 1))

    monkeypatch.setattr("kp_train.label_bias.measured_bias", found)
    return asked


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_run_measures_by_what_it_starts_from(
    measuring: list[tuple[int, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One from nothing says so at its end; the next one knows, a resumed one has it noted, a refit looks anew."""
    source = read_source(write_csv_source(tmp_path, people=20, each=1))
    short = recipe("default", size=64, epochs=1, batch_size=8, ema=0, lr=1e-5, val_fraction=0.25, augment="light")
    held_out = sum(is_held_out(face.person, 0.25) for face in source.faces)

    def run(name: str, **options: Any) -> str:
        config = options.pop("config", short)
        train([source], config, tmp_path / name, weights="none", workers=0, progress=False, **options)
        return capsys.readouterr().out

    lie = f"{source.path}: labels lie 1.00% of the crop to the right of what they name; "
    assert f"{lie}this run's mirrored faces did not keep to that, a run with --init {tmp_path / 'first'} will" in run(
        "first"
    )
    assert "label_bias" not in (tmp_path / "first" / "run.json").read_text()
    said = run("second", init=tmp_path / "first")
    assert said.count(lie) == said.count(f"{lie}mirrored faces keep to that") == 1
    assert load_checkpoint(tmp_path / "second")[1].training["sources"][0]["label_bias"] == [[0.01, 0.0]] * 68
    assert measuring == [(held_out, 64)] * 2
    (tmp_path / "second" / "manifest.json").unlink()  # as of a run that was killed at its end
    assert "faces keep to that" in run("second", init=tmp_path / "first", resume=True)
    refit(tmp_path / "second", [source], tmp_path / "third", None)
    assert load_checkpoint(tmp_path / "third")[1].training["refit"]["sources"][0]["label_bias"] == [[0.01, 0.0]] * 68
    assert measuring == [(held_out, 64)] * 3
    assert "faces keep to that" in run("larger", init=tmp_path / "second", config=dataclasses.replace(short, size=80))
    assert measuring[3:] == [(held_out, 64)], "a network looks at crops of the size that it knows"
    fewer = dataclasses.replace(short, val_fraction=0.05)
    assert "faces keep to that" in run("nearly all", init=tmp_path / "first", config=fewer)
    assert measuring[4:] == [(held_out, 64)], "people whom the start never saw tell, trained on now or not"
    plain = dataclasses.replace(short, augment="none")
    assert "labels lie" not in run("none", config=plain, init=tmp_path / "first")
    assert measuring == [(held_out, 64)] * 5, "where no face is mirrored there is nothing to know"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_of_a_source_that_a_run_learned_whole_its_record_tells(
    measuring: list[tuple[int, int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first such run still asks about people whom its start never saw; a refit solves on all of them."""
    rows, photos = (
        read_source(write_csv_source(tmp_path / name, people=n, each=1)) for name, n in (("a", 20), ("b", 24))
    )
    for face in photos.faces:
        face.image.rename(face.image.with_name(f"x{face.image.name}"))
    photos = dataclasses.replace(
        photos, faces=tuple(dataclasses.replace(f, image=f.image.with_name(f"x{f.image.name}")) for f in photos.faces)
    )
    new = [sum(is_held_out(face.person, 0.25) for face in source.faces) for source in (rows, photos)]
    whole = [dataclasses.replace(rows, whole=True), photos]
    short = recipe("default", size=64, epochs=1, batch_size=8, ema=0, lr=1e-5, val_fraction=0.25, augment="light")

    def run(name: str, sources: list[Source], init: Path | None = None) -> list[dict[str, Any]]:
        train(sources, short, tmp_path / name, weights="none", init=init, workers=0, progress=False)
        told: list[dict[str, Any]] = load_checkpoint(tmp_path / name)[1].training["sources"]
        return told

    run("first", [rows, photos])
    with pytest.raises(KpError, match="began with other data or weights"):
        train(whole, short, tmp_path / "first", resume=True, progress=False)
    measuring.clear()
    begins: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr("kp_train.train.Together", lambda *words: begins.append(words[0]) or Together(*words))
        told = run("second", whole, tmp_path / "first")
    assert [each[2] for each in begins[0]["data"]] == [True, False], "all workers must begin so"
    assert measuring == [(new[0], 64), (new[1], 64)]
    assert [(one["whole"], one["trained_on"]) for one in told] == [(True, 20), (False, 24 - new[1])]
    assert "may have seen people" not in capsys.readouterr().out
    measuring.clear()
    told = run("third", whole, tmp_path / "second")
    assert measuring == [(new[1], 64)], "nobody is left to ask about"
    assert [one["label_bias"] for one in told] == [[[0.01, 0.0]] * 68] * 2
    done = refit(tmp_path / "third", [rows, photos], tmp_path / "refitted", None)
    assert (done.faces, done.held_out["keypoints"]) == (20 + 24 - new[1], new[1])
    assert measuring[1:] == [(new[1], 64)]
    run("fourth", [rows, photos], tmp_path / "third")
    assert "third may have seen people whom this run holds out" in capsys.readouterr().out
