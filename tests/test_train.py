"""Training on small drawn faces: it learns, is recorded, and says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kp_runtime.errors import DataError, InputError, KpError
from kp_runtime.manifest import Manifest
from kp_runtime.spec import ModelSpec
from kp_train.callbacks import EpochLines, FacesPicture, Together
from kp_train.checkpoint import CHECKPOINT_NAME, LAST_STATE, SafetensorsIO, load_checkpoint, save_checkpoint
from kp_train.config import RECIPES, recipe
from kp_train.data import is_held_out, parse_source, read_source
from kp_train.dataset import FaceDataset
from kp_train.model import KeypointNet
from kp_train.synthetic import write_csv_source
from kp_train.train import _start_weights, train
from tests.test_export import small_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv_source(tmp_path_factory.mktemp("faces"), people=40)


def run(faces: Path, out: Path, **changes: object) -> Path:
    settings = {"size": 64, "epochs": 2, "batch_size": 16, "ema": 0.5, "lr": 1e-3} | changes
    base = str(settings.pop("recipe", "default"))
    more: dict[str, Any] = {"weights": "none"}
    more |= {key: settings.pop(key) for key in ("resume", "name", "init", "weights", "licence") if key in settings}
    return train(
        [read_source(faces)], recipe(base, **settings), out,
        accelerator="cpu", workers=0, picture_every=1, progress=False, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(faces, tmp_path_factory.mktemp("runs") / "r", epochs=8, batch_size=8, augment="none").parent


@pytest.mark.parametrize(("has", "said"), [(False, True), (True, False), (None, False)])
def test_bfloat16_on_a_processor_without_it_is_said(
    has: bool | None, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kp_train.train.has_bfloat16", lambda: has)
    with pytest.raises(DataError):  # ends before anything is trained
        train([], recipe("default", precision="bf16-mixed"), tmp_path / "r", accelerator="cpu", progress=False)
    told = "this processor has no bfloat16: bf16-mixed is far slower on it than 32-true"
    assert (told in capsys.readouterr().out) == said


def test_fp16_is_refused_where_lightning_would_take_bfloat16(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="16-mixed is for GPUs; on this processor give bf16-mixed or 32-true"):
        train([], recipe("default", precision="16-mixed"), tmp_path / "r", accelerator="cpu", progress=False)


@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_apple_s_gpu_is_refused(accelerator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("fabric", "pytorch"):
        monkeypatch.setattr(f"lightning.{part}.accelerators.mps.MPSAccelerator.is_available", lambda: True)
    with pytest.raises(InputError, match="training was not tried on Apple's GPU; give --accelerator cpu"):
        train([], recipe("default"), tmp_path / "r", accelerator=accelerator, progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_faces_of_a_run_that_leaves_all_measure_are_drawn(faces: Path, tmp_path: Path, value: float) -> None:
    """Its end says what is wrong (`check_finite`), or it comes back."""
    shown = FaceDataset(read_source(faces).faces[:2], ModelSpec("x", 64))
    module = torch.nn.Module()
    module.net = lambda crops: torch.full((len(crops), 68, 2), value)  # type: ignore[assignment]
    module.device = "cpu"  # type: ignore[assignment]
    trainer = SimpleNamespace(is_global_zero=True, current_epoch=0, logger=None)
    FacesPicture(shown, tmp_path, every=1).on_validation_epoch_end(trainer, module)  # type: ignore[arg-type]
    assert (tmp_path / "faces_epoch_001.png").is_file()


def test_faces_are_drawn_every_few_epochs_and_by_the_first_worker(faces: Path, tmp_path: Path) -> None:
    shown = FaceDataset(read_source(faces).faces[:2], ModelSpec("x", 64))
    module = torch.nn.Module()
    module.net = lambda crops: torch.zeros(len(crops), 68, 2)  # type: ignore[assignment]
    module.device = "cpu"  # type: ignore[assignment]
    picture = FacesPicture(shown, tmp_path, every=3)
    for epoch in range(7):
        for first in (True, False):
            trainer = SimpleNamespace(is_global_zero=first, current_epoch=epoch, logger=None)
            picture.folder = tmp_path / f"{first}"
            picture.on_validation_epoch_end(trainer, module)  # type: ignore[arg-type]
    drawn = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert drawn == ["True/faces_epoch_003.png", "True/faces_epoch_006.png"]
    sheet = cv2.imread(str(tmp_path / drawn[0]))
    assert sheet.shape == (260, 518, 3)  # two of 64 px, enlarged to be seen
    _, green, red = sheet[2:258, 2:258].transpose(2, 0, 1)
    labels, predictions = np.argwhere((green > 200) & (red < 90)), np.argwhere((red > 200) & (green < 90))
    place = (np.stack([picture.xy[0].amin(dim=0), picture.xy[0].amax(dim=0)]) + 0.5) * 4 - 0.5
    np.testing.assert_allclose([labels.min(axis=0) + 3, labels.max(axis=0) - 3], place[:, ::-1], atol=1)
    assert predictions.max() < 5  # at the first pixel of each


def test_a_worker_that_begins_otherwise_than_the_first_is_told() -> None:
    first = {"settings": {"lr": 0.1}, "data": [["0" * 64, 1.0]]}
    trainer = SimpleNamespace(global_rank=1, strategy=SimpleNamespace(broadcast=lambda own: first))
    Together(dict(first), False).setup(trainer, torch.nn.Module(), "fit")  # type: ignore[arg-type]
    other = Together(first | {"data": []}, False)
    with pytest.raises(KpError, match=r"worker 1 begins otherwise than worker 0 \(data\); give every node the same"):
        other.setup(trainer, torch.nn.Module(), "fit")  # type: ignore[arg-type]


def test_a_line_tells_the_losses_and_the_nme_of_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"train_loss": 0.0234, "val_loss": 0.0123, "val_nme": 0.045}
    trainer = SimpleNamespace(is_global_zero=True, current_epoch=1, max_epochs=3, callback_metrics=measured)
    EpochLines().on_train_epoch_end(trainer, torch.nn.Module())  # type: ignore[arg-type]
    assert capsys.readouterr().out == "epoch 2/3  train loss 0.02340, held-out loss 0.01230, NME 4.50%\n"


def test_a_run_learns(trained: Path, faces: Path) -> None:
    """Held-out faces are met better than by the mean face that the network starts from."""
    net, manifest = load_checkpoint(trained)
    source = read_source(faces)
    held = [f for f in source.faces if is_held_out(f.person, 0.1)]
    data = FaceDataset(held, manifest.spec)
    crops, xy = (torch.stack(part) for part in zip(*data, strict=True))
    mean = torch.stack([xy for _, xy in FaceDataset(source.faces[:40], manifest.spec)]).mean(dim=0)
    with torch.no_grad():
        error = (net(crops) - xy).norm(dim=-1).mean()
    assert float(error) < 0.75 * float((mean - xy).norm(dim=-1).mean())


def test_a_run_leaves_its_record_pictures_and_curves(trained: Path, faces: Path) -> None:
    record = json.loads((trained / "manifest.json").read_text())["training"]
    assert record["config"]["seed"] == RECIPES["default"].seed
    assert record["sources"][0]["sha256"] == read_source(faces).sha256
    assert record["sources"][0]["trained_on"] + record["held_out"]["faces"] == 80
    assert record["start"] == {"weights": "none"}
    assert record["devices"] == 1
    assert set(record["versions"]) == {"python", "torch", "torchvision", "lightning"}
    assert len(list((trained / "pictures").glob("*.png"))) == 8
    events = EventAccumulator(str(trained / "curves"))
    events.Reload()
    assert {"train_loss", "val_loss", "val_nme"} <= set(events.Tags()["scalars"])
    assert not [p for p in trained.rglob("*") if p.suffix in (".ckpt", ".pt", ".pth", ".pkl")]


def test_the_checkpoint_is_the_best_states_averaged_weights(trained: Path) -> None:
    state = SafetensorsIO().load_checkpoint(trained / "state" / "best.state")
    averaged, current = state["state_dict"], state["current_model_state"]
    stored = load_checkpoint(trained)[0].backbone.conv1.weight
    assert torch.equal(stored, averaged["net.backbone.conv1.weight"].half().float())
    assert not torch.equal(averaged["net.backbone.conv1.weight"], current["net.backbone.conv1.weight"])


def test_the_last_epochs_weights_can_be_kept(faces: Path, tmp_path: Path) -> None:
    """A rate that rises spoils the weights: the first epoch's loss is the lowest, and `best` keeps it."""
    kept = {}
    for keep in ("best", "last"):
        path = run(faces, tmp_path / keep, keep=keep, lr=0.02, ema=0, warmup=0.9, epochs=3)
        kept[keep] = load_checkpoint(path)[1].training
        state = SafetensorsIO().load_checkpoint(path.parent / LAST_STATE)["state_dict"]["net.backbone.conv1.weight"]
        net, _ = load_checkpoint(path)
        assert torch.equal(net.backbone.conv1.weight, state.half().float()) == (keep == "last")
    assert (kept["best"]["best_epoch"], kept["last"]["last_epoch"]) == (1, 3)


