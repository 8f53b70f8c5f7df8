"""kp eval as a person types it: what it measures, prints and records, and that it needs no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kp_export.staging import alone
from kp_runtime.detect import HaarDetector
from kp_runtime.manifest import Manifest
from tests.test_cli import kp


def test_eval_prints_json(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    from kp_train.synthetic import write_csv_source

    data = write_csv_source(tmp_path, people=4)
    words = ("eval", bundle / "model.fp32.onnx", "--data", data)
    status, out, _ = kp(capsys, *words, "--json", "--out", tmp_path / "p")
    assert status == 0
    measured = json.loads(out)
    assert measured["faces"] == 8
    assert measured["boxes"] == "keypoints"
    assert 0 < measured["nme"] < 1
    assert all(Path(p).is_file() for p in measured["pictures"])
    status, out, _ = kp(capsys, *words)
    assert "SmoothL1 as the original" in out
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    words = ("eval", copy / "model.fp32.onnx", "--data", data, "--record", "mine")
    with alone(copy):
        status, out, err = kp(capsys, *words)
    assert (status, err.count("\n")) == (1, 1)
    assert "SmoothL1 as the original" in out
    assert "mine" not in Manifest.read(copy).accuracy
    record = {"sources": [{"sha256": hashlib.sha256(data.read_bytes()).hexdigest()}]}
    dataclasses.replace(Manifest.read(copy), training=record).write(copy)
    status, _, err = kp(capsys, *words)
    assert (status, err) == (0, "8 of these 8 faces were trained on\n"), "no others that --split person could measure"
    kept = Manifest.read(copy).accuracy["mine"]
    assert (kept["split"], kept["sources"]) == ("rows", [{"name": data.name, **record["sources"][0]}])
    status, _, err = kp(capsys, *words, "--split", "person")
    assert "does not say which people" in err


def test_data_sets_that_are_measured_together_are_told_apart(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    from kp_train.synthetic import write_csv_source

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    data = [write_csv_source(tmp_path / name, people=people) for name, people in (("a", 1), ("b", 2))]
    words = ("eval", bundle / "model.fp32.onnx", "--data", data[0], "--data", data[1])
    measured = json.loads(kp(capsys, *words, "--json")[1])
    told = measured["folders"]
    assert [(one["folder"][0], one["faces"]) for one in told] == [("a", 2), ("b", 4)]
    assert sum(one["nme"] * one["faces"] for one in told) / 6 == pytest.approx(measured["nme"])
    assert f"4  {told[1]['nme']:.2%}" in kp(capsys, *words)[1]
    assert json.loads(kp(capsys, *words[:4], "--json")[1])["folders"] == []


def test_eval_measures_as_is_asked(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kp_export import evaluate, robustness
    from kp_train.synthetic import write_csv_source

    asked = []

    def noted(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            asked.append(inspect.signature(real).bind(*args, **options).arguments)
            return real(*args, **options)

        return call

    monkeypatch.setattr(evaluate, "evaluate", noted(evaluate.evaluate))
    monkeypatch.setattr(robustness, "robustness", noted(robustness.robustness))
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    dataclasses.replace(Manifest.read(copy), training={"held_out": {"val_fraction": 0.5}}).write(copy)
    data = write_csv_source(tmp_path, people=4)
    words = ("eval", copy / "model.fp32.onnx", "--data", data, "--looks", 2, "--mirror", "--json")
    assert kp(capsys, *words, "--boxes", "detector", "--detector", "haar")[0] == 0
    assert isinstance(asked[0]["detector"], HaarDetector)
    assert "robustness" in json.loads(kp(capsys, *words, "--robustness", "--split", "person")[1])
    # three of the four people were held out
    assert [(call.get("looks"), call.get("mirror"), len(call["faces"])) for call in asked] == [
        (2, True, 8), (2, True, 6), (2, True, 6)
    ]  # fmt: skip


NO_TORCH = """
import sys
for name in ("lightning", "matplotlib", "onnx", "safetensors", "skimage", "torch", "torchvision"):
    sys.modules[name] = None  # as where it is not installed
import kp_cli
kp_cli.main()
"""


def test_a_model_file_is_measured_without_torch(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, own_detector: Path, tmp_path: Path
) -> None:
    from kp_train.synthetic import write_csv_source

    def lean(*words: object) -> str:
        """What `kp WORDS` prints in a process of its own."""
        done = subprocess.run([sys.executable, "-c", NO_TORCH, *map(str, words)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    data = ("--data", write_csv_source(tmp_path, people=2), "--json", "--threads", 1)
    shipped = Path(__file__).resolve().parents[1] / "engines" / "resnet18-68-lite" / "model.int8.onnx"
    words = ("eval", shipped, *data)
    assert json.loads(lean(*words)) == json.loads(kp(capsys, *words)[1])
    words = ("tune", bundle, *data, "--alone", "--photo", astronaut, "--seconds", 0, "--samples", 1)
    assert json.loads(lean(*words, "--out", tmp_path / "tuned.json"))["trials"][0]["rise"]["points"] == 0
