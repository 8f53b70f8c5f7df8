"""A run that goes on: it ends as an undisturbed one, and is refused where something else began it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from kp_runtime.errors import BundleError, InputError, KpError
from kp_runtime.files import sha256_of_file
from kp_runtime.manifest import Manifest
from kp_train.callbacks import EpochLines, StateKeeper
from kp_train.checkpoint import CHECKPOINT_NAME, LAST_STATE, SafetensorsIO, load_checkpoint
from kp_train.config import recipe
from kp_train.data import parse_source, read_source
from kp_train.synthetic import write_csv_source
from kp_train.train import train
from tests.test_train import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv_source(tmp_path_factory.mktemp("faces"), people=40)


@pytest.fixture(scope="module")
def trained(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(faces, tmp_path_factory.mktemp("runs") / "r", epochs=1).parent


def test_a_second_run_in_one_folder_is_refused(trained: Path, faces: Path) -> None:
    with pytest.raises(KpError, match="already holds a run; add --resume"):
        run(faces, trained)


def test_states_of_earlier_releases_are_found(tmp_path: Path) -> None:
    """Lightning stores a callback's state under its class's name."""
    given: dict[str, Any] = {"dirpath": tmp_path, "filename": "best", "monitor": "val_loss"}
    assert StateKeeper(**given).state_key == ModelCheckpoint(**given).state_key


def test_a_run_that_was_moved_keeps_its_best_epoch(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out loss rises from epoch to epoch, so that the first one stays the best, wherever the folder lies."""
    rises = {"lr": 0.02, "ema": 0, "warmup": 0.9, "epochs": 3}

    class Stops(EpochLines):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr("kp_train.train.EpochLines", Stops)
        with pytest.raises(KpError, match="stopped in epoch 2 of 3"):
            run(faces, tmp_path / "here", **rises)
    shutil.move(tmp_path / "here", tmp_path / "there")
    path = run(faces, tmp_path / "there", resume=True, **rises)
    assert load_checkpoint(path)[1].training["best_epoch"] == 1
    assert [state.name for state in sorted((tmp_path / "there" / "state").iterdir())] == ["best.state", "last.state"]


