"""By how much a file is less accurate, as the bundle's reports and manifests record it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from kp_runtime.manifest import Manifest, file_entry
from kp_runtime.recorded_rise import recorded_rise
from tests.test_tune import make_bundle


def test_recorded_rises(tmp_path: Path) -> None:
    first = make_bundle(tmp_path / "a", {"fp32": 9.0, "fp16": None, "int8": 0.05, "int8-trt": "no"}, nme=0.04)
    known = {p: recorded_rise(first, first, f"model.{p}.onnx") for p in ("fp32", "fp16", "int8", "int8-trt")}
    assert {p: rise.points for p, rise in known.items()} == {"fp32": 0.0, "fp16": 0.21, "int8": 0.05, "int8-trt": None}
    assert known["int8"].how == "recorded on 512 labelled faces"
    assert known["fp16"].how.startswith("about at most: the recorded distance")
    assert "parity.json records nothing" in known["int8-trt"].how


def test_a_plan_has_the_record_of_what_it_was_built_from(tmp_path: Path) -> None:
    """`load` takes a plan first; with a rise that is not known it would never be chosen."""
    first = make_bundle(tmp_path / "a", {"fp32": 9.0, "int8": 0.05}, nme=0.04)
    manifest = Manifest.read(first)
    (first / "a.plan").write_bytes(b"plan")
    int8 = dataclasses.replace(manifest.files["model.int8.onnx"], sha256="8" * 64)  # fp32's bytes, in this bundle
    files = manifest.files | {"model.int8.onnx": int8}
    for parent, points in (("model.int8.onnx", 0.05), ("model.fp32.onnx", 0.0), ("parity.json", None)):
        plan = file_entry(first / "a.plan", "plan", precision="int8", parent_sha256=files[parent].sha256)
        dataclasses.replace(manifest, files=files | {"a.plan": plan}).write(first)
        rise = recorded_rise(first, first, "a.plan")
        assert rise.points == points
        assert rise.how.startswith(f"of {parent}, from" if points is not None else "the ONNX file that it was built")


def test_recorded_rises_between_bundles(tmp_path: Path) -> None:
    first = make_bundle(tmp_path / "a", {"fp32": 0.0}, nme=0.04)
    other = make_bundle(tmp_path / "b", {"int8": 0.05}, nme=0.041)
    rise = recorded_rise(first, other, "model.int8.onnx")
    assert rise.points == pytest.approx(0.15)
    assert rise.how == "the manifests' worst of 1 data sets; recorded on 512 labelled faces"
    for fault in ({"nme": None}, {"faces": 99}):
        stranger = make_bundle(tmp_path / str(fault), {"int8": 0.05}, **({"nme": 0.041} | fault))
        assert recorded_rise(first, stranger, "model.int8.onnx").points is None
    manifest = Manifest.read(other)
    (name,) = manifest.accuracy
    for before, after in (
        ({"boxes": "keypoints"}, {"boxes": "detector"}), ({"mirror": False}, {"mirror": True}),
        ({}, {"precision": "int8"}), ({}, {"nme_unit": "longer side"}),
        ({"looks": 1}, {"looks": 2}), ({"missed": 0}, {"missed": 9}), ({"detector": "own"}, {"detector": "haar"}),
        ({"detector": "own", "detector_sha256": "a"}, {"detector": "own", "detector_sha256": "b"}),
        ({"split": "rows"}, {"split": "person"}), ({"sources": [{"sha256": "a"}]}, {"sources": [{"sha256": "b"}]}),
    ):  # fmt: skip
        pair = []
        for folder, record in ((tmp_path / "one", before), (tmp_path / "another", after)):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(first if folder.name == "one" else other, folder)
            kept = Manifest.read(folder)
            dataclasses.replace(kept, accuracy={name: kept.accuracy[name] | record}).write(folder)
            pair.append(folder)
        assert recorded_rise(*pair, "model.int8.onnx").points is None, (before, after)
    two = {"x": {"nme": 0.05, "faces": 10}, "y": {"nme": "bad", "faces": 10}, "z": 5}
    dataclasses.replace(manifest, accuracy=manifest.accuracy | two).write(other)
    original = Manifest.read(first)
    better = {"x": {"nme": 0.06, "faces": 10}, "y": {"nme": 0.06, "faces": 10}, "z": {"nme": 0.06, "faces": 10}}
    for accuracy in (original.accuracy | better, better | original.accuracy):  # whichever stands first
        dataclasses.replace(original, accuracy=accuracy).write(first)
        assert recorded_rise(first, other, "model.int8.onnx").points == pytest.approx(0.15), "the worst of two"
    shutil.copytree(other, tmp_path / "copy")
    assert recorded_rise(other, tmp_path / "copy", "model.int8.onnx").points == pytest.approx(0.05), "the same weights"


NO_NUMBERS = ('"low"', "NaN", "-Infinity", f"1{'0' * 400}")


@pytest.mark.parametrize(
    "text", ["{", "{}", "[5]", *(f'[{{"file": "model.int8.onnx", "rise": {rise}}}]' for rise in NO_NUMBERS)]
)
def test_a_damaged_parity_report_says_nothing(text: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "a", {"int8": 0.0})
    (bundle / "parity.json").write_text(text)
    manifest = Manifest.read(bundle)
    report = {"parity.json": file_entry(bundle / "parity.json", "report")}
    dataclasses.replace(manifest, files=manifest.files | report).write(bundle)
    assert recorded_rise(bundle, bundle, "model.int8.onnx").points is None
