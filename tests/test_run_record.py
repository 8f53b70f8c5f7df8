"""The record of a run: its source's revision, its data, and the records of what it began at."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest

from kp_runtime.errors import DataError, KpError
from kp_runtime.files import git_revision
from kp_runtime.manifest import Manifest
from kp_runtime.spec import ModelSpec
from kp_train.checkpoint import load_checkpoint, save_checkpoint
from kp_train.config import DetectorConfig, TrainConfig, recipe
from kp_train.data import read_source
from kp_train.model import KeypointNet
from kp_train.run_record import ancestry, run_record, split_by_person, stored_record
from kp_train.synthetic import write_csv_source
from kp_train.train_detector import begun_config


def test_the_revision_of_somebody_elses_checkout_is_not_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "venv" / "kp_runtime").mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    for words in (["init"], ["commit", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    monkeypatch.setattr("kp_runtime.files.__file__", str(tmp_path / "venv" / "kp_runtime" / "files.py"))
    assert git_revision() is None
    monkeypatch.setattr("kp_runtime.files.__file__", str(tmp_path / "venv" / "files.py"))
    assert git_revision(), "beside .git it is a checkout"


def test_other_names_can_not_resume_a_run(tmp_path: Path) -> None:
    """They say who is held out; in `.pts` files and in the hash of them there are none."""
    source, config = read_source(write_csv_source(tmp_path, people=40)), recipe("default")
    (tmp_path / "run.json").write_text(json.dumps(run_record([source], *split_by_person([source], config), config, {})))
    assert stored_record(tmp_path, [source], config)["held_out"]["faces"] > 0
    renamed = [dataclasses.replace(f, image=f.image.with_name("x" + f.image.name)) for f in source.faces]
    with pytest.raises(KpError, match="began with other data"):
        stored_record(tmp_path, [dataclasses.replace(source, faces=tuple(renamed))], config)


def test_a_source_that_is_held_out_whole_is_said(tmp_path: Path) -> None:
    """All photos of one 'person', whose name's hash lies under a tenth."""
    many, config = read_source(write_csv_source(tmp_path, people=40)), recipe("default")
    faces = tuple(dataclasses.replace(f, image=Path(f"face_{i}.png")) for i, f in enumerate(many.faces[:5]))
    mine = dataclasses.replace(many, path=Path("mine.csv"), faces=faces)
    message = (
        r"^mine\.csv gives no face to train on: its 5 faces of 1 person \(face\) are held out; .* as anna_001\.jpg"
    )
    with pytest.raises(DataError, match=message):
        split_by_person([many, mine], config)


def test_whom_a_run_holds_out_it_learns_from_no_other_source(tmp_path: Path) -> None:
    """As of rows of the same people, one CSV learned whole, or of one CSV by two paths."""
    source, config = read_source(write_csv_source(tmp_path, people=40)), recipe("default")
    whole = dataclasses.replace(source, path=Path("mine.csv"), whole=True)
    with pytest.raises(
        DataError, match=r"^\d people who are held out are in mine\.csv too, .* as person\d+; give --whole"
    ):
        split_by_person([source, whole], config)
    with pytest.raises(DataError, match="every source is learned whole and nobody is left to validate on"):
        split_by_person([whole, whole], config)


def test_a_run_that_goes_on_by_other_versions_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = read_source(write_csv_source(tmp_path, people=40)), recipe("default")
    record = run_record([source], *split_by_person([source], config), config, {})
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert stored_record(tmp_path, [source], config) == record
    monkeypatch.setattr("lightning.__version__", "99")
    assert stored_record(tmp_path, [source], config) == record | {
        "resumed_by": {"git_revision": record["git_revision"], "versions": record["versions"] | {"lightning": "99"}}
    }


def test_a_run_with_settings_of_a_newer_release_does_not_go_on_without_them(tmp_path: Path) -> None:
    for config, go_on in [
        (TrainConfig(), lambda: stored_record(tmp_path, [], TrainConfig())),
        (DetectorConfig(), lambda: begun_config(tmp_path)),
    ]:
        settings = dataclasses.asdict(config) | {"turn": 30}
        (tmp_path / "run.json").write_text(json.dumps({"config": settings, "sources": []}))
        with pytest.raises(KpError, match=r"was begun by a newer kp \(its setting 'turn'\); go on with that one"):
            go_on()


def test_a_record_that_can_not_be_read_is_told(tmp_path: Path) -> None:
    for text in ("[" * 100_000, '{"config": 5, "sources": []}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(KpError, match=r"run\.json can't be read \(.*\); begin a new run with another --out"):
            stored_record(tmp_path, [], TrainConfig())
        with pytest.raises(KpError, match=r"run\.json can't be read \(.*\); begin a new run with another --out"):
            begun_config(tmp_path)


def test_a_source_s_name_that_is_no_text_can_be_read_again(tmp_path: Path) -> None:
    source = read_source(write_csv_source(tmp_path, people=20))
    named = dataclasses.replace(source, path=tmp_path / os.fsdecode(b"caf\xe9"))
    config = TrainConfig()
    record = run_record([named], *split_by_person([named], config), config, {})
    save_checkpoint(tmp_path / "r", KeypointNet(64), Manifest(ModelSpec("x", 64), training=record))
    assert load_checkpoint(tmp_path / "r")[1].training["sources"][0]["name"] == r"caf\udce9"


def test_records_that_an_older_release_nested_are_read() -> None:
    nested = {"a": 1, "start": {"x": 1, "training": {"a": 2, "start": {"x": 2, "training": {"a": 3}}}}}
    assert ancestry(nested) == [{"a": 1, "start": {"x": 1}}, {"a": 2, "start": {"x": 2}}, {"a": 3}]