def test_a_run_can_start_from_a_checkpoint_at_another_size(trained: Path, faces: Path, tmp_path: Path) -> None:
    manifest = load_checkpoint(trained)[1]
    shutil.copytree(trained, tmp_path / "licensed")
    dataclasses.replace(manifest, licence={"weights": "for research"}).write(tmp_path / "licensed")
    path = train(
        [read_source(faces)], recipe("default", size=80, epochs=1, batch_size=16, lr=1e-7, ema=0), tmp_path / "r",
        init=tmp_path / "licensed", accelerator="cpu", workers=0, progress=False,
    )  # fmt: skip
    _, manifest = load_checkpoint(path)
    assert manifest.spec.size == 80
    assert manifest.licence == {"weights": "for research"}  # what is made from it stays under it
    start = manifest.training["start"]
    assert start["checkpoint_sha256"] == load_checkpoint(trained)[1].files[CHECKPOINT_NAME].sha256
    assert start["training"]["config"]["size"] == 64


def test_the_licence_that_is_given_stays_with_the_weights(faces: Path, tmp_path: Path) -> None:
    terms = {"weights": "for us alone"}
    for name, more in (("first", {"licence": terms}), ("second", {"init": tmp_path / "first"})):
        assert load_checkpoint(run(faces, tmp_path / name, epochs=1, **more))[1].licence == terms
    run(faces, tmp_path / "first", epochs=1, resume=True)
    with pytest.raises(KpError, match=r"began with the licence .*for us alone.*; leave --licence out"):
        run(faces, tmp_path / "first", epochs=1, resume=True, licence={"weights": "for all"})


