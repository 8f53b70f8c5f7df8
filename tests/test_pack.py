from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from kp_export.pack import pack_bundle
from kp_runtime import load
from kp_runtime.errors import BundleError, ExportError, IntegrityError
from kp_runtime.manifest import Manifest, file_entry
from tests.test_cli import kp


@pytest.fixture
def full(bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle with a second precision, a checkpoint, a report and a file of nobody's."""
    folder = shutil.copytree(bundle, tmp_path / "full")
    shutil.copyfile(folder / "model.fp32.onnx", folder / "model.int8.onnx")
    (folder / "checkpoint.safetensors").write_bytes(b"weights")
    rows = [{"file": name, "p99_px": 0.1} for name in ("model.fp32.onnx", "model.int8.onnx")]
    (folder / "parity.json").write_text(json.dumps(rows))
    manifest = Manifest.read(folder)
    more = {
        "model.int8.onnx": file_entry(folder / "model.int8.onnx", "onnx", precision="int8"),
        "checkpoint.safetensors": file_entry(folder / "checkpoint.safetensors", "checkpoint", precision="int8"),
        "parity.json": file_entry(folder / "parity.json", "report"),
    }
    accuracy = {
        "whole": {"nme": 0.03},
        "fp32": {"nme": 0.03, "sha256": manifest.files["model.fp32.onnx"].sha256},
        "checkpoint": {"nme": 0.03, "sha256": more["checkpoint.safetensors"].sha256},
    }
    dataclasses.replace(manifest, files=manifest.files | more, accuracy=accuracy).write(folder)
    (folder / "MODEL_CARD.md").write_text("card")
    return folder


def test_only_what_was_asked_for_is_packed_and_runs(full: Path, tmp_path: Path) -> None:
    out = tmp_path / "slim"
    manifest = pack_bundle(full, out, ["int8"])
    assert {p.name for p in out.iterdir()} == {*manifest.files, "manifest.json"}
    assert {"model.int8.onnx", "parity.json"} <= set(manifest.files)
    assert not {"model.fp32.onnx", "checkpoint.safetensors"} & set(manifest.files)
    assert [row["file"] for row in json.loads((out / "parity.json").read_text())] == ["model.int8.onnx"]
    for name in manifest.files:
        Manifest.read(out).check_file(out, name)
    assert load(out, threads=1).backend.report.precision == "int8"
    assert Manifest.read(out).spec == Manifest.read(full).spec


def test_what_was_measured_of_files_goes_with_them(full: Path, tmp_path: Path) -> None:
    """Both ONNX files have the same bytes."""
    assert set(pack_bundle(full, tmp_path / "a", ["int8"]).accuracy) == {"whole", "fp32"}
    assert set(pack_bundle(full, tmp_path / "b", ["int8"], checkpoint=True).accuracy) == {"whole", "fp32", "checkpoint"}


def test_a_bundle_can_be_packed_in_place(full: Path) -> None:
    pack_bundle(full, full, ["int8"], checkpoint=True)
    assert {p.name for p in full.iterdir()} >= {"model.int8.onnx", "checkpoint.safetensors", "MODEL_CARD.md"}
    assert not (full / "model.fp32.onnx").exists()


def with_other_weights(bundle: Path, folder: Path, **spec: str) -> Path:
    """A copy with another checkpoint, from which its ONNX files seem to come."""
    shutil.copytree(bundle, folder)
    (folder / "checkpoint.safetensors").write_bytes(b"other weights")
    manifest, weights = Manifest.read(folder), file_entry(folder / "checkpoint.safetensors", "checkpoint")
    files = {
        name: weights if entry.kind == "checkpoint" else dataclasses.replace(entry, parent_sha256=weights.sha256)
        for name, entry in manifest.files.items()
    }
    dataclasses.replace(manifest, files=files, spec=dataclasses.replace(manifest.spec, **spec)).write(folder)
    return folder


@pytest.mark.parametrize("only_copy", ["of a run", "never exported", "of another model", "without a manifest"])
def test_a_checkpoint_that_may_be_the_only_copy_stays(full: Path, tmp_path: Path, only_copy: str) -> None:
    other = with_other_weights(full, tmp_path / "b", **{"name": "b"} if only_copy == "of another model" else {})
    if only_copy == "of a run":
        (other / "run.json").write_text("{}")
    elif only_copy == "never exported":
        manifest = Manifest.read(other)
        manifest.with_files({"checkpoint.safetensors": manifest.files["checkpoint.safetensors"]}).write(other)
    elif only_copy == "without a manifest":
        (other / "manifest.json").unlink()
    for kept in (False, True):
        with pytest.raises(ExportError, match=r"b holds another checkpoint, which may be the only copy; name"):
            pack_bundle(full, other, ["int8"], checkpoint=kept)
    assert (other / "checkpoint.safetensors").read_bytes() == b"other weights"


def test_what_was_made_of_an_older_checkpoint_is_replaced(full: Path, tmp_path: Path) -> None:
    other = with_other_weights(full, tmp_path / "b")
    (full / "run.json").write_text("{}")  # the source is a run: its own files
    pack_bundle(full, other, ["int8"], checkpoint=True)
    assert (other / "checkpoint.safetensors").read_bytes() == b"weights"
    pack_bundle(full, full, ["int8"], checkpoint=True)
    assert (full / "checkpoint.safetensors").exists()


def test_a_checkpoint_that_is_left_out_in_place_is_told(capsys: pytest.CaptureFixture[str], full: Path) -> None:
    words = ("pack", full, "--precision", "int8", "--out", full)
    assert kp(capsys, *words, "--checkpoint")[::2] == (0, "")
    assert kp(capsys, *words)[::2] == (0, f"{full} has no longer its checkpoint; --checkpoint keeps it\n")
    assert kp(capsys, *words)[::2] == (0, "")


@pytest.mark.parametrize("report", ['{"of": "another kind"}', '[{"name": "x"}]', "# By hand", "[" * 100_000])
def test_a_report_of_another_kind_is_packed_as_it_is(full: Path, tmp_path: Path, report: str) -> None:
    (full / "parity.json").write_text(report)
    manifest = Manifest.read(full)
    files = manifest.files | {"parity.json": file_entry(full / "parity.json", "report")}
    dataclasses.replace(manifest, files=files).write(full)
    assert pack_bundle(full, tmp_path / "slim", ["int8"]).files["parity.json"] == files["parity.json"]
    assert (tmp_path / "slim" / "parity.json").read_text() == report


def test_an_older_pack_is_replaced(full: Path, tmp_path: Path) -> None:
    out = tmp_path / "slim"
    pack_bundle(full, out, ["fp32"])
    pack_bundle(full, out, ["int8"])
    assert not (out / "model.fp32.onnx").exists()
    assert load(out, threads=1).backend.report.precision == "int8"


def test_what_an_older_pack_had_more_is_gone(full: Path, tmp_path: Path) -> None:
    out = tmp_path / "slim"
    old = pack_bundle(full, out, ["fp32"])
    (out / "old.plan").write_bytes(b"a plan")
    dataclasses.replace(old, files=old.files | {"old.plan": file_entry(out / "old.plan", "plan")}).write(out)
    assert set(pack_bundle(full, out, ["int8"]).files) | {"manifest.json"} == {path.name for path in out.iterdir()}


def test_a_bundle_whose_export_was_killed_between_its_last_moves_is_packed(full: Path, tmp_path: Path) -> None:
    full.rename(full.with_name(".full.old"))
    assert "model.int8.onnx" in pack_bundle(full, tmp_path / "slim", ["int8"]).files


def test_a_damaged_bundle_that_would_be_replaced_is_named(full: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/manifest.json").write_text("{}")
    with pytest.raises(BundleError, match=re.escape(f"{tmp_path / 'old/manifest.json'} has no schema number")):
        pack_bundle(full, tmp_path / "old", ["int8"])


def test_what_is_not_there_is_refused_and_nothing_written(full: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no model of precision fp16, only fp32, int8"):
        pack_bundle(full, tmp_path / "slim", ["int8", "fp16"])
    assert not (tmp_path / "slim").exists()


def test_a_checkpoint_that_is_not_there_can_not_be_kept(full: Path, tmp_path: Path) -> None:
    pack_bundle(full, tmp_path / "slim", ["fp32"])
    with pytest.raises(BundleError, match="slim has no checkpoint to keep"):
        pack_bundle(tmp_path / "slim", tmp_path / "slimmer", ["fp32"], checkpoint=True)
    assert not (tmp_path / "slimmer").exists()


def test_a_changed_file_is_not_packed(full: Path, tmp_path: Path) -> None:
    path = full / "model.int8.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="the file was changed"):
        pack_bundle(full, tmp_path / "slim", ["int8"])
    assert not (tmp_path / "slim").exists()


@pytest.mark.parametrize("more", [(), ("--checkpoint",)], ids=str)
def test_the_command_says_what_it_packed(
    more: tuple[str, ...], capsys: pytest.CaptureFixture[str], full: Path, tmp_path: Path
) -> None:
    status, out, _ = kp(capsys, "pack", full, "--precision", "int8", "--out", tmp_path / "slim", "--json", *more)
    assert status == 0
    said = json.loads(out)
    assert ("checkpoint.safetensors" in said["files"]) == bool(more)
    assert set(said["files"]) == set(Manifest.read(tmp_path / "slim").files)
    assert said["bytes"] == sum((tmp_path / "slim" / name).stat().st_size for name in said["files"])


def test_plans_of_a_precision_are_packed_with_it(full: Path, tmp_path: Path) -> None:
    manifest, plan = Manifest.read(full), "model.int8.sm87.trt10.3.0.plan"
    (full / plan).write_bytes(b"a plan")
    entry = file_entry(full / plan, "plan", precision="int8")
    dataclasses.replace(manifest, files=manifest.files | {plan: entry}).write(full)
    assert plan in pack_bundle(full, tmp_path / "int8", ["int8"]).files
    assert (tmp_path / "int8" / plan).read_bytes() == b"a plan"
    assert plan not in pack_bundle(full, tmp_path / "fp32", ["fp32"]).files
