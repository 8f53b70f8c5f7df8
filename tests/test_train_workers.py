"""Training by several workers: they share the faces, and a killed one costs nothing but time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kp_train.checkpoint import SafetensorsIO
from kp_train.loaders import SourceSampler, held_out_batches
from kp_train.synthetic import write_csv_source

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("ranks", [2, 3])
def test_workers_share_the_draws_of_one(ranks: int) -> None:
    """A step of all workers sees what a step of one worker with their batches together sees."""
    sources, each = ([100, 10, 41], [1.0, 2.5, 0.5], 7), 4
    alone = list(SourceSampler(*sources))
    shares = [list(SourceSampler(*sources, rank, ranks)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(alone) // ranks} == {len(SourceSampler(*sources, 0, ranks))}
    for step in range(len(alone) // ranks // each):
        together = {draw for share in shares for draw in share[step * each : (step + 1) * each]}
        assert together == set(alone[step * each * ranks : (step + 1) * each * ranks])
        assert len(together) == each * ranks


def test_an_epoch_draws_each_source_by_its_weight() -> None:
    """Whole passes, and then a random part."""
    sampler = SourceSampler([10, 7, 40], [2.5, 1.0, 0.5], seed=1)
    drawn = Counter(index for index, _ in sampler)
    assert sorted(drawn[index] for index in range(10)) == [2] * 5 + [3] * 5
    assert [drawn[index] for index in range(10, 17)] == [1] * 7
    assert sorted(drawn[index] for index in range(17, 57)) == [0] * 20 + [1] * 20
    seeds = {seed for _, seed in sampler}  # two draws of one face are varied differently
    assert len(sampler) == drawn.total() == len(seeds)


def test_each_epoch_is_drawn_anew_and_is_the_same_once_more() -> None:
    sampler = SourceSampler([20], [1.0], seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert not {*first} & {*second}  # each draw has a seed of its own
    sampler.set_epoch(0)
    assert list(sampler) == first != list(SourceSampler([20], [1.0], seed=2))


@pytest.mark.parametrize("count", [2, 3, 17, 64, 65, 129])
@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_held_out_faces_are_seen_once_in_as_many_batches(count: int, batch_size: int, ranks: int) -> None:
    shares = [held_out_batches(count, batch_size, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert all(0 < len(batch) <= batch_size + 1 for share in shares for batch in share) or count < ranks
    seen = Counter(index for share in shares for batch in share for index in batch)
    assert set(seen) == set(range(count))
    assert set(seen.values()) == ({1} if count >= ranks else {ranks})


# `kp train`, whose workers also leave the weights that they end with, and the measures that they decide by.
# One of them may be killed as by the system's lack of memory, in the middle of the second epoch of the first try.
WORKER = """
import json, os, signal
from pathlib import Path
from safetensors.torch import save_file
import kp_cli
from kp_train import train

class Telling(train.KeypointModule):
    def on_train_batch_start(self, batch, batch_idx):
        here = (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], self.current_epoch, batch_idx)
        if here == (os.environ.get("KP_TEST_KILL"), "0", 1, 2):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self):
        end = Path(os.environ["KP_TEST_END"])
        save_file({k: v.contiguous() for k, v in self.named_parameters()}, end / f"{self.global_rank}.safetensors")
        best = self.trainer.checkpoint_callbacks[0]
        said = {k: float(v) for k, v in self.trainer.callback_metrics.items()} | {"best": float(best.best_model_score)}
        (end / f"{self.global_rank}.json").write_text(json.dumps(said))

train.KeypointModule = Telling
kp_cli.main()
"""
EPOCHS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("workers")
    write_csv_source(place, people=20)
    (place / "worker.py").write_text(WORKER)
    return place


def trained(place: Path, name: str, kill: str = "nobody") -> str:
    """Runs the documented command, at a small size, and returns what it printed.

    Its folders are `name` (the run) and `name.end`; `kill` is a rank.
    """
    (place / f"{name}.end").mkdir()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
        str(place / "worker.py"), "train", "--data", str(place / "training_frames_keypoints.csv"),
        "--out", str(place / name), "--size", "64", "--epochs", str(EPOCHS), "--batch-size", "4", "--ema", "0.9",
        "--weights", "none", "--workers", "1", "--accelerator", "cpu",
    ]  # fmt: skip
    own = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "KP_TEST_KILL": kill}
    done = subprocess.run(
        command, env=os.environ | own | {"KP_TEST_END": str(place / f"{name}.end")},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    state = SafetensorsIO().load_checkpoint(run / "state" / "last.state")
    return state["state_dict"] | {f"trained {name}": value for name, value in state["current_model_state"].items()}


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(place: Path) -> None:
    """One thread a worker always adds in the same order, so that the bits must be the same."""
    undisturbed, killed = trained(place, "undisturbed"), trained(place, "killed", kill="1")
    assert "goes on after epoch" not in undisturbed
    assert killed.count(f"goes on after epoch 1 of {EPOCHS}") == 1
    for said in (undisturbed, killed):
        assert [line.split()[1] for line in said.splitlines() if line.startswith("epoch")] == ["1/3", "2/3", "3/3"]
        assert said.count("checkpoint: ") == 1
    wanted = last_weights(place / "undisturbed")
    got = last_weights(place / "killed")
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
    ends = [place / f"{name}.end" for name in ("undisturbed", "killed")]
    first = load_file(ends[0] / "0.safetensors")
    assert len(first) > 50
    for file in (ends[0] / "1.safetensors", ends[1] / "0.safetensors", ends[1] / "1.safetensors"):
        other = load_file(file)
        assert [name for name in first if not torch.equal(first[name], other[name])] == [], file
    said = {(end / f"{rank}.json").read_text() for end in ends for rank in (0, 1)}
    assert len(said) == 1, said
