"""Runs that learn from trained models beside the labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kp_export.evaluate import held_out_faces
from kp_runtime.errors import DataError, InputError, KpError
from kp_runtime.manifest import Manifest
from kp_runtime.spec import ModelSpec
from kp_train.augment import augment_from_name
from kp_train.checkpoint import LAST_STATE, SafetensorsIO, load_checkpoint, save_checkpoint
from kp_train.config import recipe
from kp_train.data import read_source
from kp_train.dataset import FaceDataset
from kp_train.model import KeypointNet
from kp_train.run_record import ancestry
from kp_train.synthetic import write_csv_source
from kp_train.teachers import load_teachers, reduced
from kp_train.train import KeypointModule, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

LICENCE = {"weights": "for research"}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv_source(tmp_path_factory.mktemp("faces"), people=20)


def model(folder: Path, size: int, seed: int = 0, **spec: object) -> Path:
    """A bundle with random weights, whose answers lie about the crop's middle."""
    torch.manual_seed(seed)
    net = KeypointNet(size, points=int(spec.get("points", 68)))  # type: ignore[call-overload]
    contract = dataclasses.replace(ModelSpec("teacher", size=size), **spec)
    save_checkpoint(folder, net, Manifest(contract, licence=LICENCE), half=False)
    return folder


def run(faces: Path, out: Path, teachers: list[Path], **changes: object) -> Path:
    settings = {"size": 64, "epochs": 1, "batch_size": 16, "ema": 0} | changes
    more: dict[str, Any] = {key: settings.pop(key) for key in ("resume", "init", "licence") if key in settings}
    return train(
        [read_source(faces)], recipe("default", **settings), out, teachers=teachers, **more,
        weights="none", accelerator="cpu", workers=0, progress=False,
    )  # fmt: skip


def test_the_target_is_the_mean_of_the_label_and_the_answers(tmp_path: Path) -> None:
    paths = [model(tmp_path / "large", 128, 1), model(tmp_path / "small", 64, 2)]
    taught = load_teachers(paths, ModelSpec("run", size=64))
    crops = torch.randint(0, 256, (3, 1, 128, 128), dtype=torch.uint8)
    label = torch.randn(3, 136)
    large, small = (load_checkpoint(path)[0].eval() for path in paths)
    half = torch.from_numpy(crops.numpy().reshape(3, 1, 64, 2, 64, 2).mean(axis=(3, 5)).round().astype(np.uint8))
    with torch.no_grad():
        wanted = (label + large.raw(crops) + small.raw(half)) / 3
    assert taught.size == 128
    assert torch.equal(reduced(crops, 64), half)
    torch.testing.assert_close(taught.target(crops, label), wanted)
    assert not taught.target(crops, label).requires_grad


def test_without_teachers_the_target_is_the_label() -> None:
    label = torch.randn(3, 136)
    taught = load_teachers([], ModelSpec("run", size=64))
    assert taught.size == 64
    assert torch.equal(taught.target(torch.zeros(3, 1, 64, 64, dtype=torch.uint8), label), label)


@pytest.mark.parametrize("name", ["none", "varied", "bent"])
def test_larger_crops_show_the_same_face_and_keep_its_points(faces: Path, name: str) -> None:
    """The variation that a seed draws is the same in both, so points agree, and the means of the larger crop are
    nearly the plain one (without what is done to grey levels, which is random a pixel)."""
    source, spec = read_source(faces), ModelSpec("run", size=64)
    known = dataclasses.replace(source.faces[0], bias=np.full((68, 2), 0.02))
    plain, twice = (FaceDataset([known], spec, augment_from_name(name), detail=detail) for detail in (1, 2))
    for seed in range(5):
        (small, xy), (large, same) = plain[(0, seed)], twice[(0, seed)]
        assert large.shape == (1, 128, 128)
        torch.testing.assert_close(same, xy, atol=0.02, rtol=0)
        if name == "none":
            away = (reduced(large[None], 64)[0].float() - small.float()).abs()
            assert float(away.mean()) < 3


def test_a_step_goes_towards_the_mean_of_label_and_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a step is that of its target, on the crop as the run's own size sees it."""
    taught = load_teachers([model(tmp_path / "large", 128)], ModelSpec("run", size=64))
    module = KeypointModule(recipe("default", size=64), taught)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    module.eval()  # so that both looks at the crops are alike
    crops, xy = torch.randint(0, 256, (3, 1, 128, 128), dtype=torch.uint8), torch.rand(3, 68, 2) * 64
    target = (module.net.encode(xy) + taught.nets[0].raw(crops)) / 2
    wanted = torch.nn.functional.smooth_l1_loss(module.net.raw(reduced(crops, 64)), target, beta=module.config.beta)
    torch.testing.assert_close(module.training_step((crops, xy), 0), wanted)
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"net"}


