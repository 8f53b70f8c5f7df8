"""The script that trains the shipped models, on drawn faces and for one epoch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import train_reference

from kp_runtime.errors import InputError, KpError
from kp_train.data import Source, read_source
from kp_train.refit import NothingGainedError
from kp_train.synthetic import write_csv_source

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.slow
def test_runs_are_measured_kept_and_put_in_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_csv_source(tmp_path / "faces", people=24, each=1)
    out = tmp_path / "runs"
    command = [
        "train_reference.py", "--data", str(data), "--out", str(out), "--part", "final", "--epochs", "1",
        "--taught-epochs", "1", "--seeds", "7", "--change", "batch_size=8", "--change", "size=64",
        "--accelerator", "cpu", "--workers", "0",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    train_reference.main()
    first = capsys.readouterr().out
    begun = json.loads((out / "resnet18-68-lite-7" / "run.json").read_text())["start"]["training"]["config"]
    assert (begun["seed"], begun["epochs"]) == (7, 1)  # of the short run that comes first
    assert "| resnet18-68-first-7 |" in first
    names = [
        f"{model}{kind}{refitted}-7"
        for kind in ("", "-taught")
        for model in ("resnet18-68-lite", "resnet18-68")
        for refitted in ("", "-refitted")
    ]
    for name in names:
        measured = json.loads((out / name / "held_out.json").read_text())
        assert f"| {name} |" in first
        assert f"{measured[data.name]:.2%}" in first
    assert json.loads((out / names[1] / "manifest.json").read_text())["training"]["refit"]["faces"] > 0
    lite, full = (json.loads((out / name / "manifest.json").read_text()) for name in (names[0], names[2]))
    hashes = [bundle["files"]["checkpoint.safetensors"]["sha256"] for bundle in (lite, full)]
    assert full["training"]["start"]["checkpoint_sha256"] == hashes[0]  # began at the small model of its seed
    for name, begun_at in zip(names[4::2], hashes, strict=True):
        taught = json.loads((out / name / "manifest.json").read_text())
        assert taught["training"]["start"]["checkpoint_sha256"] == begun_at
        seen = {"sources": [{"sha256": read_source(data).sha256, "whole": False}], "held_out": {"val_fraction": 0.1}}
        assert taught["training"]["teachers"] == [{"name": "resnet18-68", "sha256": hashes[1], "runs": [seen]}]
        assert f"{taught['spec']['name']}-taught-7" == name
    made = [(out / name / "checkpoint.safetensors").stat().st_mtime_ns for name in names]
    train_reference.main()  # everything is finished: nothing is trained again
    assert capsys.readouterr().out.endswith(first[first.index("| run |") :])
    assert made == [(out / name / "checkpoint.safetensors").stat().st_mtime_ns for name in names]


def test_a_run_that_gains_nothing_by_a_refit_is_said_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the refit fails, the table would lack it without a word."""

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(train_reference, "refit", fails)
    error: KpError = NothingGainedError("no last layer is better")
    assert train_reference.finish_refit(train_reference.Run("resnet18-68-9"), [], tmp_path) is None
    assert "not refitted: no last layer is better" in capsys.readouterr().out
    error = KpError("can't write")
    with pytest.raises(KpError, match="can't write"):
        train_reference.finish_refit(train_reference.Run("resnet18-68-9"), [], tmp_path)


def test_a_finished_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    """The table would have its numbers under the new ones."""
    args = SimpleNamespace(precision="32-true")
    run = train_reference.Run("resnet18-68-7", {"epochs": 2})
    began = {"config": asdict(train_reference.config_of(run, "32-true")), "sources": []}
    (tmp_path / run.name).mkdir()
    for name in ("manifest.json", "held_out.json", "run.json"):
        (tmp_path / run.name / name).write_text(json.dumps(began))
    assert train_reference.finish(run, [], tmp_path, args) == began
    with pytest.raises(KpError, match=r"began with other settings \(epochs 2 -> 3\)"):
        train_reference.finish(replace(run, changes={"epochs": 3}), [], tmp_path, args)


def test_two_data_sets_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [write_csv_source(tmp_path / name, people=4) for name in "ab"]
    assert len({path.name for path in data}) == 1
    monkeypatch.setattr("sys.argv", ["x", *(f"--data={path}" for path in data), f"--out={tmp_path / 'out'}"])
    with pytest.raises(InputError, match="two data sets have one name"):
        train_reference.main()


def test_a_weight_behind_a_source_counts(tmp_path: Path) -> None:
    sources = [Source(tmp_path, weight, (), "") for weight in (2.0, 1.5)]
    assert [source.weight for source in train_reference.weighted(sources, 1.0)] == [2.0, 1.5]
    assert [source.weight for source in train_reference.weighted(sources, 0.5)] == [2.0, 0.75]


def test_the_table_tells_the_spread_over_seeds() -> None:
    results = [
        {"run": f"resnet18-68-{seed}", "changes": {"seed": seed}, "photos": 2, "init": None, "a.csv": nme}
        for seed, nme in ((1, 0.03), (2, 0.04), (3, 0.05))
    ]
    text = train_reference.table(results, ["a.csv"])
    assert "| resnet18-68-2 | seed 2, photos 2 | 4.00% |" in text
    assert "| resnet18-68, 3 seeds | mean ± standard deviation | 4.00% ± 1.00% |" in text


def test_the_large_models_of_all_seeds_teach() -> None:
    runs = train_reference.final(10, 4, [1, 2], {}, 1.5)
    made: set[str] = set()
    for run in runs:
        assert {*run.teachers, *([run.init] if run.init else [])} <= made  # what a run needs is there before it
        made.add(run.name)
    taught = {run.name: run for run in runs if run.teachers}
    assert set(taught) == {f"resnet18-68{kind}-taught-{seed}" for kind in ("", "-lite") for seed in (1, 2)}
    for run in taught.values():
        assert run.teachers == ("resnet18-68-1", "resnet18-68-2")
        assert (run.changes["epochs"], run.photos) == (4, 1.5)


def test_every_idea_is_a_valid_setting() -> None:
    runs = train_reference.ideas(3)
    assert len({run.name for run in runs}) == len(runs) > 10
    for run in runs:
        train_reference.recipe("default", **run.changes)


@pytest.mark.parametrize("changes", [{"nosuch": 1}, {"val_fraction": 0.2}, {"lr": "a"}])
def test_a_change_that_is_no_setting(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="the changes of resnet18-68-1 are no settings of kp train"):
        train_reference.config_of(train_reference.Run("resnet18-68-1", changes), "32-true")


def test_a_change_that_is_none() -> None:
    assert train_reference.change_from_text("beta=0.02") == ("beta", 0.02)
    with pytest.raises(InputError, match=r"--change takes NAME=JSON, .* got 'beta'"):
        train_reference.change_from_text("beta")
