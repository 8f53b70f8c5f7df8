from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import table
from benchmarks.command import run
from benchmarks.compare_engines import Comparison, compare
from benchmarks.crop_path import Scene, crops_by_hand, measure_crop_path
from benchmarks.engines import OPENVINO, ORT, Candidate, LeftOut, bf16_blocker, candidates_from_bundle, openvino_ready
from benchmarks.faces import varied_crops
from benchmarks.profile_batches import profile_bundle, profile_file
from benchmarks.record import (
    KINDS,
    RESULTS,
    Record,
    machine_name,
    median_of,
    read_record,
    read_records,
    record_from,
    write_record,
)
from benchmarks.start import Start, measure_start, run_process, summaries_from_samples
from benchmarks.table import finish
from kp_runtime.cores import checked_threads
from kp_runtime.errors import BackendError, InputError, KpError
from kp_runtime.frame import as_frame
from kp_runtime.geometry import matrices_from_boxes
from kp_runtime.manifest import Manifest
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.spec import ModelSpec
from kp_train.checkpoint import save_checkpoint
from kp_train.model import KeypointNet
from tests.models import LOST_LIMIT, SIZE, tiny_bundle, tiny_keypoints
from tests.test_tune import make_bundle
from tests.tolerances import CROP_GREY, FP32_PX, assert_close

SCRIPTS = ("compare_engines", "profile_batches", "start", "crop_path", "stages", "gpu", "soak", "table", "scale")


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    return varied_crops(4, ModelSpec("tiny", size=SIZE))