def test_a_run_records_its_teachers_and_stays_under_their_licence(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says which of them may have seen people whom it holds out, whom nothing takes for new to it then."""
    teacher = model(tmp_path / "teacher", 128)
    manifest = Manifest.read(teacher)
    dataclasses.replace(manifest, training={"held_out": {"val_fraction": 0.1}}).write(teacher)
    before = (teacher / "checkpoint.safetensors").read_bytes()
    _, manifest = load_checkpoint(run(faces, tmp_path / "r", [teacher]))
    assert "may have seen" not in capsys.readouterr().out
    learned = {"sources": [{"sha256": read_source(faces).sha256, "whole": True}]}
    older = model(tmp_path / "older", 64)
    dataclasses.replace(Manifest.read(older), training={"held_out": {"val_fraction": 0.1}} | learned).write(older)
    _, taught = load_checkpoint(run(faces, tmp_path / "s", [older]))
    assert f"{older} may have seen people whom this run holds out: their NME flatters it" in capsys.readouterr().out
    assert held_out_faces([read_source(faces)], manifest)
    with pytest.raises(DataError, match="no face of a person that was held out"):
        held_out_faces([read_source(faces)], taught)
    _, later = load_checkpoint(run(faces, tmp_path / "t", [], init=tmp_path / "s"))
    runs = ancestry(later.training)
    assert [record.get("sources", [{}])[0].get("whole") for record in runs] == [False, False, True]
    assert all("runs" not in each for record in runs for each in record.get("teachers", []))
    sha256 = load_checkpoint(teacher)[1].files["checkpoint.safetensors"].sha256
    assert manifest.training["teachers"] == [
        {"name": "teacher", "sha256": sha256, "runs": [{"sources": [], "held_out": {"val_fraction": 0.1}}]}
    ]
    assert manifest.licence == LICENCE
    assert (teacher / "checkpoint.safetensors").read_bytes() == before
    state = SafetensorsIO().load_checkpoint(tmp_path / "r" / LAST_STATE)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"net"}


def test_a_run_goes_on_with_its_teachers_alone(faces: Path, tmp_path: Path) -> None:
    teacher, other = model(tmp_path / "teacher", 64), model(tmp_path / "other", 64, seed=1)
    run(faces, tmp_path / "r", [teacher])
    for wrong in ([], [other]):
        with pytest.raises(KpError, match="began with other teachers; give the same ones"):
            run(faces, tmp_path / "r", wrong, resume=True)


def test_teachers_of_another_contract_are_refused(tmp_path: Path) -> None:
    spec = ModelSpec("run", size=64)
    with pytest.raises(InputError, match=r"wide can't teach this run: it has margin 1\.5, the run 1\.3"):
        load_teachers([model(tmp_path / "wide", 64, margin=1.5)], spec)
    with pytest.raises(InputError, match=r"few can't teach this run: it has points 5, the run 68"):
        load_teachers([model(tmp_path / "few", 64, points=5, scheme="own")], spec)
    with pytest.raises(InputError, match=r"frames can't teach this run: it has box frame, the run keypoints"):
        load_teachers([model(tmp_path / "frames", 64, box="frame")], spec)
    with pytest.raises(
        InputError, match="crops of 96 pixels can't be reduced to 64; take teachers of sizes that divide"
    ):
        load_teachers([model(tmp_path / "odd", 96)], spec)


def test_licences_that_differ_are_refused(faces: Path, tmp_path: Path) -> None:
    teacher, other = model(tmp_path / "teacher", 64), model(tmp_path / "other", 64)
    manifest = load_checkpoint(other)[1]
    dataclasses.replace(manifest, licence={"weights": "free"}).write(other)
    with pytest.raises(InputError, match="the licences of start and teachers differ"):
        run(faces, tmp_path / "r", [teacher, other])
    with pytest.raises(InputError, match=r"stays under its licence, .*for research.*; leave --licence out"):
        run(faces, tmp_path / "r", [teacher], licence={"weights": "for all"})
    assert not (tmp_path / "r" / "run.json").exists()
