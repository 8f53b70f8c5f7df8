"""`kp run` as a person types it: files, Ctrl-C in a child process, errors of one line; and the Parquet file."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_cli.options import load_model
from kp_cli.report import frames_progress, note
from kp_runtime.errors import KpError
from kp_runtime.track import Track
from kp_runtime.video import run_video
from kp_runtime.video_sink import ParquetSink
from kp_runtime.video_source import FileSource, FolderSource, VideoFrame
from tests.test_cli import kp
from tests.test_report import Terminal
from tests.test_video import folder_of_frames, levels, one_face, picture, sinks_for, video
from tests.test_video_sink import FullDisk

ROOT = Path(__file__).resolve().parents[1]
ENDLESS = """
import sys, numpy as np
import kp_cli, kp_runtime.video_source as sources

class Endless:
    name, stem, live, rate, count, size_hw = "endless", "endless", False, 30.0, None, (96, 128)
    def __iter__(self):
        index = 0
        while True:
            if index == 20:
                print("ready", flush=True)
            yield sources.VideoFrame(index, index / 30, np.full((96, 128, 3), 90, np.uint8))
            index += 1

sources.open_source = lambda text, **options: Endless()
sys.argv = ["kp", "run", "x", *sys.argv[1:]]
kp_cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_ctrl_c_finishes_the_files(bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as by nohup, and so by the run")
    words = ["--model", bundle, "--out", tmp_path, "--format", "mp4", "--format", "jsonl", "--threads", "1"]
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "")
    first, *files = out.splitlines()
    assert first.startswith("endless: ")
    assert ", stopped, " in first
    assert [Path(file).name for file in files] == ["endless_keypoints.mp4", "endless_keypoints.jsonl"]
    written = levels(tmp_path / "endless_keypoints.mp4")
    assert f"endless: {len(written)} frames" in first
    assert len(written) >= 15
    assert not list(tmp_path.glob(".*"))


