"""kp bench as a person types it: what it prints and keeps."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path

import pytest

from kp_runtime.errors import InputError
from kp_runtime.manifest import Manifest
from tests.test_cli import kp, status_of


@pytest.fixture(scope="module")
def bench_file(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `kp bench --out` wrote of the tiny bundle."""
    path = tmp_path_factory.mktemp("bench") / "old.json"
    words = ("bench", bundle, "--seconds", "0", "--samples", "3", "--batch", "1", "--batch", "3", "--threads", "1")
    assert status_of(*words, "--precision", "fp32", "--out", path) == 0
    return path


def test_bench_gives_the_detector_its_threads(
    capsys: pytest.CaptureFixture[str], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def open_detector(name: str, **options: object) -> object:
        given.append(options)
        raise InputError("enough")

    monkeypatch.setattr("kp_cli.machines.open_detector", open_detector)
    assert kp(capsys, "bench", bundle, "--threads", "1")[0] == 1
    assert given == [{"threads": 1}]


def test_bench_prints_and_writes(
    capsys: pytest.CaptureFixture[str], bundle: Path, bench_file: Path, tmp_path: Path
) -> None:
    written = json.loads(bench_file.read_text())
    assert [case["batch"] for case in written["network"]] == [1, 3]
    assert written["files"][0]["sha256"] == Manifest.read(bundle).files["model.fp32.onnx"].sha256
    assert set(written["photo"]["stages"]) == {"read", "detect", "crop", "infer", "map back"}
    assert written["setup"]["settings"] == {
        "batches": [1, 3], "seconds": 0, "samples": 3, "threads": 1, "precisions": ["fp32"],
        "cores": None, "backend": "auto",
    }  # fmt: skip
    words = ("bench", bundle, "--seconds", "0", "--samples", "3", "--batch", "1", "--threads", "1")
    page = tmp_path / "page.html"
    status, out, err = kp(capsys, *words, "--json", "--compare", bench_file, "--html", page)
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["schema"] == 1
    cases = [case["case"] for case in document["comparison"]["cases"]]
    assert cases[0] == "whole photo"
    assert cases[-1] == "model.fp32.onnx, batch 1"
    assert document["comparison"]["alone"] == ["only in the old results: model.fp32.onnx, batch 3"]
    assert page.read_text().startswith("<!doctype html>")


def test_bench_of_two_files_measures_nothing(
    capsys: pytest.CaptureFixture[str], bench_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kp_runtime.bench.run_bench", None)
    words = ("bench", "--compare", bench_file, "--with", bench_file, "--html", tmp_path / "p.html")
    status, out, _ = kp(capsys, *words)
    assert status == 0
    for text in ("network alone", "stages of a photo", "fresh processes", "against the older results", "interleaved"):
        assert text in out
    assert out.count("not distinguishable") == 8
    assert out.splitlines()[-1] == str(tmp_path / "p.html")
    raw = json.loads(bench_file.read_text())
    raw["setup"]["machine"]["governor"] = "other"
    (tmp_path / "other.json").write_text(json.dumps(raw))
    words = ("bench", "--compare", bench_file, "--with", tmp_path / "other.json")
    status, _, err = kp(capsys, *words)
    assert status == 1
    assert err.count("\n") == 1
    assert "governor" in err
    assert "--compare-anyway" in err
    status, out, _ = kp(capsys, *words, "--compare-anyway")
    assert status == 0
    assert "no fair comparison: governor" in out


class FullDisk(io.StringIO):
    """A stdout that takes nothing."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_bench_keeps_its_files_where_stdout_is_gone(
    capsys: pytest.CaptureFixture[str], bench_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("bench", "--compare", bench_file, "--with", bench_file, "--html", tmp_path / "p.html")
    monkeypatch.setattr(sys, "stdout", FullDisk())
    assert status_of(*words) == 1
    assert capsys.readouterr().err == "kp: the system: No space left on device\n"
    assert (tmp_path / "p.html").is_file()


def test_bench_refuses_before_it_measures(
    capsys: pytest.CaptureFixture[str], bundle: Path, bench_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kp_runtime.bench.cold_starts", None)
    status, _, err = kp(capsys, "bench", bundle, "--compare", bench_file, "--batch", "1")
    assert status == 1
    assert "threads 1, then of the engine's choice" in err