@pytest.fixture(scope="module")
def full_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint beside a file that is not made from it."""
    folder = tmp_path_factory.mktemp("benchmarks") / "full"
    spec = ModelSpec("tiny", size=SIZE, lost_limit=LOST_LIMIT)
    save_checkpoint(folder, KeypointNet(SIZE, scores=True).eval(), Manifest(spec))
    checkpoint = Manifest.read(folder).files
    tiny_bundle(folder)
    manifest = Manifest.read(folder)
    dataclasses.replace(manifest, files=checkpoint | manifest.files).write(folder)
    return folder


def engine(name: str, precision: str, off_px: float = 0.0, error: Exception | None = None) -> Candidate:
    def ready(batch: int) -> Callable[[np.ndarray], np.ndarray]:
        if error:
            raise error
        return lambda crops: tiny_keypoints(crops) + np.float32(off_px)

    return Candidate(name, precision, f"model.{precision}.onnx", "0" * 64, ready)


@pytest.fixture(scope="module")
def comparison(crops: np.ndarray) -> Comparison:
    engines = [
        engine("PyTorch", "fp32"),
        engine(ORT, "fp32", off_px=0.2),
        engine(ORT, "int8", off_px=1.0),
        engine(OPENVINO, "int8"),
        engine(OPENVINO, "fp32", off_px=float("nan")),
        engine("torch.compile", "fp32", error=RuntimeError("no\ncompiler " + "x" * 400)),
        LeftOut(OPENVINO, "bf16", None, "not here"),
    ]
    return compare(engines, crops, batches=(1, 3), threads=1, seconds=0, samples=2, warm_up=0)


def small_scenes() -> list[Scene]:
    frame = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    return [Scene(frame, faces, 20, 32, threads) for faces, threads in ((1, 1), (9, 2))]


def test_docs_show_the_results() -> None:
    pages = table.pages_with_tables(table.DOCS, read_records(RESULTS))
    assert [page.name for page in pages] == list(table.PAGES)
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name}: run python -m benchmarks.table"


def test_every_kind_of_result_has_its_page() -> None:
    assert sorted(kind for kinds in table.PAGES.values() for kind in kinds) == sorted(KINDS)


def test_the_first_table_is_of_the_results() -> None:
    """What the page answers first is written by hand."""
    text = (table.DOCS / "benchmarks.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (AVX\S+(?: alone)?) \| (\d.*) \|$", text.partition("\n## ")[0], re.MULTILINE))
    measured = {
        (machine_name(r.machine), r.bundle["folder"], case["batch"]): f"{case['ms_a_face']:.2f}"
        for r in read_records(RESULTS)
        if r.kind == "engines" and r.settings["threads"] == 2
        for case in r.measured["cases"]
        if (case["engine"], case["precision"]) == (ORT, "int8")
    }
    for name, machine in (("AVX512-VNNI", "AMD EPYC avx_vnni, 2 cores"), ("AVX2 alone", "AMD EPYC avx2, 2 cores")):
        wanted = [
            measured[machine, folder, batch] for folder in ("resnet18-68", "resnet18-68-lite") for batch in (1, 8)
        ]
        assert rows[name].split(" | ") == wanted, name


def test_crops_are_real_and_differ(crops: np.ndarray) -> None:
    assert (crops.shape, crops.dtype) == ((4, 1, SIZE, SIZE), np.uint8)
    assert all(crop.std() > 20 for crop in crops)
    assert len({crop.tobytes() for crop in crops}) == 4
    np.testing.assert_array_equal(varied_crops(4, ModelSpec("tiny", size=SIZE)), crops)


def test_engines_that_are_right_are_timed(comparison: Comparison) -> None:
    names = [(c.engine, c.precision, c.batch) for c in comparison.cases]
    wanted = [("PyTorch", "fp32"), (ORT, "int8"), (OPENVINO, "int8")]
    assert names == [(*name, batch) for name in wanted for batch in (1, 3)]
    for case in comparison.cases:
        assert case.time.samples == sum(map(len, case.turns_ms)) >= 2
        assert all(sample == round(sample, 4) for turn in case.turns_ms for sample in turn)
        assert case.ms_a_face == case.time.p50_ms / case.batch
        assert 0 < case.ms_a_face_low <= case.ms_a_face_high
    assert [round(c.distance_px, 3) for c in comparison.cases] == [0, 0, 1.414, 1.414, 0, 0]


def test_the_others_are_left_out_with_a_reason(comparison: Comparison) -> None:
    reasons = {(o.engine, o.precision, o.batch): o.reason for o in comparison.left_out}
    assert reasons[OPENVINO, "bf16", None] == "not here"
    for batch in (1, 3):
        assert reasons[ORT, "fp32", batch] == "wrong: a keypoint is 0.283 px from PyTorch's, at most 0.1 px is right"
        assert reasons[OPENVINO, "fp32", batch].startswith("wrong: a keypoint is nan px")
        compiler = reasons["torch.compile", "fp32", batch]
        assert compiler.startswith("no compiler xxx")
        assert len(compiler) == 400
    assert len(reasons) == 7


def test_int8_engines_are_compared(comparison: Comparison) -> None:
    assert [pair.batch for pair in comparison.int8_ort_over_openvino] == [1, 3]
    for pair in comparison.int8_ort_over_openvino:
        assert 0 < pair.ratio.low <= pair.ratio.high
        assert pair.ratio.value > 0


@pytest.mark.parametrize("batches", [(), (0,), (1, -1), (1, 5)])
def test_batches_that_make_no_sense(batches: tuple[int, ...], crops: np.ndarray, bundle: Path) -> None:
    message = "a batch of 5 needs as many crops, got 4" if 5 in batches else "batch sizes must be 1 or more, got"
    with pytest.raises(InputError, match=message):
        compare([engine("PyTorch", "fp32")], crops, batches=batches, threads=1)
    with pytest.raises(InputError, match=message):
        profile_file(bundle / "model.fp32.onnx", crops, precision="fp32", sha256="", batches=batches, threads=1)


def test_no_comparison_without_a_reference(crops: np.ndarray) -> None:
    with pytest.raises(KpError, match="the reference does not run: gone"):
        compare([LeftOut("PyTorch", "fp32", None, "gone")], crops, batches=(1,), threads=1)


def test_a_file_that_is_not_the_checkpoints_is_not_timed(
    full_bundle: Path, crops: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.engines.bf16_blocker", lambda: "not here")  # whatever processor this is
    found = list(candidates_from_bundle(full_bundle, 1))
    assert [(c.engine, c.precision) for c in found if isinstance(c, Candidate)] == [
        ("PyTorch", "fp32"),
        ("torch.compile", "fp32"),
        (ORT, "fp32"),
        (OPENVINO, "fp32"),
    ]
    reasons = {(c.engine, c.precision): c.reason for c in found if isinstance(c, LeftOut)}
    assert reasons[ORT, "fp16"] == "the bundle has no file for it; kp export --fp16 adds one"
    assert "kp export --int8 --calibration FACES adds one" in reasons[OPENVINO, "int8"]
    two = [c for c in found if (c.engine, c.precision) in (("PyTorch", "fp32"), (ORT, "fp32"))]
    result = compare(two, crops, batches=(2,), threads=1, seconds=0, samples=1, warm_up=0)
    assert [(c.engine, c.file) for c in result.cases] == [("PyTorch", "checkpoint.safetensors")]
    assert result.cases[0].distance_px < FP32_PX
    assert [(o.engine, o.reason.partition(":")[0]) for o in result.left_out] == [(ORT, "wrong")]


def test_onnx_runtime_is_the_run_times_own(full_bundle: Path, crops: np.ndarray) -> None:
    (ort,) = [c for c in candidates_from_bundle(full_bundle, 1) if isinstance(c, Candidate) and c.engine == ORT]
    assert_close(ort.ready(3)(crops[:3]), tiny_keypoints(crops[:3]), FP32_PX, "ONNX Runtime")
    assert ort.feeding(1) is None
    assert isinstance(ort.feeding(3), str)


@pytest.mark.parametrize("batch", [1, 3])
def test_openvino(batch: int, bundle: Path, crops: np.ndarray) -> None:
    pytest.importorskip("openvino")
    infer = openvino_ready((bundle / "model.fp32.onnx").read_bytes(), 1)(batch)
    assert_close(infer(crops[:batch]), tiny_keypoints(crops[:batch]), FP32_PX, "OpenVINO")


def test_bf16_only_where_the_cpu_has_it(tmp_path: Path) -> None:
    for text, blocker in (
        ("flags\t\t: avx2 avx512f avx512_bf16\n", None),
        ("Features\t: asimd bf16\n", None),
        ("flags\t\t: avx2 avx512f\n", "this CPU has no bfloat16 arithmetic"),
        ("", "this CPU has no bfloat16 arithmetic"),
    ):
        (tmp_path / "cpuinfo").write_text(text)
        found = bf16_blocker(tmp_path / "cpuinfo")
        assert found is blocker or (blocker and str(found).startswith(blocker)), text
    assert "can't be read on" in str(bf16_blocker(tmp_path / "nothing"))


def test_by_hand_is_the_crop_rule_without_its_means() -> None:
    ramp = np.linspace(0, 255, 300)[None, :] * np.linspace(0.2, 1, 200)[:, None]
    frame = np.repeat(ramp[:, :, None], 3, axis=2).astype(np.uint8)
    boxes = np.array([[100.3, 60.6, 130.3, 90.6], [-5.0, -5.0, 25.0, 25.0]])
    wanted = crops_from_frame(as_frame(frame), matrices_from_boxes(boxes, 32, 1.3), 32)
    assert_close(crops_by_hand(frame, boxes, 32, 1.3), wanted, CROP_GREY, "by hand")


def test_crop_path() -> None:
    import cv2

    threads = cv2.getNumThreads()
    result = measure_crop_path(small_scenes(), seconds=0, samples=1, warm_up=0, calls=20)
    assert cv2.getNumThreads() == threads
    assert [(c.faces, c.box, c.size, c.growth_calls) for c in result.cases] == [(1, 20, 32, 20), (9, 20, 32, 2)]
    for case in result.cases:
        assert case.peak_kb > 0
        assert min(t.samples for t in (case.total, case.crop, case.map_back, case.by_hand)) >= 2


def test_boxes_of_a_scene_lie_on_the_frame() -> None:
    one, nine = small_scenes()
    assert one.boxes_xyxy.tolist() == [[140.3, 90.6, 160.3, 110.6]]
    assert len({tuple(box) for box in nine.boxes_xyxy.tolist()}) == 9
    assert (nine.boxes_xyxy >= 0).all()
    assert (nine.boxes_xyxy[:, 2:] <= (300, 200)).all()


def test_profile(bundle: Path) -> None:
    result = profile_bundle(bundle, batches=(1, 3), threads=1, rounds=2, calls=1)
    (file,) = result.files
    assert (result.calls, file.file, file.precision) == (2, "model.fp32.onnx", "fp32")
    assert {kind.kind for kind in file.kinds} == {"Cast", "ReduceMean", "Mul", "Reshape", "Add"}
    assert {kind.kind for kind in file.kinds if kind.nodes == 2} == {"Mul", "Reshape"}  # of the lost score, too
    assert all(len(kind.us_a_face) == 2 for kind in file.kinds)
    assert len(file.nodes) == 7


def test_no_profile_of_a_bundle_without_such_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no ONNX file of precision int8 or fp32; kp export makes fp32"):
        profile_bundle(make_bundle(tmp_path / "half", {"fp16": None}), threads=1)


def test_start(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of process runs once here, and tells the same again."""
    once = functools.cache(lambda *command: run_process([*command]))
    monkeypatch.setattr("benchmarks.start.run_process", lambda command: once(*command))
    result = measure_start(bundle, threads=1, runs=2)
    assert result.file == "model.fp32.onnx"
    quantities = {(t.subject, t.quantity): t for t in result.times}
    for subject in ("kp_runtime", "ONNX Runtime alone"):
        steps = [quantities[subject, step].median.value for step in ("import", "load", "first result")]
        assert sum(steps) == pytest.approx(quantities[subject, "all"].median.value, rel=1e-3)
    assert quantities["kp --help", "whole process"].unit == "ms"


