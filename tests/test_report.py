"""What `kp` prints: tables, lines, records and bars."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kp_cli import report
from kp_export.parity import Parity
from kp_export.robustness import Folder
from kp_runtime.bench_compare import CaseComparison, Comparison
from kp_runtime.bench_results import ColdStart, times_from_turns
from kp_runtime.errors import InputError
from kp_runtime.manifest import FileEntry, Manifest
from kp_runtime.recorded_rise import Rise
from kp_runtime.spec import ModelSpec
from kp_runtime.timing import FEW_TURNS, Ratio, TimeSummary
from kp_runtime.tune_results import Trial
from kp_runtime.video import VideoRun


def cells(capsys: pytest.CaptureFixture[str], show: Callable[..., None], *results: Any) -> list[list[str]]:
    """What a function of `report` prints, the cells of each line."""
    show(*results)
    return [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]


def test_measures_of_an_evaluation_are_printed_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    measured = SimpleNamespace(
        faces=7,
        nme=0.031,
        median=0.025,
        p95=0.06,
        auc=0.4567,
        failures=0.0123,
        smooth_l1=0.00456,
        regions={"jaw": 0.04},
    )
    found = SimpleNamespace(accuracy=measured, missed=2, given_up=0.005, interval=(0.029, 0.0333))
    shown = cells(capsys, report.print_accuracy, "x", found)
    assert shown[2:] == [
        ["faces", "7"],
        ["missed by the detector", "2"],
        ["taken for no face", "0.50%"],
        ["NME", "3.10%"],
        ["its 95% interval", "2.90% to 3.33%"],
        ["NME median / p95", "2.50% / 6.00%"],
        ["AUC at 8%", "0.457"],
        ["failures over 8%", "1.23%"],
        ["SmoothL1 as the original", "0.00456"],
        ["NME jaw", "4.00%"],
    ]
    beside = [Folder("helen", 88, 0.0323, (0.0306, 0.0342)), Folder("afw", 3, 0.04, None)]
    shown = cells(capsys, report.print_folders, beside)
    assert shown == [
        ["by folder"],
        ["folder", "faces", "NME", "its 95% interval"],
        ["helen", "88", "3.23%", "3.06% to 3.42%"],
        ["afw", "3", "4.00%"],
    ]
    report.print_folders([])
    assert capsys.readouterr().out == ""
    group = {"by": "turn", "faces": 3, "nme": 0.05}
    steady = {"faces": 5, "nme": 0.03, "jitter_nme": 0.0345, "enlarged": {2: 0.001}, "mirrored": 0.002}
    more = {"groups": [group | {"low": 0.3, "high": 0.5}, group | {"low": 0.5, "high": None}], "robustness": steady}
    shown = cells(capsys, report.print_groups, more)
    assert shown[2:4] == [["turn", "0.3 to 0.5", "3", "5.00%"], ["turn", "0.5 or more", "3", "5.00%"]]
    assert shown[4] == ["the same 5 faces shown otherwise"]
    assert shown[6:] == [
        ["boxes 10% off in place and size", "NME 3.45%, +0.45 points"],
        ["photo enlarged 2 times", "points move by 0.10%"],
        ["photo mirrored", "points move by 0.20%"],
    ]


def test_distances_to_pytorch_are_printed_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    found = Parity("a.onnx", "fp32", 5, "some faces", 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, {"jaw": 0.7}, "a face", 0.8)
    title, head, row = cells(capsys, report.print_parity, [found])
    assert title == ["distance to PyTorch on some faces"]
    assert dict(zip(head, row, strict=True)) == {
        "file": "a.onnx", "faces": "5", "mean px": "0.1000", "p50 px": "0.2000", "p99 px": "0.3000",
        "max px": "0.4000", "NME %": "0.5000", "rise": "+0.6000", "score": "0.8000", "jaw px": "0.7000",
    }  # fmt: skip


def test_times_are_printed_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    summary = TimeSummary(9, 1.2, 1.0, 0.9, 1.1, 2.0, 3.0, 4.0, 0.5)
    assert cells(capsys, report.print_times, {"crop": summary})[2:] == [["crop", "9", "1.00", "2.00", "3.00", "4.00"]]
    times = SimpleNamespace(summary=summary)
    machine = SimpleNamespace(cpu="a CPU", cores=2, cores_usable=2, versions={"onnxruntime": "1.2"})
    result = SimpleNamespace(
        setup=SimpleNamespace(machine=machine, faces=1, photo="a.jpg"),
        network=[SimpleNamespace(file="a.onnx", batch=8, times=times, ms_a_face=0.125)],
        photo=SimpleNamespace(file="a.onnx", stages={"crop": times}, whole=times),
        files=[SimpleNamespace(file="a.onnx", backend="ort-cpu", cold=ColdStart(3, 12.0, 3.4, 50.0, 200.0))],
        left_out={"a.plan": "no GPU"},
    )
    shown = cells(capsys, report.print_bench, result)
    numbers = ["9", "1.00", "0.90 to 1.10", "2.00", "3.00", "4.00"]
    assert ["a.onnx", "8", *numbers, "0.12"] in shown
    assert [row for row in shown if row[0] in ("crop", "whole")] == [["crop", *numbers], ["whole", *numbers]]
    assert shown[-2:] == [["a.onnx", "ort-cpu", "12", "3.4", "200", "50"], ["left out: a.plan: no GPU"]]


def test_comparisons_are_printed_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    case = CaseComparison("whole photo", 2.0, 3.0, Ratio(1.5, 1.25, 1.75), "slower")
    told = Comparison((case,), ("only in the old results: a",), ("cores 2, then 4",), ("a note",))
    assert cells(capsys, report.print_comparison, told)[2:] == [
        ["whole photo", "2.00", "3.00", "1.500", "1.250 to 1.750", "slower"],
        ["no fair comparison: cores 2, then 4"],
        ["only in the old results: a"],
        ["a note"],
    ]
    tuned = SimpleNamespace(
        machine=SimpleNamespace(cpu="a CPU", cores_usable=2), settings=SimpleNamespace(faces=1), photo="a.jpg",
        bundles=[], trials=[], left_out={"a.plan": "no GPU"}, chosen=None, over_default=Ratio(0.5, 0.4, 0.6),
    )  # fmt: skip
    shown = cells(capsys, report.print_tuning, tuned)
    assert shown[0] == ["a CPU, 2 cores, 1 face(s) on a.jpg"]
    by_itself = "its time over that of what load() takes by itself: 0.50 (0.40 to 0.60)"
    assert shown[-2:] == [["left out: a.plan: no GPU"], [by_itself]]


@pytest.mark.parametrize("turns", [FEW_TURNS - 1, FEW_TURNS])
def test_a_tuning_of_few_turns_shows_no_interval(turns: int, capsys: pytest.CaptureFixture[str]) -> None:
    times = times_from_turns([[0.001]] * turns)
    trial = Trial("b", "a.onnx", "fp32", "ort-cpu", 1, None, {}, Rise(0.0, "fp32"), times, times, "chosen")
    tuned = SimpleNamespace(
        machine=SimpleNamespace(cpu="a CPU", cores_usable=2), settings=SimpleNamespace(faces=1), photo="a.jpg",
        bundles=["b"], trials=[trial], left_out={}, chosen=0, over_default=Ratio(0.5, 0.4, 0.6),
    )  # fmt: skip
    report.print_tuning(tuned)
    shown = capsys.readouterr().out
    assert [text in shown for text in ("1.00 to 1.00", "(0.40 to 0.60)")] == [turns == FEW_TURNS] * 2
    assert ("under 6 turns, so a 95% interval would be too narrow" in shown) is (turns < FEW_TURNS)


@pytest.mark.parametrize("error", [SystemExit(1), BrokenPipeError()])  # of rich, and of the rest
def test_the_error_of_a_stdout_that_is_gone_waits(error: BaseException) -> None:
    with report.shown_before_kept() as raise_lost:
        raise error
    with pytest.raises(type(error)):
        raise_lost()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is always full")
def test_a_log_on_a_full_disk_ends_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
        report.note("the camera is back")
        with pytest.raises(SystemExit) as ended:
            report.fail("kp", "no camera")
    assert ended.value.code == 1


def test_a_run_over_a_video_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    run = VideoRun(30, 2, 1, 5, 2.0, True, (Path("a.mp4"),))
    told = "x: 30 frames, stopped, 15.0 frames/s, 2 dropped to keep up, 1 track, detector on 5 frames"
    assert cells(capsys, report.print_run, "x", run) == [[told], ["a.mp4"]]


def test_what_a_manifest_records_is_printed() -> None:
    training = {
        "sources": [
            {"name": "x.csv", "trained_on": 9, "sha256": "ab"},
            {"name": "y.csv", "trained_on": 8, "sha256": "cd", "whole": True},
        ],
        "git_revision": "c0ffee",
        "start": {"training": {"start": {}}, "before": [{"start": {}}, {"start": {"weights": "imagenet"}}]},
        "best_epoch": 3,
        "lost_score": {"given_up": 0.01, "missed": 0.02},
    }
    measured = {"nme": 0.03, "failures": 0.012, "faces": 5}
    accuracy = {"x": measured, "mine": measured | {"precision": "int8", "sha256": "b" * 64}, "fp32": {"nme": 0.03}}
    files = {"model.int8.onnx": FileEntry("b" * 64, 1, "onnx", "int8")}
    manifest = Manifest(ModelSpec("x", 64), files, training=training, accuracy=accuracy, licence={"code": "MIT"})
    assert report._provenance(manifest) == [
        "trained on 9 faces of x.csv (ab)",
        "trained on 8 faces of y.csv (cd), of which nobody is held out",
        "trained by revision c0ffee, best epoch 3",
        "began, or what it came from did, at the weights imagenet; their terms are not told here",
        "lost score: 1.00% of held-out views of a face given up, 2.00% of others taken for one",
        "x: NME 3.00%, failures 1.2%, 5 faces",
        "mine (model.int8.onnx): NME 3.00%, failures 1.2%, 5 faces",
        "licence of the code: MIT",
    ]
    bare = dataclasses.replace(manifest, training={"start": {"weights": "none"}}, accuracy={}, licence={})
    assert report._provenance(bare)[1:] == ["licence: none is told; kp train and kp train-detector --licence tell one"]
    made = {"layers": {"int8": 20, "fp32": 1}, "receipt": {"compute_shares": {"int8": 0.75, "fp16": 0.25}}}
    assert report._layers(made) == "20 int8, 1 fp32, 75% int8, 25% fp16"


class Terminal(io.StringIO):
    """What somebody looks at."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with report.share_progress() as step:
        step("cold starts", 0.5)
        step("measuring", 0.25)
    assert "cold starts" in terminal.getvalue()
    assert "25%" in terminal.getvalue()


def test_the_line_of_a_build_is_wiped_away_at_its_end_and_at_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with contextlib.suppress(InputError), report.build_progress() as step:
        assert step is not None
        for share in (0.51, 0.52, 1.0):
            step("Building\x1b[2J engine", share)
        raise InputError
    lines = [r"Building\x1b[2J engine 51%", r"Building\x1b[2J engine 100%", ""]
    assert terminal.getvalue() == "".join(f"\r{line}\033[K" for line in lines)
    monkeypatch.setenv("TERM", "dumb")  # knows of no such codes
    report.tell_subject("GPU")
    assert "GPU" not in terminal.getvalue()
