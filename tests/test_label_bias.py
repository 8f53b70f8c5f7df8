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

from kp_runtime.scheme68 import MIRROR
from kp_runtime.spec import ModelSpec
from kp_train.augment import Augment
from kp_train.checkpoint import load_checkpoint
from kp_train.config import recipe
from kp_train.data import Face, FaceDataset, is_held_out, read_source
from kp_train.label_bias import measured_bias, with_bias
from kp_train.refit import refit
from kp_train.synthetic import mean_shape, write_csv_source
from kp_train.train import train

SPEC = ModelSpec("x", 112)
SHAPE = (mean_shape() + (mean_shape() * [-1, 1])[MIRROR]) / 2  # as wide on both sides


class Line(nn.Module):
    """A network that sees a bright upright line, and answers a face about it whose middle is `off` px to the right."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__()
        self.off = off

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        light = crops[:, 0].float().sum(dim=1)
        x = (light * torch.arange(crops.shape[-1])).sum(dim=1) / light.sum(dim=1)
        xy = torch.from_numpy(SHAPE * 20).float().repeat(len(crops), 1, 1)
        xy[..., 0] += x[:, None] + self.off
        return xy


def lines(folder: Path, bias: float, spread: float = 0.0, count: int = 40) -> list[Face]:
    """Photos of an upright line, labelled with a face that is `bias` sides of its crop to the right of it."""
    rng, faces = np.random.default_rng(3), []
    side = float(np.ptp(SHAPE, axis=0).max()) * 30 * SPEC.margin
    for number in range(count):
        image, x = np.zeros((160, 160), np.uint8), int(rng.integers(70, 90))
        image[:, x] = 255
        path = folder / f"{number}_0.png"
        cv2.imwrite(str(path), image)
        shift = (bias + rng.normal(0, spread)) * side
        faces.append(Face(path, (SHAPE * 30 + [x + shift, 80]).astype(np.float32)))
    return faces


@pytest.mark.parametrize("bias", [0.02, -0.013])
@pytest.mark.parametrize("off", [0.0, 1.5])
def test_a_bias_is_measured_whatever_the_network_has_learned_of_it(tmp_path: Path, bias: float, off: float) -> None:
    """A network that was taught one puts every face's points to that side, the mirrored ones too."""
    faces = lines(tmp_path, bias, spread=0.005)
    found = measured_bias(Line(off), faces, SPEC, MIRROR)  # type: ignore[arg-type]
    assert found == pytest.approx(bias, abs=0.003)
    assert measured_bias(Line(off), with_bias(faces, 0.5), SPEC, MIRROR) == found  # type: ignore[arg-type]


def test_chance_is_no_bias(tmp_path: Path) -> None:
    faces = lines(tmp_path, 0.0005, spread=0.01)
    assert measured_bias(Line(), faces, SPEC, MIRROR) == 0  # type: ignore[arg-type]
    assert measured_bias(Line(), lines(tmp_path, 0.02)[:7], SPEC, MIRROR) == 0  # type: ignore[arg-type]


def items(face: Face, augment: Augment | None, bias: float, seed: int) -> np.ndarray:
    return FaceDataset(with_bias([face], bias), SPEC, augment)[0, seed][1].numpy()


def test_varied_labels_keep_their_side(tmp_path: Path) -> None:
    """They are those of the true points, varied, and then moved to the right by what the bias is at the face's size."""
    face = read_source(write_csv_source(tmp_path, people=1)).faces[0]
    mirror = Augment(shift=0.0, max_shift=0.0, zoom=0.0, turn=0.0, mirror=MIRROR, grey=v2.Identity())
    moved = [items(face, mirror, 0.02, seed) - items(face, mirror, 0.0, seed) for seed in range(20)]
    sides = {round(float(change[:, 0].mean()), 2) for change in moved}
    assert sides == {0.0, round(2 * 0.02 * 112, 2)}  # plain, and mirrored: from left to right
    assert all(np.ptp(change, axis=0).max() < 1e-3 for change in moved)
    turning = Augment(shift=0.1, max_shift=0.2, zoom=0.3, turn=40.0, mirror=None, grey=v2.Identity())
    for seed in range(5):
        torch.manual_seed(seed)
        jitter = turning.draw_jitter((160, 150))
        length, angle = 0.02 * 112 / jitter["zoom"], jitter["angle"]
        change = items(face, turning, 0.02, seed) - items(face, turning, 0.0, seed)
        expected = length * np.array([1 - math.cos(angle), math.sin(angle)])
        np.testing.assert_allclose(change, np.broadcast_to(expected, change.shape), atol=1e-3)
    plain = items(face, None, 0.0, 0)
    np.testing.assert_allclose(items(face, None, 0.02, 0), plain, atol=1e-4)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Takes the measuring's place and finds 0.01; how many faces it was asked by, each time."""
    asked: list[int] = []

    def found(net: object, faces: list[Face], spec: ModelSpec, order: np.ndarray) -> float:
        asked.append(len(faces))
        return 0.01

    monkeypatch.setattr("kp_train.train.measured_bias", found)
    monkeypatch.setattr("kp_train.refit.measured_bias", found)
    return asked


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_run_measures_by_what_it_starts_from(
    measuring: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    assert load_checkpoint(tmp_path / "second")[1].training["sources"][0]["label_bias"] == 0.01
    assert measuring == [held_out, held_out]
    assert "faces keep to that" in run("second", init=tmp_path / "first", resume=True)
    refit(tmp_path / "second", [source], tmp_path / "third", None)
    assert load_checkpoint(tmp_path / "third")[1].training["refit"]["sources"][0]["label_bias"] == 0.01
    assert measuring == [held_out] * 3
    for augment in ("none", "crop"):
        plain = dataclasses.replace(short, augment=augment)
        assert "labels lie" not in run(augment, config=plain, init=tmp_path / "first")
    assert measuring == [held_out] * 3, "where no face is mirrored there is nothing to know"
