"""A plan in a bundle, built by the double of TensorRT: its entry, its place, and failures."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import kp_runtime
from kp_export import plan_from_onnx
from kp_export.plan_bundle import add_plan
from kp_export.plan_options import PlanOptions, rebuild_command
from kp_runtime.backend_by_name import open_backend
from kp_runtime.errors import BackendError, ExportError, IntegrityError, SchemaError
from kp_runtime.manifest import Manifest, file_entry
from kp_train.synthetic import write_csv_source
from tests.cuda_driver_double import DriverDouble
from tests.models import tiny_keypoints
from tests.tensorrt_double import PLAN, TENSORS, tensorrt_double
from tests.test_cli import kp


@pytest.fixture
def copied(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    shutil.copy(folder / "model.fp32.onnx", folder / "model.fp16.onnx")
    manifest = Manifest.read(folder)
    manifest.files["model.fp16.onnx"] = file_entry(folder / "model.fp16.onnx", "onnx", precision="fp16")
    manifest.write(folder)
    return folder


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs doubles of the CUDA driver and of a TensorRT."""
    driver = DriverDouble(None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setattr("kp_runtime.backend_by_name.has_driver", lambda: True)

    def put(version: str = "10.3.0", **answers: Any) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_double(version, device=driver, **answers))

    return put


@pytest.mark.parametrize("version", ["10.3.0", "11.4.0"])
def test_a_plan_gets_its_entry(copied: Path, version: str, install: Any) -> None:
    install(version)
    report = add_plan(copied, "fp16")
    manifest = Manifest.read(copied)
    entry = manifest.files[report.file]
    assert manifest.check_file(copied, report.file).read_bytes() == PLAN
    assert (entry.kind, entry.precision) == ("plan", "fp16")
    assert entry.parent_sha256 == manifest.files["model.fp16.onnx"].sha256
    assert entry.made["kp"] == kp_runtime.__version__
    assert entry.made["rebuild"] == "kp plan BUNDLE --precision fp16"
    assert entry.made["tensorrt"].startswith(version)
    assert (entry.made["gpu"], entry.made["multiprocessors"]) == ("Orin", 16)
    assert "receipt" in entry.made
    assert entry.made["golden_error_px"] == report.golden_error_px < 0.001
    for name in manifest.files:
        manifest.check_file(copied, name)


