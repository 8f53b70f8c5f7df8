"""A plan in a bundle, built by the double of TensorRT: its entry, its place, and failures."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from kp_export import plan_from_onnx
from kp_export.plan_bundle import add_plan
from kp_export.plan_options import PlanOptions
from kp_runtime.errors import BackendError, ExportError, IntegrityError, SchemaError
from kp_runtime.spec import Manifest, file_entry
from tests.tensorrt_double import ORIN, PLAN, tensorrt_double


@pytest.fixture
def copied(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    shutil.copy(folder / "model.fp32.onnx", folder / "model.fp16.onnx")
    manifest = Manifest.read(folder)
    manifest.files["model.fp16.onnx"] = file_entry(folder / "model.fp16.onnx", "onnx", precision="fp16")
    manifest.write(folder)
    return folder


@pytest.mark.parametrize("version", ["10.3.0", "11.4.0"])
def test_a_plan_gets_its_entry(copied: Path, version: str) -> None:
    report = add_plan(copied, "fp16", trt=tensorrt_double(version), device=ORIN)
    manifest = Manifest.read(copied)
    entry = manifest.files[report.file]
    assert manifest.check_file(copied, report.file).read_bytes() == PLAN
    assert (entry.kind, entry.precision) == ("plan", "fp16")
    assert entry.parent_sha256 == manifest.files["model.fp16.onnx"].sha256
    assert entry.made["rebuild"] == "kp plan BUNDLE --precision fp16"
    assert entry.made["tensorrt"].startswith(version)
    assert entry.made["gpu"] == "Orin"
    assert "receipt" in entry.made
    for name in manifest.files:
        manifest.check_file(copied, name)


def test_a_failed_build_leaves_the_bundle_and_its_log(copied: Path) -> None:
    trt = tensorrt_double("10.3.0")
    first = add_plan(copied, "fp16", trt=trt, device=ORIN)
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    broken = tensorrt_double("10.3.0", built=None)
    with pytest.raises(ExportError, match=r"no plan was built .* the log is .*\.log"):
        add_plan(copied, "fp16", trt=broken, device=ORIN)
    after = {p.name: p.read_bytes() for p in copied.iterdir()}
    assert after.pop(f"{first.file}.log")
    assert after == before


def test_a_model_that_is_changed_during_the_build(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    read = plan_from_onnx._read
    monkeypatch.setattr(plan_from_onnx, "_read", lambda path: read(path) + b"\x72\x00")  # an empty field at the end
    with pytest.raises(IntegrityError, match=r"model\.fp16\.onnx was changed while the plan was built"):
        add_plan(copied, "fp16", trt=tensorrt_double("11.4.0"), device=ORIN)
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before


def test_a_model_that_is_not_the_manifests_is_named(copied: Path) -> None:
    (copied / "model.fp16.onnx").write_bytes(b"other")
    with pytest.raises(IntegrityError, match=re.escape(f"{copied / 'model.fp16.onnx'} has 5 bytes")):
        add_plan(copied, "fp16", trt=tensorrt_double("11.4.0"), device=ORIN)


def test_plans_of_other_kinds_lie_beside_each_other(copied: Path) -> None:
    trt = tensorrt_double("10.3.0")
    made = [
        add_plan(copied, "fp16", options, trt=trt, device=ORIN).file
        for options in (None, PlanOptions(max_batch=8), PlanOptions(version_compatible=True, hardware_compatible=True))
    ]
    name = made[0].removesuffix(".plan")
    assert made == [f"{name}.plan", f"{name}.plan", f"{name}.newer.ampere.plan"]
    assert [file for file, entry in Manifest.read(copied).files.items() if entry.kind == "plan"] == made[1:]


def test_what_is_missing_is_named(copied: Path) -> None:
    copied, trt = copied.rename(copied.with_name("a bundle")), tensorrt_double("11.4.0")
    with pytest.raises(BackendError, match=r"pack it along: kp pack SOURCE --precision int8-trt --out '.*a bundle'$"):
        add_plan(copied, "int8", trt=trt, device=ORIN)
    manifest = Manifest.read(copied)
    (copied / "checkpoint.safetensors").write_bytes(b"weights")
    manifest.files["checkpoint.safetensors"] = file_entry(copied / "checkpoint.safetensors", "checkpoint")
    manifest.write(copied)
    with pytest.raises(
        BackendError, match=r"has no model\.int8-trt\.onnx to build the plan from; make it with: kp export '.*' --int8"
    ):
        add_plan(copied, "int8", trt=trt, device=ORIN)
    with pytest.raises(ExportError, match="must be one of fp32, fp16, int8, got 'bf16'"):
        add_plan(copied, "bf16", trt=trt, device=ORIN)
    text = (copied / "manifest.json").read_text()
    (copied / "manifest.json").write_text(text.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(SchemaError):
        add_plan(copied, "fp16", trt=trt, device=ORIN)
