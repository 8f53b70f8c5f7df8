"""docs/scale.md: its tables are what the script makes of the results, and the script reckons rightly."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import scale, stages
from benchmarks.record import RESULTS, Record, read_records, record_from
from benchmarks.scale import Costs, Way, scale_page, streams_held
from benchmarks.stages import Case, Planned, Stages, cases_of, frames_of, h264_clip, measure_stages, scene
from kp_runtime.backend_by_name import open_backend
from kp_runtime.detect import HaarDetector
from kp_runtime.errors import InputError, KpError
from kp_runtime.timing import summary_from_turns

PAGE = f"before\n{scale.BEGIN}\nold\n{scale.END}\nafter"


def case(stage: str, what: str, ms: float, faces: int = 0, size: float | None = None) -> Case:
    time = summary_from_turns([[ms / 1e3]])
    return Case(stage, what, faces, size, summary_from_turns([[1.0]]), time)


def stages_record(**ms: float) -> Record:
    """Stages of round numbers: 2 + 60 / 30 + 0.5 + 8 ms a frame with one face."""
    known = {"decode": 2.0, "detect": 60.0, "crop": 0.5, "network": 8.0} | ms
    cases = [
        case("decode", "H.264 720p", known["decode"], size=10_000.0),
        case("detect", "own 720p", known["detect"]),
        *(case("crop", "112 px", known["crop"] * n, n) for n in (1, 8)),
        *(case("network", "int8", known["network"] * n, n) for n in (1, 8)),
    ]
    made = record_from("stages", None, {"file": "model.int8.onnx"}, Stages(cases, {}))
    return dataclasses.replace(made, bundle={"name": "net", "size": 112})


def engines_record(kind: str = "engines", **device: Any) -> Record:
    cases = [
        {"engine": "ONNX Runtime", "precision": "int8", "batch": batch, "ms_a_face": ms, "what": "plan fp16",
         "time": {"p50_ms": ms * batch}}
        for batch, ms in ((1, 5.0), (8, 4.0), (32, 4.5))
    ]  # fmt: skip
    made = record_from("engines", None, {}, Stages([], {}))
    machine = made.machine | {"cpu": "A Processor", "instructions": [], "cores_usable": 4}
    return dataclasses.replace(
        made, kind=kind, machine=machine, bundle={"name": "net"}, measured={"cases": cases, **device}
    )


def test_docs_show_the_results() -> None:
    text = scale.DOCS.read_text(encoding="utf-8")
    assert scale_page(text, read_records(RESULTS)) == text, "run: python -m benchmarks.scale"


def test_faces_a_second_and_hours_a_million() -> None:
    """At 4 ms a face 250 faces a second, and a million take 4000 s, 1.11 hours."""
    assert [*scale._faces_rows([engines_record(), stages_record()])] == [
        ("A Processor, 4 cores", "net", "int8", "ONNX Runtime", 8, "250", pytest.approx(1 / 0.9))
    ]
    printed = scale._costs_at(0.1, [engines_record(), stages_record()])
    assert "| 250 | 0.1111 |" in printed
    # a frame costs 12.5 ms of one of the machine's cores
    a_core = 0.1 / stages_record().machine["cores_usable"]
    assert f"| {scale.STREAM} | {12.5 / 3.6 * a_core:.4f} |" in printed


def test_a_network_that_sees_fewer_pixels_is_told_from_its_namesake() -> None:
    """The 224 px model that shipped first saw means of 2 x 2 pixels, and is four times as fast."""
    record = dataclasses.replace(engines_record(), bundle={"name": "net", "reduce": 2})
    assert [row[1] for row in scale._faces_rows([record])] == ["net, means of 2 x 2"]


def test_a_gpu_that_was_measured_has_its_row() -> None:
    gpu = engines_record("gpu-network", device={"name": "A GPU"})
    assert [*scale._faces_rows([gpu])] == [("A GPU", "net", "", "plan fp16", 8, "250", pytest.approx(1 / 0.9))]
    for records, told in (([gpu, stages_record()], False), ([engines_record()], True)):
        told_of = [text for text in itertools.islice(scale._sections(records), 4) if "GPUs: not measured" in text]
        assert bool(told_of) == told


def test_what_a_frame_costs() -> None:
    costs = Costs(stages_record())
    way = Way("H.264 720p", "own 720p", 30, 4)
    assert costs.stages(way) == pytest.approx({"decode": 2, "detect": 2, "crop": 2, "network": 32})
    gpu = dataclasses.replace(way, host_only=True)
    assert costs.stages(gpu)["network"] == 0
    assert scale._frame_row(way, costs)[-4:] == ("38.0", "26", "10.6", "network, 84%")
    assert not costs.known(dataclasses.replace(way, detect="Haar 720p"))


def test_streams_that_a_machine_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame costs 12.5 ms: two cores could do 160 a second, ten streams; of one with nothing lumpy all are held."""
    costs = Costs(stages_record())
    assert scale._bound(costs, scale.STREAM, 2) == pytest.approx(2e3 / 12.5 / 15)
    assert 1 <= streams_held(costs, scale.STREAM, 2) <= 10
    even = Costs(stages_record(detect=0.03))
    assert streams_held(even, scale.STREAM, 2) == int(2e3 / 10.5 / 15)
    monkeypatch.setattr(scale, "CORES", (1, 2))
    assert streams_held(Costs(stages_record(network=900.0)), scale.STREAM, 2) == 0
    row = scale._streams_row(1000, even)
    assert row[2] == f"{-(-1000 // streams_held(even, scale.STREAM, 2)):,}"
    assert float(row[4]) == pytest.approx(1000 * 15 * 10_000 * 8 / 1e9)
    assert float(row[3].replace(",", "")) == pytest.approx(1000 * 15 * 0.0105 * 24, rel=0.01)