def test_medians_of_processes() -> None:
    (time, memory) = summaries_from_samples({"kp": [{"load": s, "peak memory": 5.0} for s in (0.1, 0.3, 0.2)]})
    assert (time.unit, time.median.value, time.values) == ("ms", pytest.approx(200), [100, 300, 200])
    assert 100 <= time.median.low <= 200 <= time.median.high <= 300
    assert (memory.unit, memory.median.value) == ("MiB", 5)
    assert median_of([2.0, 4.0, 3.0]).value == 3


def test_a_process_that_fails(bundle: Path) -> None:
    with pytest.raises(BackendError, match="failed: ValueError: no"):
        run_process([sys.executable, "-c", "raise ValueError('no')"])
    with pytest.raises(InputError, match="runs must be 2 or more, got 1"):
        measure_start(bundle, threads=1, runs=1)


def test_records_come_back(tmp_path: Path, comparison: Comparison, bundle: Path) -> None:
    record = record_from("engines", bundle, {"threads": 1}, comparison)
    write_record(record, tmp_path / record.file_name)
    (back,) = read_records(tmp_path)
    assert dataclasses.asdict(back) == json.loads(json.dumps(dataclasses.asdict(record)))
    assert record.file_name.endswith("-cores-tiny-engines.json")
    assert record.file_name == record.file_name.lower()
    text = (tmp_path / record.file_name).read_text()
    assert re.search(r"^ +\[\d[\d., e-]*\],?$", text, re.MULTILINE), "a turn stands on one line"
    assert str(bundle.parent) not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read as JSON .*measure again with: make bench"),
        ("[]", "has schema None, this checkout reads schema 1"),
        ('{"schema": 7}', "has schema 7, this checkout reads schema 1; measure again with: make bench"),
        ('{"schema": 1}', "is no benchmark's result"),
        (
            '{"schema":1,"kind":"x","machine":{},"load_average":null,"packages":{},"bundle":{},"settings":{}}',
            "is of kind 'x', not one of engines",
        ),
    ],
)
def test_results_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_record(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_holds_no_results(tmp_path: Path) -> None:
    """Their tables would be wiped from the pages."""
    with pytest.raises(InputError, match=r"there is no folder .*nowhere; name the one that holds the results"):
        read_records(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def records(comparison: Comparison, bundle: Path) -> list[Record]:
    """One of each kind, as they come from the disk."""
    settings = {"threads": 1, "runs": 2}
    crop_path = measure_crop_path(small_scenes(), seconds=0, samples=1, warm_up=0, calls=10)
    profile = profile_bundle(bundle, batches=(1, 3), threads=1, rounds=1, calls=1)
    start = Start("model.fp32.onnx", summaries_from_samples({"kp": [{"load": 0.1}, {"load": 0.2}]}))
    made = [
        record_from("start", bundle, settings, start),
        record_from("crop-path", None, {}, crop_path),
        record_from("operators", bundle, settings, profile),
        record_from("engines", bundle, settings, comparison),
    ]
    return [Record(**json.loads(json.dumps(dataclasses.asdict(record)))) for record in made]


def test_tables_a_section_a_machine(records: list[Record]) -> None:
    other = dataclasses.replace(records[0], machine=records[0].machine | {"instructions": ["abaci", "abaci2"]})
    text = table.tables_from_records([*records, other])
    assert len([line for line in text.splitlines() if line.startswith("## ")]) == 2
    assert re.search(r"^## .+ abaci2, \d+ cores$", text, re.MULTILINE), "another machine, though it has the same name"
    titles = [line for line in text.splitlines() if line.startswith("### ")]
    wanted = [
        "The network in each engine: tiny",
        "Operators by batch: tiny",
        "Everything but the network",
        "Start: tiny",
    ]
    assert titles == [f"### {title}" for title in [*wanted, "Start: tiny"]]
    assert "- OpenVINO bf16: not here" in text
    assert "| kp | load | ms | 150.0 | 100.0 to 200.0 |" in text
    widths = [len(row) for block in text.split("\n\n") for row in [set(map(len, _cells(block)))] if row]
    assert set(widths) == {1}, "a table's rows have as many cells as its head"


def _cells(block: str) -> list[list[str]]:
    return [line.split(" | ") for line in block.splitlines() if line.startswith("|")]


def test_the_page_keeps_its_text(records: list[Record]) -> None:
    page = f"before\n\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    made = table.docs_with_tables(page, records)
    assert made.startswith(f"before\n\n{table.BEGIN}\n\n## ")
    assert made.endswith(f"\n\n{table.END}\nafter\n")
    assert "old" not in made
    assert table.docs_with_tables(made, records) == made
    assert table.NOTHING in table.docs_with_tables(made, [])
    with pytest.raises(InputError, match=r"the page needs the lines .*in this order"):
        table.docs_with_tables("nothing", records)
    with pytest.raises(InputError, match="of kind start lacks or mistakes the field 'times'"):
        table.tables_from_records([dataclasses.replace(records[0], measured={"file": "x"})])


def test_the_tables_are_printed_and_last_the_json_without_samples(
    tmp_path: Path, comparison: Comparison, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(record_from("engines", bundle, {}, comparison), tmp_path / "a.json")
    *shown, text = capsys.readouterr().out.splitlines()
    assert "### The network in each engine: tiny" in shown
    last = json.loads(text)
    assert last["measured"]["cases"][0]["time"]["samples"] >= 2
    assert "turns_ms" not in last["measured"]["cases"][0]
    assert read_record(tmp_path / "a.json").measured["cases"][0]["turns_ms"]


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        checked_threads(0)

    with pytest.raises(SystemExit, match="1"):
        run(fail)
    assert capsys.readouterr().err.startswith("benchmarks: threads must be 1 to ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module(f"benchmarks.{script}")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    assert f"python -m benchmarks.{script}" in capsys.readouterr().out