def test_a_finished_run_is_left_as_it_is(
    trained: Path, faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what was exported and measured since."""
    shutil.copytree(trained, tmp_path / "r")
    manifest = Manifest.read(tmp_path / "r")
    dataclasses.replace(manifest, accuracy={"rows": {"nme": 0.1}}).write(tmp_path / "r")
    before = (tmp_path / "r" / "manifest.json").read_bytes()
    run(faces, tmp_path / "r", epochs=1, resume=True)
    assert "r is finished" in capsys.readouterr().out
    assert (tmp_path / "r" / "manifest.json").read_bytes() == before


def test_another_name_or_start_can_not_resume_a_run(trained: Path, faces: Path, tmp_path: Path) -> None:
    settings = {"epochs": 1, "resume": True}
    with pytest.raises(KpError, match="began with --name resnet18-68; give the same one"):
        run(faces, trained, name="other", **settings)
    with pytest.raises(KpError, match=r"began at other weights than .*; leave --init out"):
        run(faces, trained, init=trained, **settings)
    with pytest.raises(BundleError, match="there is no checkpoint at"):
        run(faces, trained, init=tmp_path / "gone", **settings)
    with pytest.raises(KpError, match="began at other weights than imagenet; leave --weights out"):
        run(faces, trained, weights="imagenet", **settings)
    with pytest.raises(InputError, match=r"begins at --init .* or at --weights /a\.pth; leave one out"):
        run(faces, tmp_path / "r", init=trained, weights="/a.pth")


def test_weights_are_known_by_their_content(faces: Path, tmp_path: Path) -> None:
    same, other = tmp_path / "moved.pth", tmp_path / "w.pth"
    same.write_bytes(b"weights")
    other.write_bytes(b"other weights")
    begun(faces, tmp_path, {}, start={"weights": "w.pth", "weights_sha256": sha256_of_file(same)})
    with pytest.raises(KpError, match=r"began at other weights than .*w\.pth; leave --weights out"):
        run(faces, tmp_path, ema=0, weights=str(other), resume=True)
    for good in (same, Path("elsewhere/w.pth")):
        with pytest.raises(KpError, match="does not fit this release"):  # its state is empty
            run(faces, tmp_path, ema=0, weights=str(good), resume=True)


def test_below_slurm_a_run_stops_at_sigterm_and_saves_and_finds_no_state_of_its_own(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would save one in the current folder, at SIGUSR1, and the next run there would begin from it."""
    for name, value in {"NTASKS": 1, "JOB_ID": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    handlers = []

    class Stops(EpochLines):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            handlers.append(signal.getsignal(signal.SIGUSR1))
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("kp_train.train.EpochLines", Stops)
    with pytest.raises(KpError, match=r"stopped in epoch 2 of 2; .*: the same command with --resume goes on"):
        run(faces, tmp_path / "r")
    assert handlers == [signal.getsignal(signal.SIGUSR1)]
    assert [path.name for path in tmp_path.iterdir() if path.name != "r"] == ["hpc_ckpt_1.ckpt"]


def test_nothing_to_resume_and_other_settings_are_said(trained: Path, faces: Path, tmp_path: Path) -> None:
    with pytest.raises(KpError, match="nothing to resume"):
        train([read_source(faces)], recipe("default"), tmp_path / "none", resume=True)
    with pytest.raises(KpError, match=r"began with other settings \(.*epochs 1 -> 2.* --init .* --out OTHER"):
        train([read_source(faces)], recipe("default", epochs=2), trained, resume=True)


def test_other_data_can_not_resume_a_run(trained: Path, faces: Path, tmp_path: Path) -> None:
    other = read_source(write_csv_source(tmp_path, people=40, seed=1))
    same = recipe("default", size=64, epochs=1, batch_size=16, ema=0.5, lr=1e-3)
    heavier = parse_source(f"{faces}=2")
    for source in (other, heavier):
        with pytest.raises(KpError, match="began with other data or weights"):
            train([source], same, trained, resume=True, accelerator="cpu", progress=False)


def begun(faces: Path, run: Path, state: dict[str, Any], ema: float = 0, **record: object) -> None:
    """A run that was killed: its record and its state."""
    config, source = recipe("default", size=64, epochs=2, batch_size=16, ema=ema, lr=1e-3), read_source(faces)
    stored, used = dataclasses.asdict(config), [{"sha256": source.sha256, "weight": 1.0}]
    kept = {"config": stored, "sources": used, "start": {}} | record
    SafetensorsIO().save_checkpoint(state, run / LAST_STATE)
    (run / "run.json").write_text(json.dumps(kept))


def test_a_run_goes_on_with_the_averaging_that_it_began_with(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier release had another default than one by the run's length."""
    given: list[tuple[torch.device, float]] = []

    class Noted(EMAWeightAveraging):
        def __init__(self, device: torch.device, decay: float) -> None:
            given.append((device, decay))
            super().__init__(device, decay=decay)

    monkeypatch.setattr("kp_train.train.EMAWeightAveraging", Noted)
    begun(faces, tmp_path, {}, ema=0.998)
    with pytest.raises(KpError, match=r"ema 0\.998 -> 0\.9\)"):
        run(faces, tmp_path, ema=0.9, resume=True)
    with pytest.raises(KpError, match="does not fit this release"):  # its state is of nothing
        run(faces, tmp_path, ema=None, resume=True)
    assert given == [(torch.device("cpu"), 0.998)]


def test_another_number_of_devices_can_not_resume_a_run(faces: Path, tmp_path: Path) -> None:
    """Its schedule would end too early, or never."""
    begun(faces, tmp_path, {}, devices=2)
    with pytest.raises(KpError, match="began on 2 devices, and its schedule counts their steps; give it as many"):
        run(faces, tmp_path, ema=0, resume=True)


@pytest.mark.parametrize("state", [{}, {"pytorch-lightning_version": "2.5.0", "state_dict": {"w": torch.ones(1)}}])
def test_a_state_of_another_release_is_one_line(faces: Path, tmp_path: Path, state: dict[str, Any]) -> None:
    begun(faces, tmp_path, state)
    with pytest.raises(KpError, match=r"(?s)last\.state does not fit this release \(.*\); go on with the one that"):
        run(faces, tmp_path, ema=0, resume=True)


def test_a_run_killed_in_its_first_epoch_can_start_again(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "r" / "state" / "last.state.new").mkdir(parents=True)
    assert run(faces, tmp_path / "r", epochs=1).is_file()


@pytest.mark.parametrize(
    "settings", [{"epochs": 2}, {"epochs": 9, "patience": 1, "lr": 0.05, "ema": 0, "warmup": 0.9, "keep": "last"}]
)
def test_a_run_that_was_killed_at_its_end_ends_as_an_undisturbed_one(
    faces: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    """It has its last state, and no checkpoint yet; that of a rising rate ended for want of patience."""
    path = run(faces, tmp_path / "r", **settings)
    weights, manifest = path.read_bytes(), Manifest.read(path.parent)
    assert manifest.training.get("last_epoch") != 9
    for file in (path, path.with_name("manifest.json")):
        file.unlink()
    run(faces, tmp_path / "r", resume=True, **settings)
    assert path.read_bytes() == weights
    assert {"val_loss", "train_loss"} <= set(manifest.training["last_epoch_metrics"])
    assert Manifest.read(path.parent).training == manifest.training


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def _six_epochs(faces: Path, out: Path, workers: int) -> list[str]:
    return [
        sys.executable, "-m", "kp_cli", "train", "--data", str(faces), "--out", str(out), "--size", "64",
        "--epochs", "6", "--batch-size", "8", "--weights", "none", "--workers", str(workers),
        "--accelerator", "cpu",
    ]  # fmt: skip


def _last_weights(run: Path) -> dict[str, torch.Tensor]:
    """After the last epoch, the averaged weights and those that are still being trained."""
    state = SafetensorsIO().load_checkpoint(run / "state" / "last.state")
    return state["state_dict"] | {f"trained {name}": value for name, value in state["current_model_state"].items()}


@pytest.fixture(scope="module")
def undisturbed(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of six epochs without a kill, and without processes that read ahead."""
    out = tmp_path_factory.mktemp("undisturbed") / "r"
    subprocess.run(_six_epochs(faces, out, 0), env=ONE_THREAD, capture_output=True, timeout=300, check=True)
    return _last_weights(out)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored, and that is handed on to every process
    below it; what is started here takes it as from a terminal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_ends_where_an_undisturbed_one_does(
    faces: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path, how: signal.Signals
) -> None:
    """One that reads ahead, too: that begins before Lightning has restored the epoch."""
    command = _six_epochs(faces, tmp_path / "r", 1)
    first = subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("epoch 2/6"):  # early: on a busy machine the line is read epochs later
            break
    first.send_signal(how)
    _, complaint = first.communicate(timeout=120)
    assert not (tmp_path / "r" / CHECKPOINT_NAME).exists()
    if how is signal.SIGINT:
        assert first.returncode == 1
        assert "the same command with --resume goes on" in complaint
    began = time.time()
    second = subprocess.run(
        [*command, "--resume"], env=ONE_THREAD, capture_output=True, text=True, timeout=300, check=False
    )
    assert second.returncode == 0, second.stderr
    epochs = [line.split()[1] for line in second.stdout.splitlines() if line.startswith("epoch")]
    assert epochs[0] != "1/6"
    assert epochs[-1] == "6/6"
    resumed = tmp_path / "r" / CHECKPOINT_NAME
    assert resumed.stat().st_mtime >= began - 1
    weights = _last_weights(tmp_path / "r")
    assert [name for name in undisturbed if not torch.equal(weights[name], undisturbed[name])] == []
