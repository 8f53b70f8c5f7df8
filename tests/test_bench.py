"""The one measured run of `kp bench`: what is measured, in which order, and what ran."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from kp_runtime.backend import Backend
from kp_runtime.bench import StagedCalls, _measure, _open, boxes_in_turn, run_bench
from kp_runtime.bench_results import Bench, BenchSettings, Setup, Times, times_from_turns
from kp_runtime.cold_start import PROCESSES, cold_starts
from kp_runtime.cores import usable_cores
from kp_runtime.errors import BackendError, ImageError, InputError
from kp_runtime.files import sha256_of_file
from kp_runtime.frame import as_frame, image_from_file
from kp_runtime.geometry import matrices_from_boxes
from kp_runtime.manifest import Manifest, file_entry
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.spec import ModelSpec
from kp_runtime.timing import StageTimer, measure_in_turns, summary_from_turns
from tests.bench_run import QUICK, astronaut_box


def nothing(image: object, layout: str = "bgr") -> np.ndarray:
    return np.empty((0, 4))


def two_precisions(bundle: Path, folder: Path) -> Path:
    """The tiny bundle with its graph once more as a file of precision fp16."""
    shutil.copytree(bundle, folder)
    manifest = Manifest.read(folder)
    shutil.copy(folder / "model.fp32.onnx", folder / "model.fp16.onnx")
    entry = dataclasses.replace(manifest.files["model.fp32.onnx"], precision="fp16")
    dataclasses.replace(manifest, files=manifest.files | {"model.fp16.onnx": entry}).write(folder)
    return folder


def check_times(times: Times) -> None:
    assert len(times.turns_ms) >= 2
    assert times.summary.samples == sum(map(len, times.turns_ms)) >= 3
    assert times.summary == summary_from_turns([[ms / 1e3 for ms in turn] for turn in times.turns_ms])
    for turn in times.turns_ms:
        assert [round(ms, 4) for ms in turn] == list(turn)


def test_every_case_is_measured_in_turns(bench: Bench, bundle: Path) -> None:
    assert list(bench.photo.stages) == ["read", "detect", "crop", "infer", "map back"]
    assert [(case.file, case.batch) for case in bench.network] == [("model.fp32.onnx", 1), ("model.fp32.onnx", 3)]
    for times in bench.cases().values():
        check_times(times)
    for case in bench.network:
        assert case.ms_a_face == case.times.summary.p50_ms / case.batch
    assert len(bench.cases()) == 8


def test_the_whole_way_is_measured_as_a_program_calls_it() -> None:
    """A `timer` slows a call on a GPU."""
    timed = []

    def predict(timer: StageTimer | None = None) -> None:
        timed.append(timer is not None)
        if timer is not None:
            timer.seconds = {"crop": [1000.0]}

    model = cast("Any", SimpleNamespace(backend=SimpleNamespace(report=SimpleNamespace(file="a.onnx"))))
    _, photo = _measure(model, {}, np.empty(0, np.uint8), predict, QUICK, lambda share: None)
    assert timed.count(False) > photo.whole.summary.samples >= QUICK.samples
    assert photo.stages["crop"].summary.min_ms == 1e6
    assert photo.whole.summary.max_ms < 1e6


def test_what_ran_is_recorded(bench: Bench, bundle: Path, astronaut: Path) -> None:
    (file,) = bench.files
    entry = Manifest.read(bundle).files["model.fp32.onnx"]
    assert (file.file, file.sha256, file.bytes) == ("model.fp32.onnx", entry.sha256, entry.bytes)
    assert (file.precision, file.backend, bench.photo.file) == ("fp32", "ort-cpu", "model.fp32.onnx")
    assert bench.setup.photo_sha256 == sha256_of_file(astronaut)
    assert (bench.setup.faces, bench.setup.detector, bench.setup.photo_size_hw) == (1, "astronaut_box", (512, 512))
    assert bench.setup.settings == QUICK


def test_batches_settle_before_they_are_measured(bench: Bench) -> None:
    """With one thread the ways of three faces are whole and one by one; the fastest stands first."""
    (ways,) = [by for size, by in bench.files[0].ways.items() if size == "4"]
    assert set(ways) == {"whole", "one by one"}
    assert list(ways.values()) == sorted(ways.values())
    assert bench.files[0].way(3) == next(iter(ways))
    assert bench.files[0].way(1) == bench.files[0].way(99) == ""


def test_a_batch_is_fed_as_the_next_larger_one_that_was_tried(bench: Bench) -> None:
    ways = {"16": {"by 4": 1.0}, "4": {"whole": 1.0, "one by one": 2.0}}
    file = dataclasses.replace(bench.files[0], ways=ways)
    assert [file.way(batch) for batch in (1, 4, 5, 16, 17)] == ["", "whole", "by 4", "by 4", ""]


def test_engines_are_warm_before_anything_is_measured(
    bundle: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[int] = []

    def measure(cases: dict[str, object], **settings: object) -> None:
        assert (settings["seconds"], settings["samples"]) == (0, 3)
        assert list(cases) == ["photo", "stages", "model.fp32.onnx 3"]
        raise KeyboardInterrupt

    def cold(files: object, crop: object, threads: int | None, step: object) -> list[object]:
        assert threads == 1
        return []

    monkeypatch.setattr("kp_runtime.bench.cold_starts", cold)
    monkeypatch.setattr("kp_runtime.bench.measure_in_turns", measure)
    monkeypatch.setattr(Backend, "warmup", lambda self, faces: warmed.append(faces))
    with pytest.raises(KeyboardInterrupt):
        run_bench(bundle, astronaut, astronaut_box, dataclasses.replace(QUICK, batches=(3,)))
    assert warmed == [1, 3], "the photo has one face"


def test_a_fresh_process_tells_time_and_memory(bench: Bench) -> None:
    cold = bench.files[0].cold
    assert cold.processes == PROCESSES == 3
    assert min(cold.load_ms, cold.first_ms) > 0
    if sys.platform == "linux":
        assert cold.base_mib is not None
        assert cold.peak_mib is not None
        assert 5 < cold.base_mib < cold.peak_mib


def test_a_fresh_process_holds_nothing_of_the_one_that_asks() -> None:
    program = "import sys, numpy, kp_runtime.backend; had = set(sys.modules); import kp_runtime.probes; "
    done = subprocess.run(
        [sys.executable, "-c", program + "print(*set(sys.modules) - had)"], capture_output=True, text=True, check=True
    )
    assert not {"subprocess", "signal", "selectors"} & set(done.stdout.split())


def test_what_others_print_in_a_fresh_process_is_no_answer(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import atexit\nprint('welcome')\natexit.register(print, 'bye')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (cold,) = cold_starts([(bundle / "model.fp32.onnx", "ort-cpu")], np.zeros((1, 64, 64), np.uint8), 1)
    assert cold.load_ms > 0


def test_cold_starts_are_medians_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([[1.0, 10, 1024, 4096], [7.0, 70, None, None], [5.0, 30, 1024, 2048], [8.0, 80, None, None],
                 [3.0, 20, 3072, 8192], [9.0, 90, None, None]])  # fmt: skip
    asked = []
    monkeypatch.setattr(
        "kp_runtime.cold_start._run", lambda path, engine, *_: (asked.append((str(path), engine)), next(told))[1]
    )
    shares: list[float] = []
    first, second = cold_starts([(Path("a"), "x"), (Path("b"), "y")], np.zeros((1, 8, 8), np.uint8), 1, shares.append)
    assert asked == [("a", "x"), ("b", "y")] * 3
    assert (first.load_ms, first.first_ms, first.base_mib, first.peak_mib) == (3, 20, 1, 4)
    assert (second.load_ms, second.base_mib, second.peak_mib) == (8, None, None)
    assert shares[-1] == 1


def test_a_process_that_fails_is_said(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"did not start in a fresh process: .*is not a bundle"):
        cold_starts([(tmp_path / "none.onnx", "ort-cpu")], np.zeros((1, 64, 64), np.uint8), 1)


def test_crops_of_a_batch_are_faces_and_differ(astronaut: Path) -> None:
    frame, spec = as_frame(image_from_file(astronaut)), ModelSpec("tiny", size=64)
    boxes = np.concatenate([astronaut_box(None), [[120.0, 60, 330, 240]]])
    matrices = matrices_from_boxes(boxes_in_turn(boxes, 7), 64, spec.margin)
    crops = crops_from_frame(frame, matrices, 64)
    assert crops.shape == (7, 1, 64, 64)
    assert len({crop.tobytes() for crop in crops}) == 7
    assert crops.reshape(7, -1).std(axis=1).min() > 20
    np.testing.assert_array_equal(crops[:2], crops_from_frame(frame, matrices_from_boxes(boxes, 64, spec.margin), 64))
    # those of one face are near it, not elsewhere
    distance = np.abs(crops.astype(int) - crops[np.arange(7) % 2].astype(int)).mean(axis=(1, 2, 3))
    across = np.abs(crops[0].astype(int) - crops[1].astype(int)).mean()
    assert distance.max() < across / 2


def test_staged_calls_know_what_was_timed() -> None:
    durations = iter(range(1, 1000))

    def predict(timer: StageTimer) -> None:
        timer.seconds = {"a": [float(next(durations))], "b": [0.5, 0.25]}

    staged = StagedCalls(predict)
    turns = measure_in_turns({"photo": staged}, seconds=0, samples=1, warm_up=0, turn=0, pause=0)["photo"]
    assert list(map(len, turns)) == [1, 1]
    # call 1 warms up, 2 and 4 begin a turn
    assert staged.turns(turns) == {"a": [[3.0], [5.0]], "b": [[0.75], [0.75]]}


def test_samples_are_rounded_and_none_is_lost() -> None:
    times = times_from_turns([[0.00123456789, 1.0], [1e-9]])
    assert times.turns_ms == ((1.2346, 1000.0), (0.0001,))
    assert (times.summary.samples, times.summary.max_ms) == (3, 1000)


def test_precisions_limit_the_files(bundle: Path, tmp_path: Path) -> None:
    both = two_precisions(bundle, tmp_path / "both")
    for precisions, files in (
        ((), ["model.fp32.onnx", "model.fp16.onnx"]),
        (("fp16",), ["model.fp16.onnx"]),
        (("fp16", "fp32"), ["model.fp16.onnx", "model.fp32.onnx"]),
    ):
        opened, left_out = _open(both, dataclasses.replace(QUICK, precisions=precisions))
        assert not left_out
        assert list(opened) == [backend.report.file for backend in opened.values()] == files


def test_a_plan_that_cannot_run_here_is_left_out_with_its_reason(bundle: Path, tmp_path: Path) -> None:
    both = two_precisions(bundle, tmp_path / "both")
    plan = both / "model.fp16.plan"
    plan.write_bytes(b"another GPU's")
    manifest = Manifest.read(both)
    entry = file_entry(plan, "plan", precision="fp16")
    dataclasses.replace(manifest, files={plan.name: entry} | manifest.files).write(both)
    opened, left_out = _open(both, QUICK)
    assert list(opened) == ["model.fp32.onnx", "model.fp16.onnx"]
    assert list(left_out) == [plan.name]
    assert "\n" not in left_out[plan.name]
    with pytest.raises(BackendError):  # one that was asked for is never left out
        _open(both, dataclasses.replace(QUICK, backend="tensorrt"))
    assert list(_open(both, dataclasses.replace(QUICK, backend="ort-cpu", precisions=("fp16",)))[0]) == [
        "model.fp16.onnx"
    ]
    with pytest.raises(InputError, match=r"no TensorRT plan of precision int8, only fp16; kp plan can add it"):
        _open(both, dataclasses.replace(QUICK, backend="tensorrt", precisions=("int8",)))


def test_a_setup_that_is_not_admitted_is_not_measured(
    bundle: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kp_runtime.bench.cold_starts", None)

    def refuse(setup: Setup) -> None:
        assert setup.settings == QUICK
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        run_bench(bundle, astronaut, astronaut_box, QUICK, admit=refuse)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"batches": (1, 0)}, InputError, "batch sizes must be 1 to 1000000, got 1, 0"),
        ({"batches": ()}, InputError, "batch sizes must be 1 to 1000000, got none"),
        ({"batches": (10**18,)}, InputError, "batch sizes must be 1 to 1000000, got 1000000000000000000"),
        ({"threads": 0}, InputError, "threads must be 1 to"),
        ({"threads": usable_cores() + 1}, InputError, "threads must be 1 to"),
        ({"seconds": -1.0}, InputError, "seconds from 0 on and samples from 1 on, got -1.0 and 200"),
        ({"seconds": float("nan")}, InputError, "got nan and 200"),
        ({"samples": 0}, InputError, "got 3.0 and 0"),
        ({"precisions": ("fp32", "half")}, InputError, "no precision 'half'; choose from fp32, fp16, int8, int8-trt"),
        (
            {"precisions": ("fp32", "int8")},
            InputError,
            "has no ONNX file or TensorRT plan of precision int8, only fp32; kp export can",
        ),
    ],
)
def test_settings_that_make_no_sense(
    settings: dict[str, Any], error: type[Exception], message: str, bundle: Path, astronaut: Path
) -> None:
    with pytest.raises(error, match=message):
        run_bench(bundle, astronaut, astronaut_box, BenchSettings(**settings))


def test_photo_without_a_face(bundle: Path, astronaut: Path) -> None:
    with pytest.raises(ImageError, match=r"no face was found on .*astronaut\.png; bench on a photo with one"):
        run_bench(bundle, astronaut, nothing, QUICK)