def test_ctrl_c_is_the_end_of_a_camera(bundle: Path, tmp_path: Path) -> None:
    """It has no other, so nothing is amiss."""
    camera = ENDLESS.replace('"endless", False', '"endless", True').replace(
        "            yield", "            time.sleep(0.01); yield"
    )
    words = ["--model", bundle, "--out", tmp_path, "--format", "jsonl", "--threads", "1"]
    child = subprocess.Popen(
        [sys.executable, "-c", "import time\n" + camera, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert ", stopped, " in out


def test_run_writes_and_tells(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    path = video(tmp_path / "talk.avi", 1)
    status, out, err = kp(capsys, "run", path, "--model", bundle, "--out", tmp_path / "out")
    assert re.match(
        re.escape(f"{path}: 1 frame, ") + r".* frames/s, 0 tracks, detector on 1 frame$", out.splitlines()[0]
    )
    path = video(tmp_path / "talk.avi", 12)
    status, out, err = kp(capsys, "run", path, "--model", bundle, "--out", tmp_path / "out")
    assert (status, err) == (0, "")
    assert out.splitlines()[0].startswith(f"{path}: 12 frames, ")
    assert [Path(line).name for line in out.splitlines()[1:]] == ["talk_keypoints.mp4", "talk_keypoints.jsonl"]
    status, out, _ = kp(
        capsys,
        "run",
        path,
        "--model",
        bundle,
        "--out",
        tmp_path / "out",
        "--format",
        "parquet",
        "--no-smooth",
        "--json",
    )
    assert status == 0
    assert json.loads(out)["frames"] == 12
    assert json.loads(out)["files"] == [str(tmp_path / "out" / "talk_keypoints.parquet")]


@pytest.mark.parametrize(("cores", "words", "threads"), [(3, (), 2), (1, (), 1), (3, ("--threads", "1"), 1)])
def test_a_core_is_left_to_the_other_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path, tmp_path: Path,
    cores: int, words: tuple[str, ...], threads: int,
) -> None:  # fmt: skip
    taken, before = [], cv2.getNumThreads()

    def load(*args: object) -> object:
        opened = load_model(*args)  # type: ignore[arg-type]
        taken.append(opened.backend.threads)
        return opened

    monkeypatch.setattr("kp_cli.video.load_model", load)
    monkeypatch.setattr("kp_runtime.cores.default_threads", lambda: cores)
    try:
        video(tmp_path / "talk.avi", 2)
        status, *_ = kp(capsys, "run", tmp_path / "talk.avi", "--model", bundle, "--out", tmp_path, *words)
        assert (status, taken, cv2.getNumThreads()) == (0, [threads], threads)
    finally:
        cv2.setNumThreads(before)


def test_what_a_source_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    told: dict[str, object] = {}

    def open_source(text: str, **given: object) -> None:
        told.update(given, text=text)
        raise KpError("enough")

    monkeypatch.setattr("kp_runtime.video_source.open_source", open_source)
    assert kp(capsys, "run", "0", "--model", bundle, "--fps", 12, "--patience", 3)[0] == 1
    stop = told.pop("stop")
    assert isinstance(stop, threading.Event)
    assert told == {"text": "0", "rate": 12, "patience": 3, "say": note}


def test_what_a_model_and_the_files_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path, tmp_path: Path
) -> None:
    """A tuned model has threads of its own; the columns are of the model's points."""
    told: list[object] = []

    def load(model: Path, tuned: Path | None, backend: str, threads: int | None, key: None) -> object:
        told.append(threads)
        return load_model(model, None, backend, 1, key)

    def open_sinks(*_: object, points: int = 0, **__: object) -> None:
        told.append(points)
        raise KpError("enough")

    monkeypatch.setattr("kp_cli.video.load_model", load)
    monkeypatch.setattr("kp_runtime.video_sink.open_sinks", open_sinks)
    video(tmp_path / "talk.avi", 2)
    words = ("run", tmp_path / "talk.avi", "--model", bundle, "--tuned", tmp_path / "tuned.json")
    assert kp(capsys, *words) == (1, "", "kp: enough\n")
    assert told == [None, 68]


def test_metrics_are_served_or_the_run_does_not_begin(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip(
        "prometheus_client", reason="prometheus_client, which the metrics are made with, is not installed"
    )
    words = ("run", folder_of_frames(tmp_path / "frames", 2), "--model", bundle, "--out", tmp_path / "out", "--metrics")
    status, _, err = kp(capsys, *words, "0")
    assert status == 0
    assert re.fullmatch(r"metrics: http://127\.0\.0\.1:\d+/metrics\n", err)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, _, err = kp(capsys, *words, str(taken.getsockname()[1]))
    assert status == 1
    assert re.fullmatch(r"kp: metrics can't be served at .*; name another port\n", err)
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing.mp4",), "there is no video"),
        (("FRAMES", "--format", "gif"), "there is no format 'gif'"),
        (("FRAMES", "--fps", "0"), "the frame rate must be over 0"),
        (("FRAMES", "--metrics", "here"), "metrics are served at PORT or HOST:PORT"),
        (("EMPTY",), "has no frame that can be read"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    places = {"FRAMES": folder_of_frames(tmp_path / "frames", 2), "EMPTY": tmp_path / "empty.mp4"}
    status, out, err = kp(
        capsys, "run", *(places.get(word, word) for word in words), "--model", bundle, "--out", tmp_path
    )
    assert (status, out) == (1, "")
    assert err.startswith("kp: ")
    assert message in err
    assert err.count("\n") == 1


def test_closing_the_window_is_an_end_like_any_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path, tmp_path: Path
) -> None:
    class Closed:
        def __init__(self, title: str) -> None: ...

        def show(self, shown: object) -> bool:
            return False

        def close(self) -> None: ...

    monkeypatch.setattr("kp_runtime.video.Window", Closed)
    frames = folder_of_frames(tmp_path / "frames", 20)
    status, out, err = kp(capsys, "run", frames, "--show", "--model", bundle, "--out", tmp_path / "out")
    assert (status, err) == (0, "")
    assert ", stopped, " in out
    assert not (tmp_path / "out").exists()


def test_progress_tells_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with frames_progress("talk[/b].mp4", 200) as step:
        step(50)
        step(100)
    shown = terminal.getvalue()
    assert "talk[/b].mp4" in shown
    assert "100/200" in shown
    assert re.search(r"\d\.\d frames/s", shown)


def test_parquet_holds_what_json_lines_hold(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    source = FolderSource(folder_of_frames(tmp_path / "frames"))
    run = run_video(source, one_face(), sinks_for(source, tmp_path, "jsonl", "parquet"))
    lines = [json.loads(line) for line in run.files[0].read_text().splitlines()]
    table = parquet.read_table(run.files[1])
    rows = table.to_pylist()
    assert len(rows) == len(lines) == 6
    assert table.schema.names == list(lines[0])
    for row, line in zip(rows, lines, strict=True):
        assert (row["time"], row["frame"], row["track"]) == (line["time"], line["frame"], line["track"])
        for name in ("box_xyxy", "keypoints_xy", "lost_score"):
            np.testing.assert_allclose(row[name], line[name], rtol=1e-6)


def test_a_run_without_a_frame_leaves_an_older_result_alone(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path, stop = video(tmp_path / "a.avi", 5), threading.Event()
    formats, source = ("avi", "jsonl", "parquet"), FileSource(path)
    first = run_video(source, one_face(), sinks_for(source, tmp_path, *formats))
    before = {file: file.read_bytes() for file in first.files}
    assert len(before) == 3
    stop.set()
    again = FileSource(path)
    assert run_video(again, one_face(), sinks_for(again, tmp_path, *formats), stop=stop).files == ()
    assert {file: file.read_bytes() for file in before} == before
    assert not list(tmp_path.glob(".*"))


def test_parquet_of_more_rows_than_go_to_the_disk_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    monkeypatch.setattr("kp_runtime.video_sink._ROWS_AT_ONCE", 4)
    sink, track = ParquetSink(tmp_path / "a.parquet"), Track(1, np.zeros(4), np.zeros((68, 2), np.float32), 0.1)
    for index in range(10):
        sink.write(VideoFrame(index, index / 30, picture(0)), (track,), None)
    sink.close()
    assert parquet.read_table(tmp_path / "a.parquet").column("frame").to_pylist() == list(range(10))


def test_a_parquet_file_without_faces_is_whole(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    from kp_runtime.video_sink import ParquetSink

    sink = ParquetSink(tmp_path / "a.parquet")
    sink.close()
    assert parquet.read_table(tmp_path / "a.parquet").num_rows == 0


def test_moving_astronaut_on_720p_keeps_the_detector_idle(
    capsys: pytest.CaptureFixture[str], astronaut: Path, tmp_path: Path
) -> None:
    photo = cv2.imread(str(astronaut))
    path = tmp_path / "face.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 30, (1280, 720))
    for t in np.arange(60) / 30:
        zoom = 0.9 + 0.2 * np.sin(t)
        place = np.array([[zoom, 0, 380 + 250 * np.sin(0.9 * t)], [0, zoom, 120 + 80 * np.cos(1.3 * t)]])
        ground = np.full((720, 1280, 3), 120, np.uint8)
        writer.write(cv2.warpAffine(photo, place, (1280, 720), dst=ground, borderMode=cv2.BORDER_TRANSPARENT))
    writer.release()
    words = ("--model", "engines/resnet18-68-lite", "--out", tmp_path, "--format", "jsonl", "--json")
    status, out, _ = kp(capsys, "run", path, *words)
    run = json.loads(out)
    assert (status, run["frames"], run["faces"]) == (0, 60, 1)
    assert run["detector_runs"] <= 0.05 * 60
    rows = [json.loads(line) for line in (tmp_path / "face_keypoints.jsonl").read_text().splitlines()]
    assert [(row["frame"], row["track"]) for row in rows] == [(i, 1) for i in range(60)]


@pytest.mark.parametrize("rows", [1, 1000])  # a row each reaches the disk, or all at the end
def test_parquet_on_a_full_disk_leaves_the_older_file_and_closes_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("kp_runtime.video_sink._ROWS_AT_ONCE", rows)
    source = FolderSource(folder_of_frames(tmp_path / "frames"))
    (tmp_path / "frames_keypoints.parquet").write_text("older")
    table, pictures = sinks_for(source, tmp_path, "parquet", "avi")
    assert isinstance(table, ParquetSink)
    table._writer.close()
    disk = FullDisk(table._temporary.path, 2000)
    table._writer = pq.ParquetWriter(pa.PythonFile(disk, "w"), table._schema)
    with pytest.raises(KpError, match=r"can't write .*frames_keypoints.parquet: .*No space left"):
        run_video(source, one_face(), [table, pictures])
    disk.close()
    assert table.path.read_text() == "older"
    assert rows == 1 or len(levels(pictures.path)) == 6
    assert not list(tmp_path.glob(".*"))