def test_a_failed_build_leaves_the_bundle_and_its_log(copied: Path, install: Any) -> None:
    install()
    first = add_plan(copied, "fp16")
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    install(built=None)
    with pytest.raises(ExportError, match=r"no plan was built .* the log is .*\.log"):
        add_plan(copied, "fp16")
    after = {p.name: p.read_bytes() for p in copied.iterdir()}
    assert after.pop(f"{first.file}.log")
    assert after == before


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"contexts": 1}, "TensorRT has no memory for another execution context"),
        (
            {"tensors": {"crops": TENSORS["crops"]}},
            "is refused: the plan does not have the contract's input and output",
        ),
        ({}, "tensorrt puts a golden keypoint 0.8"),
    ],
)
def test_a_plan_that_does_not_run_is_not_kept(
    fault: Any, told: str, copied: Path, install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    install(**fault)
    monkeypatch.setattr("tests.tensorrt_double.tiny_outputs", lambda crops: (tiny_keypoints(crops) + 0.6,))
    with pytest.raises(
        ExportError, match=r"^model\.fp16\.sm87\.trt10\.3\.0\.plan is not kept, as it does not run"
    ) as raised:
        add_plan(copied, "fp16")
    assert told in str(raised.value)
    assert not any(text in str(raised.value) for text in ("\n", ".bundle.new", "build one here"))
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before


def test_what_was_measured_is_told(copied: Path, install: Any, capsys: pytest.CaptureFixture[str]) -> None:
    install()
    status, out, _ = kp(capsys, "plan", copied)
    assert (status, out.splitlines()[-1]) == (0, "opened: golden keypoints 0.000 px from PyTorch's")
    told = "model.fp16.sm87.trt10.3.0.plan: golden keypoints 0.000 px from PyTorch's where it was built (Orin)\n"
    assert told in kp(capsys, "inspect", copied)[1]


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(min_batch=2, opt_batch=3, max_batch=4, workspace_mib=5, version_compatible=True),
        PlanOptions(min_batch=6, opt_batch=6, max_batch=6, hardware_compatible=True, dla_core=1),
    ],
    ids=["a GPU", "a DLA"],
)
def test_the_command_that_an_entry_names_builds_for_the_same(
    options: PlanOptions, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noted(*asked: Any, progress: Any) -> None:
        assert asked == (bundle, "fp32", options)
        raise ExportError("asked")

    monkeypatch.setattr("kp_export.plan_bundle.add_plan", noted)
    words = [bundle if word == "BUNDLE" else word for word in rebuild_command(options, "fp32").split()]
    assert kp(capsys, *words[1:]) == (1, "", "kp: asked\n")


def test_a_plan_is_measured_on_labelled_faces_without_a_checkpoint(
    copied: Path, install: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install()
    plan, data = copied / add_plan(copied, "fp16").file, write_csv_source(tmp_path, people=2)
    got, wanted = (
        json.loads(kp(capsys, "eval", file, "--data", data, "--json")[1]) for file in (plan, copied / "model.fp32.onnx")
    )
    assert got["model"] == f"tiny {plan.name} (tensorrt)"
    assert got["nme"] == pytest.approx(wanted["nme"], rel=1e-5)


def test_a_model_that_is_changed_during_the_build(copied: Path, install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install("11.4.0")
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    read = plan_from_onnx._read
    monkeypatch.setattr(plan_from_onnx, "_read", lambda path: read(path) + b"\x72\x00")  # an empty field at the end
    with pytest.raises(IntegrityError, match=r"model\.fp16\.onnx was changed while the plan was built"):
        add_plan(copied, "fp16")
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before


def test_a_model_that_is_not_the_manifests_is_named(copied: Path, install: Any) -> None:
    install("11.4.0")
    (copied / "model.fp16.onnx").write_bytes(b"other")
    with pytest.raises(IntegrityError, match=re.escape(f"{copied / 'model.fp16.onnx'} has 5 bytes")):
        add_plan(copied, "fp16")


def test_plans_of_other_kinds_lie_beside_each_other(copied: Path, install: Any) -> None:
    install()
    made = [
        add_plan(copied, "fp16", options).file
        for options in (None, PlanOptions(max_batch=8), PlanOptions(version_compatible=True, hardware_compatible=True))
    ]
    name = made[0].removesuffix(".plan")
    assert made == [f"{name}.plan", f"{name}.plan", f"{name}.newer.ampere.plan"]
    assert [file for file, entry in Manifest.read(copied).files.items() if entry.kind == "plan"] == made[1:]


def test_what_was_measured_of_a_plan_goes_with_it(copied: Path, install: Any) -> None:
    install()
    plan = add_plan(copied, "fp16").file
    there = Manifest.read(copied)
    of = {name: {"nme": 0.03, "sha256": there.files[name].sha256} for name in (plan, "model.fp32.onnx")}
    dataclasses.replace(there, accuracy={"weights": {"nme": 0.03}, **of}).write(copied)
    add_plan(copied, "fp16")  # the same bytes
    assert set(Manifest.read(copied).accuracy) == {"weights", "model.fp32.onnx", plan}
    install(built=PLAN + b"other")
    add_plan(copied, "fp16")
    assert set(Manifest.read(copied).accuracy) == {"weights", "model.fp32.onnx"}


def test_a_plan_of_another_tensorrt_stays_and_is_told_of(
    copied: Path, install: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Boards of two JetPacks share a bundle, or a container and the system beside it."""
    install("10.3.0")
    add_plan(copied, "fp16", PlanOptions(version_compatible=True))
    assert kp(capsys, "plan", copied)[2] == kp(capsys, "plan", copied)[2] == ""
    install("11.4.0")
    status, _, noted = kp(capsys, "plan", copied)
    assert (status, noted.count("\n")) == (0, 1)
    assert noted.startswith("model.fp16.sm87.trt10.3.0.plan stays for boards of that TensorRT")
    assert open_backend(copied, "tensorrt").report.file == "model.fp16.sm87.trt11.4.0.106.plan"
    install("10.3.0")
    assert open_backend(copied, "tensorrt").report.file == "model.fp16.sm87.trt10.3.0.plan"


def test_what_is_missing_is_named(copied: Path) -> None:
    copied = copied.rename(copied.with_name("a bundle"))
    with pytest.raises(BackendError, match=r"pack it along: kp pack SOURCE --precision int8-trt --out '.*a bundle'$"):
        add_plan(copied, "int8")
    manifest = Manifest.read(copied)
    (copied / "checkpoint.safetensors").write_bytes(b"weights")
    manifest.files["checkpoint.safetensors"] = file_entry(copied / "checkpoint.safetensors", "checkpoint")
    manifest.write(copied)
    with pytest.raises(
        BackendError, match=r"has no model\.int8-trt\.onnx to build the plan from; make it with: kp export '.*' --int8"
    ):
        add_plan(copied, "int8")
    with pytest.raises(ExportError, match="must be one of fp32, fp16, int8, got 'bf16'"):
        add_plan(copied, "bf16")
    text = (copied / "manifest.json").read_text()
    (copied / "manifest.json").write_text(text.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(SchemaError):
        add_plan(copied, "fp16")