def test_without_a_result_there_is_no_plan() -> None:
    with pytest.raises(InputError, match=r"no result of kind stages; measure with: python -m benchmarks.stages"):
        scale_page(PAGE, [engines_record()])
    with pytest.raises(InputError, match="the page needs the lines"):
        scale_page("nothing", [stages_record()])
    with pytest.raises(InputError, match="a price is over 0, got nan"):
        scale._costs_at(float("nan"), [])


def test_costs_are_printed_and_the_page_stays(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(sys, "argv", ["scale", "--docs", str(page), "--price", "2"])
    scale.main()
    assert re.search(r"\| cost of a million \|\n(\| --- )+\|\n\| AMD EPYC \w+, 2 cores", capsys.readouterr().out)
    assert page.read_text() == PAGE
    monkeypatch.setattr(sys, "argv", ["scale", "--docs", str(page)])
    monkeypatch.setattr(scale, "_sections", lambda records: ["new", "parts"])
    scale.main()
    assert page.read_text() == PAGE.replace("old", "\nnew\n\nparts\n")


def test_the_scene_has_a_face_that_moves() -> None:
    first, later = scene((720, 1280)), scene((720, 1280), 1.0)
    assert (first.shape, first.dtype) == ((720, 1280, 3), np.uint8)
    boxes = [HaarDetector(smallest=0.1)(frame) for frame in (first, later)]
    assert all(len(found) == 1 for found in boxes)
    assert np.abs(boxes[0] - boxes[1]).max() > 50


def test_stages_are_measured_with_their_processor_time() -> None:
    def busy() -> None:
        sum(range(200_000))

    done = measure_stages([Planned("decode", "work", 0, 5.0, busy)], seconds=0, samples=3)
    (found,) = done
    assert found.bytes == 5.0
    assert found.cpu.samples == found.time.samples >= 3
    assert found.cpu.p50_ms > 0


def test_what_cannot_be_measured_is_left_out(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, astronaut: Path
) -> None:
    monkeypatch.setattr(stages.shutil, "which", lambda name: None)
    monkeypatch.setattr(stages, "SIZES_HW", ((120, 160),))
    left_out: dict[str, str] = {}
    planned = list(cases_of(open_backend(bundle, "ort-cpu", threads=1), None, tmp_path, left_out))
    assert [(p.stage, p.what, p.faces) for p in planned] == [
        ("decode", "JPEG 120p", 0),
        ("detect", "own 120p", 0),
        ("detect", "Haar 120p", 0),
        *((stage, what, faces) for faces in (1, 8) for stage, what in (("crop", "64 px"), ("network", "fp32"))),
    ]
    assert list(left_out) == ["H.264 120p", "YuNet"]
    assert [np.shape(p.call()) for p in planned if p.stage in ("decode", "network")] == [
        (120, 160, 3),
        (1, 68, 2),
        (8, 68, 2),
    ]


def test_a_clip_is_decoded_over_and_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "CLIP_FRAMES", 3)
    if stages.shutil.which("ffmpeg") is None:
        pytest.skip("the command ffmpeg, which makes the clip, is not installed")
    call = frames_of(h264_clip(tmp_path / "clip.mp4", (120, 160)))
    assert [np.shape(call()) for _ in range(7)] == [(120, 160, 3)] * 7
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(KpError, match=r"OpenCV can't decode bad.mp4"):
        frames_of(tmp_path / "bad.mp4")()
    with pytest.raises(KpError, match=r"ffmpeg made no H\.264"):
        h264_clip(tmp_path / "none" / "clip.mp4", (120, 160))
