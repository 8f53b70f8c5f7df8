"""The mean of several runs' weights: what it is, what it keeps of them, and which runs have none."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import mean_weights
import pytest
import torch

from kp_cli.report import print_bundle
from kp_runtime.errors import InputError, KpError
from kp_runtime.manifest import Manifest
from kp_runtime.spec import ModelSpec
from kp_train.checkpoint import CHECKPOINT_NAME, load_checkpoint, save_checkpoint
from kp_train.model import KeypointNet

SPEC = ModelSpec("small", 64)
TENTH = {"held_out": {"val_fraction": 0.1}}
TRAINING: dict[str, Any] = TENTH | {
    "config": {"seed": 1},
    "start": {"checkpoint_sha256": "ab", "training": TENTH | {"start": {"checkpoint_sha256": "first"}}},
    "refit": {"start_sha256": "cd"},
}


def saved(path: Path, seed: int, spec: ModelSpec = SPEC, licence: str = "MIT", **training: Any) -> Path:
    torch.manual_seed(seed)
    net = KeypointNet(spec.size, scores=spec.lost_limit is not None)
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape))
    save_checkpoint(path, net, Manifest(spec, training=TRAINING | training, licence={"code": licence}))
    return path


def test_the_mean_is_that_of_each_number_and_tells_of_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = {"checkpoint_sha256": "between", "training": TENTH | {"refit": {"start_sha256": "ab"}}}
    scored = saved(tmp_path / "a", 1, dataclasses.replace(SPEC, lost_limit=0.5), lost_score={"start_sha256": "cd"})
    runs = [scored, saved(tmp_path / "b", 2), saved(tmp_path / "c", 3, start=start)]
    monkeypatch.setattr(sys, "argv", ["mean_weights", *map(str, runs), "--out", str(tmp_path / "mean")])
    mean_weights.main()
    assert f"next: kp refit {tmp_path / 'mean'} " in capsys.readouterr().out
    net, manifest = load_checkpoint(tmp_path / "mean")
    states = [load_checkpoint(run)[0].state_dict() for run in runs]
    for name, value in net.state_dict().items():
        expected = torch.stack([state[name].double() for state in states]).mean(dim=0)
        torch.testing.assert_close(value.double(), expected, atol=2**-11, rtol=0, msg=name)  # matrices are kept as fp16
    assert manifest.spec == SPEC
    assert manifest.licence == {"code": "MIT"}
    assert manifest.training["config"] == TRAINING["config"]
    assert manifest.training["start"] == TRAINING["start"]
    assert not {"refit", "lost_score"} & set(manifest.training), "a mean was not refitted yet"
    told = manifest.training["mean_of"]
    hashes = [Manifest.read(run).files[CHECKPOINT_NAME].sha256 for run in runs]
    assert [entry["sha256"] for entry in told] == hashes
    print_bundle(tmp_path / "mean", manifest, {CHECKPOINT_NAME: "ok"})
    assert f"mean of the weights of 3 runs ({', '.join(sha[:12] for sha in hashes)})" in capsys.readouterr().out
    assert [entry["start"] for entry in told] == [{"checkpoint_sha256": sha} for sha in ("ab", "ab", "between")]
    with pytest.raises(KpError, match="mean"):
        mean_weights.main()  # it is there


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spec": dataclasses.replace(SPEC, margin=1.5)}, "contract"),
        ({"config": {"reduce": 2}}, "reduce"),
        ({"held_out": {"val_fraction": 0.2}}, "held-out people"),
        ({"start": {"checkpoint_sha256": "ab", "training": {"held_out": {"val_fraction": 0.05}}}}, "held-out people"),
        ({"licence": "other"}, "licence"),
        ({"start": {"checkpoint_sha256": "other"}, "refit": {}}, "did not begin at the same weights"),
    ],
)
def test_runs_that_have_no_mean(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    runs = [saved(tmp_path / "a", 1), saved(tmp_path / "b", 2, **change)]
    with pytest.raises(InputError, match=complaint):
        mean_weights.mean_of(runs)


def test_a_mean_holds_out_whom_no_run_saw(tmp_path: Path) -> None:
    sources = [{"sha256": "rows", "whole": True}, {"sha256": "photos", "whole": False}]
    runs = [saved(tmp_path / "a", 1), saved(tmp_path / "b", 2, sources=sources)]
    assert mean_weights.mean_of(runs)[1].training["sources"] == sources
    other = saved(tmp_path / "c", 3, sources=[{"sha256": "photos", "whole": True}])
    with pytest.raises(InputError, match=r"c and .*b differ \(held-out people\)"):
        mean_weights.mean_of([*runs, other])


def test_one_run_has_no_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mean_weights", str(tmp_path), "--out", str(tmp_path / "mean")])
    with pytest.raises(InputError, match="two runs"):
        mean_weights.main()