def test_records_do_not_nest_deeper_with_each_start(faces: Path, tmp_path: Path) -> None:
    """A manifest that is nested too deep could not be read again."""
    init = small_checkpoint(tmp_path / "0")
    dataclasses.replace(Manifest.read(init), training={"config": {"seed": 0}}).write(init)
    for seed in (1, 2, 3):
        init = run(faces, tmp_path / f"{seed}", epochs=1, init=init, seed=seed).parent
    start = load_checkpoint(init)[1].training["start"]
    records = [start["training"], *start["before"]]
    assert [record["config"]["seed"] for record in records] == [2, 1, 0]
    assert all(not {"training", "before"} & set(record.get("start", {})) for record in records)


def test_a_start_that_may_have_seen_held_out_people_is_said(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for held_out, is_said in (({}, True), ({"val_fraction": 0.01}, True), ({"val_fraction": 0.1}, False)):
        init = small_checkpoint(tmp_path / f"{held_out}")
        dataclasses.replace(Manifest.read(init), training={"held_out": held_out}).write(init)
        run(faces, tmp_path / f"from {held_out}", epochs=1, init=init)
        assert ("may have seen people whom this run holds out" in capsys.readouterr().out) == is_said


def test_what_a_start_began_at_may_have_seen_held_out_people(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def no_biases(net: KeypointNet, sources: object, fraction: float, *rest: object) -> list[None]:
        asked.append(fraction)
        return [None]

    monkeypatch.setattr("kp_train.train.source_biases", no_biases)
    first = small_checkpoint(tmp_path / "first")
    held_out = {"held_out": {"val_fraction": 0.3}, "start": {"training": {"held_out": {"val_fraction": 0.01}}}}
    dataclasses.replace(Manifest.read(first), training=held_out).write(first)
    for name, init in (("second", first), ("third", tmp_path / "second")):
        run(faces, tmp_path / name, epochs=1, init=init)
        assert "may have seen people whom this run holds out" in capsys.readouterr().out
    assert asked == [0.01, 0.01]


@pytest.mark.parametrize(
    ("ema", "steps", "averaged"),
    [(None, 100, 0.9), (None, 8000, 0.998), (None, 5, 0.0), (0.998, 100, 0.998), (0.0, 100, 0.0)],
)
def test_the_weight_averaging_goes_by_the_length_of_the_run_unless_given(
    ema: float | None, steps: int, averaged: float
) -> None:
    assert recipe("default", ema=ema).resolved(steps).ema == pytest.approx(averaged)


def test_what_the_weight_averaging_came_to_is_said_and_kept(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run(faces, tmp_path / "r", ema=None, batch_size=8)
    record = load_checkpoint(path)[1].training
    steps = 2 * (record["sources"][0]["trained_on"] // 8)
    assert record["config"]["ema"] == 1 - 10 / steps
    others = record["held_out"]["faces"]
    line = (
        f"{80 - others} faces of {40 - others // 2} people to train on, {others} faces of {others // 2} people held out"
    )
    assert f"{line}; decay of the weight averaging {1 - 10 / steps:.4g}\n" in capsys.readouterr().out
    assert "averaging_state" in SafetensorsIO().load_checkpoint(path.parent / LAST_STATE)


def test_several_devices_and_what_a_step_sees_are_said(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning takes all GPUs of a machine, where nothing else is said."""

    def stop(*_: object) -> None:
        raise KpError("enough")

    monkeypatch.setattr("kp_train.train.Loaders", stop)
    with pytest.raises(KpError, match="enough"):
        train([read_source(faces)], recipe("default", size=64), tmp_path / "r", accelerator="cpu", devices="2",
              weights="none", progress=False)  # fmt: skip
    assert " people held out; 2 devices, 128 faces a step; decay of the" in capsys.readouterr().out


def test_the_original_recipe_trains_on_whole_photos(faces: Path, tmp_path: Path) -> None:
    path = run(faces, tmp_path / "r", recipe="seed", size=64, epochs=1, ema=None)
    _, manifest = load_checkpoint(path)
    assert (manifest.spec.box, manifest.spec.margin) == ("frame", 1.0)
    config = manifest.training["config"]
    assert (config["optimizer"], config["lr"], config["beta"], config["patience"]) == ("adam", 1e-3, 1.0, 10)
    assert config["ema"] == 0


def test_a_model_that_sees_another_part_of_a_photo_is_not_asked_how_labels_lie(faces: Path, tmp_path: Path) -> None:
    asked = []
    for margin in (1.0, 1.3):
        torch.manual_seed(0)
        init = tmp_path / f"{margin}"
        save_checkpoint(init, KeypointNet(64), Manifest(ModelSpec("x", 64, margin)))
        path = run(faces, tmp_path / f"from {margin}", epochs=1, init=init)
        asked.append("label_bias" in load_checkpoint(path)[1].training["sources"][0])
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("how", "line"),
    [
        (signal.SIGKILL, r"makes crops was killed, .*; go on with fewer --workers"),
        (signal.SIGTERM, r"stopped in epoch 1 of 1, before the first state was saved: start it again"),
    ],
)
def test_a_killed_process_of_the_loader_is_one_line(
    how: signal.Signals, line: str, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the system, for want of memory; or by who stops all processes of a job."""

    def killed(self: FaceDataset, index: int) -> Any:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), how)
        return item(self, index)

    item = FaceDataset._item
    monkeypatch.setattr(FaceDataset, "_item", killed)
    with pytest.raises(KpError, match=line):
        train(
            [read_source(faces)], recipe("default", size=64, epochs=1, ema=0), tmp_path / "r",
            weights="none", accelerator="cpu", workers=1, progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("option", [{"accelerator": "foo"}, {"devices": "foo"}, {"strategy": "foo"}])
def test_what_lightning_refuses_is_one_line(faces: Path, tmp_path: Path, option: dict[str, str]) -> None:
    with pytest.raises(KpError, match="Lightning refuses"):
        train([read_source(faces)], recipe("default", size=64), tmp_path / "r", **{"accelerator": "cpu"} | option)


def test_tasks_that_lightning_refuses_below_slurm_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(KpError, match=r"Lightning refuses .*: You set `--ntasks=2` .* Use `--ntasks-per-node=2`"):
        train([], recipe("default"), tmp_path / "r", accelerator="cpu", progress=False)


def test_a_held_out_photo_that_is_trained_on_by_another_name_is_said(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = next(face for face in read_source(faces).faces if is_held_out(face.person, 0.1))
    other = next(f"copy{i}.png" for i in range(99) if not is_held_out(f"copy{i}", 0.1))
    copied = shutil.copytree(faces.parent, tmp_path / "copied") / faces.name
    run(copied, tmp_path / "first", epochs=1)
    assert "by another name" not in capsys.readouterr().out
    shutil.copy(kept.image, copied.parent / "training" / other)
    with copied.open("a") as file:
        file.write(",".join([other, *map(str, kept.xy.ravel())]) + "\n")
    run(copied, tmp_path / "second", epochs=1)
    told = rf"held out and, by another name, trained on: 1 of .*{kept.image.name} and .*{other}; remove"
    assert re.search(told, capsys.readouterr().out)


@pytest.mark.parametrize("source", ["{}=0.001", "{}=0.0001"])
def test_weights_that_draw_no_face(faces: Path, tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match="draw 0 faces in an epoch for 1 workers; give larger ones behind --data"):
        train(
            [parse_source(source.format(faces))], recipe("default", size=64), tmp_path / "r",
            weights="none", accelerator="cpu", progress=False,
        )  # fmt: skip


def test_a_source_of_which_nothing_is_drawn(faces: Path, tmp_path: Path) -> None:
    few = write_csv_source(tmp_path / "few", people=4)
    with pytest.raises(
        DataError, match=r"few.* faces to train on, of which the weight 0\.01 draws none; give a larger"
    ):
        train(
            [read_source(faces), read_source(few, 0.01)], recipe("default", size=64), tmp_path / "r",
            weights="none", accelerator="cpu", progress=False,
        )  # fmt: skip


def test_too_little_memory_is_one_line(faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kp_train.train.F.smooth_l1_loss", lambda *_, **__: torch.empty(1 << 50))
    with pytest.raises(KpError, match="the device has too little memory for 16 crops; lower --batch-size"):
        run(faces, tmp_path / "r")


def test_a_run_whose_last_epoch_left_all_measure_keeps_its_best(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON has no number for what it measured."""
    monkeypatch.setattr("kp_train.train.nme_unit", lambda xy: np.zeros(len(xy)))
    path = run(faces, tmp_path / "r", epochs=2)
    _, manifest = load_checkpoint(path)
    assert "val_loss" in manifest.training["last_epoch_metrics"]
    assert "val_nme" not in manifest.training["last_epoch_metrics"]


@pytest.mark.parametrize(
    "setting",
    [{"optimizer": "sgd"}, {"box": "foo"}, {"beta": -1.0}, {"warmup": 3.0}, {"patience": -1}, {"augment": "much"},
     {"weight_decay": -0.1}, {"keep": "worst"}, {"precision": "bf16-true"}, {"precision": "foo"},
     {"size": 50}, {"lr": 2.0}, {"epochs": 0}, {"seed": 2**32}, {"batch_size": 10**18}],
)  # fmt: skip
def test_settings_that_are_none(setting: dict[str, object]) -> None:
    with pytest.raises(KpError, match=f"the setting {next(iter(setting))} must be"):
        recipe("default", **setting)


def test_a_recipe_that_is_none() -> None:
    with pytest.raises(KpError, match="no recipe 'other'"):
        recipe("other")


def test_too_few_people_to_hold_any_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^2 faces of 1 person \(person0\) give none to validate on .* anna_001\.jpg"):
        run(write_csv_source(tmp_path, people=1), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_run_begins_at_a_model_with_a_lost_score(tmp_path: Path) -> None:
    """`kp refit` gives it one, and a run from there has none until it is refitted itself."""
    torch.manual_seed(0)
    scored, net = KeypointNet(64, scores=True), KeypointNet(64)
    save_checkpoint(tmp_path / "run", scored, Manifest(ModelSpec("x", size=64, lost_limit=0.5)), half=False)
    start, _ = _start_weights(net, None, "none", tmp_path / "run")  # type: ignore[arg-type]
    assert start["points"] == 68
    stored = scored.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in net.state_dict().items())
    assert set(stored) - set(net.state_dict()) == {"backbone.lost_score.weight", "backbone.lost_score.bias"}
