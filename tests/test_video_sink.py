"""What is written of a moving picture: videos that last as long as it, and files that stay whole on full disks."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from kp_runtime.errors import InputError, KpError, MissingExtraError
from kp_runtime.track import Track
from kp_runtime.video import run_video
from kp_runtime.video_sink import LinesSink, Sink, VideoSink, open_sinks
from kp_runtime.video_source import FolderSource, VideoFrame
from tests.test_video import SIZE_HW, folder_of_frames, levels, one_face, picture, sinks_for


def test_a_video_by_the_clock_lasts_as_long_as_what_it_shows(tmp_path: Path) -> None:
    sink = VideoSink(tmp_path / "a.avi", "MJPG", 10.0, SIZE_HW, by_clock=True)
    for index, seconds in enumerate((0.0, 0.2, 0.21, 0.5)):
        frame = VideoFrame(index, seconds, picture(50 * index))
        sink.write(frame, (), frame.image)
    sink.close()
    assert levels(tmp_path / "a.avi") == pytest.approx([0, 0, 50, 100, 100, 150], abs=3)


def test_a_files_uneven_frames_are_repeated_and_none_is_left_out(tmp_path: Path) -> None:
    sink = VideoSink(tmp_path / "a.avi", "MJPG", 10.0, SIZE_HW, by_clock=False)
    times = (0.0, 0.3, 0.31, 0.5, 500.0, 500.1, 500.3)  # a minute is no pause between two frames
    for index, seconds in enumerate(times):
        frame = VideoFrame(index, seconds, picture(40 * index))
        sink.write(frame, (), frame.image)
    sink.close()
    assert levels(tmp_path / "a.avi") == pytest.approx([0, 0, 0, 40, 80, 120, 160, 200, 200, 240], abs=3)


def test_a_slow_encoder_shortens_a_live_video_and_does_not_hold_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 frames a second, where the camera says 30: repeats take no more than half of the time that they fill."""
    clock, said = [0.0], list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    class Slow:
        def __init__(self, writer: cv2.VideoWriter) -> None:
            self.writer, self.release = writer, writer.release

        def write(self, image: np.ndarray) -> None:
            clock[0] += 1 / 20
            self.writer.write(image)

    (sink,) = open_sinks(["avi"], tmp_path, "a", rate=30, size_hw=SIZE_HW, live=True, say=said.append)
    assert isinstance(sink, VideoSink)
    sink._writer = Slow(sink._writer)
    times = []
    while clock[0] < 20:
        times.append(clock[0])
        sink.write(VideoFrame(len(times), clock[0], picture(7)), (), picture(7))
    assert max(np.diff(times)) < 0.2
    sink.write(VideoFrame(len(times), clock[0] + 50, picture(7)), (), picture(7))  # it was away
    assert clock[0] - times[-1] < 6
    times.append(clock[0] + 600)
    sink.write(VideoFrame(len(times), times[-1], picture(7)), (), picture(7))  # for long
    assert clock[0] < 26
    sink.close()
    short = round(times[-1] - len(levels(sink.path)) / 30)
    assert said == [
        f"{sink.path} is {short} s shorter than what it shows: pauses of over a minute are left out, "
        "and what the encoder was too slow for"
    ]


@pytest.mark.parametrize("rate", [66.457, 119.88, 239.794, 333.333, 999.9])
def test_rates_of_slow_motion(tmp_path: Path, rate: float) -> None:
    sink = VideoSink(tmp_path / "a.mp4", "mp4v", rate, SIZE_HW, by_clock=False)
    for index in range(5):
        sink.write(VideoFrame(index, index / rate, picture(index)), (), picture(index))
    sink.close()
    assert len(levels(tmp_path / "a.mp4")) == 5


def test_nothing_to_write_makes_no_folder(tmp_path: Path) -> None:
    assert open_sinks([], tmp_path / "out", "a", rate=25, size_hw=SIZE_HW, live=False) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such locks")
def test_what_killed_runs_left_beside_the_target_is_cleared_and_what_others_write_is_not(tmp_path: Path) -> None:
    """Whoever else writes may have this process' number, in another container."""
    stem = ".a[1]_keypoints"
    kept = [f"{stem}.1.tmp.mp4", f"{stem}.2.tmp.avi", f"{stem}.2.tmp.avi.lock", f".b{stem}.1.tmp.mp4.lock", "a1.lock"]
    left = [f"{stem}.{end}" for end in ("3.tmp.mp4", "3.tmp.mp4.lock", "4.tmp.jsonl.lock")]
    for name in (*kept, *left):
        (tmp_path / name).touch()
    others = open_sinks(["mp4", "jsonl"], tmp_path, "a[1]", rate=25, size_hw=SIZE_HW, live=False)
    assert not {path.name for path in tmp_path.iterdir()} & set(left)
    for sink in open_sinks(["mp4", "jsonl"], tmp_path, "a[1]", rate=25, size_hw=SIZE_HW, live=False):
        sink.close(keep=False)
    for sink in others:
        sink.write(VideoFrame(0, 0, picture(1)), (), picture(1))
        sink.close()
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "a[1]_keypoints.mp4", "a[1]_keypoints.jsonl"}


def test_a_disk_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))))
    sink = LinesSink(tmp_path / "a.jsonl")
    sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_two_runs_of_one_process_number_share_no_temporary_file(tmp_path: Path) -> None:
    """As in two containers, each of whose programs is process 1: the file is of the one that ends last, and whole."""
    sinks = [open_sinks(["jsonl"], tmp_path, "a", rate=25, size_hw=SIZE_HW, live=True)[0] for _ in range(2)]
    track = Track(1, np.zeros(4), np.zeros((68, 2), np.float32), 0.1)
    for sink, frames in zip(sinks, (5, 2), strict=True):
        for index in range(frames):
            sink.write(VideoFrame(index, 0, picture(1)), (track,), None)
        sink.close()
        assert len((tmp_path / "a_keypoints.jsonl").read_text().splitlines()) == frames


def test_a_name_as_long_as_a_file_can_have(tmp_path: Path) -> None:
    stem = "é" * 120  # 240 bytes, and 14 of _keypoints.mp4: 255 are taken
    sinks = open_sinks(["mp4", "jsonl"], tmp_path, stem[:-1], rate=25, size_hw=SIZE_HW, live=False)
    for sink in sinks:
        sink.write(VideoFrame(0, 0, picture(1)), (), picture(1))
        sink.close()
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem[:-1]}_keypoints.{kind}" for kind in ("mp4", "jsonl")}


def test_outputs_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = FolderSource(folder_of_frames(tmp_path / "frames", 2))
    with pytest.raises(KpError, match=r"can't write into .*file: .*; name another folder with --out"):
        sinks_for(source, tmp_path / "file", "mp4")
    with pytest.raises(KpError, match=r"can't write the video .*gone/a.mp4"):
        VideoSink(tmp_path / "gone" / "a.mp4", "mp4v", 30, SIZE_HW, by_clock=False)
    with pytest.raises(KpError, match=r"can't write .*gone/a.jsonl: No such file"):
        LinesSink(tmp_path / "gone" / "a.jsonl")
    with pytest.raises(InputError, match="there is no format 'gif'; choose from mp4, avi, jsonl, parquet"):
        sinks_for(source, tmp_path, "gif")


class FullDisk:
    """A file on a disk that takes `room` bytes and no more."""

    def __init__(self, path: Path, room: int) -> None:
        self.file, self.room = open(path, "wb", buffering=0), room  # noqa: SIM115 - open until close()

    def write(self, data: bytes) -> int:
        taken = self.file.write(data[: max(0, self.room - self.file.tell())])
        if taken < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return taken

    def flush(self) -> None:
        pass

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        self.file.close()

    @property
    def closed(self) -> bool:
        return self.file.closed


def on_a_full_disk(sink: Sink, room: int) -> Sink:
    """The same sink of lines, on such a disk."""
    assert isinstance(sink, LinesSink)
    sink._file.close()
    sink._file = FullDisk(sink._temporary.path, room)  # type: ignore[assignment]
    return sink


def test_lines_on_a_full_disk_end_with_a_whole_frame_and_the_other_files_go_on_to_there(tmp_path: Path) -> None:
    source = FolderSource(folder_of_frames(tmp_path / "frames"))
    lines, pictures = sinks_for(source, tmp_path, "jsonl", "avi")
    run_video(source, one_face(), sinks_for(source, tmp_path / "whole", "jsonl"))
    whole = (tmp_path / "whole" / "frames_keypoints.jsonl").read_bytes()
    with pytest.raises(KpError, match=r"can't write .*frames_keypoints.jsonl: No space left") as raised:
        run_video(source, one_face(), [on_a_full_disk(lines, len(whole) // 2 + 100), pictures])
    assert "it ends with the last frame that fitted; 4 frames are in" in str(raised.value)
    assert str(raised.value).count(".jsonl") == 1  # among the files that hold these frames it is not
    assert lines.path.read_bytes() == whole[: len(whole) // 2]  # all rows are of one length but for the time's digits
    assert len(levels(pictures.path)) == 4
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_is_full_from_the_first_frame_on_leaves_the_older_files(tmp_path: Path) -> None:
    source = FolderSource(folder_of_frames(tmp_path / "frames"))
    for name in ("jsonl", "avi"):
        (tmp_path / f"frames_keypoints.{name}").write_text("older")
    lines, pictures = sinks_for(source, tmp_path, "jsonl", "avi")
    with pytest.raises(KpError, match=r"can't write .*jsonl: No space left on device$"):
        run_video(source, one_face(), [on_a_full_disk(lines, 10), pictures])
    assert lines.path.read_text() == pictures.path.read_text() == "older"
    assert not list(tmp_path.glob(".*"))


def test_a_sink_that_breaks_off_does_not_keep_the_others_open(tmp_path: Path) -> None:
    class Broken:
        path, pictures = tmp_path / "none", False

        def write(self, *frame: object) -> None:
            pass

        def close(self, keep: bool = True) -> None:
            raise RuntimeError("not foreseen")

    source = FolderSource(folder_of_frames(tmp_path / "frames"))
    with pytest.raises(RuntimeError, match="not foreseen"):
        run_video(source, one_face(), [Broken(), *sinks_for(source, tmp_path, "avi")])
    assert len(levels(tmp_path / "frames_keypoints.avi")) == 6


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    source = FolderSource(folder_of_frames(tmp_path / "frames", 2))
    with pytest.raises(MissingExtraError, match=r"pip install 'kp-edge\[parquet\]'"):
        sinks_for(source, tmp_path, "parquet")


@pytest.mark.parametrize(
    ("kind", "rate", "size_hw", "message"),
    [
        ("mp4", 30, (16, 8192), r"of 8192 x 16 px at 30 frames/s; .* a side may have 8191 px here"),
        ("avi", 30, (70_000, 16), r"of 16 x 70000 px at 30 frames/s; .* a side may have 65500 px here"),
        ("mp4", 0.001, (16, 16), r"of 16 x 16 px at 0\.001 frames/s; .* the rate be 0\.01 and more"),
        ("avi", 0.001, (16, 16), r"of 16 x 16 px at 0\.001 frames/s; .* the rate be 0\.01 and more"),
    ],
)
def test_a_sink_that_can_not_be_opened_leaves_nothing_of_the_others(
    tmp_path: Path, kind: str, rate: float, size_hw: tuple[int, int], message: str
) -> None:
    """Nor does it end the process, as OpenCV 4.5.4 does for what its encoders refuse."""
    with pytest.raises(KpError, match=rf"can't write the video .*{message}"):
        open_sinks(["jsonl", kind], tmp_path, "odd", rate=rate, size_hw=size_hw, live=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("room", "told"), [(3, "a.avi has 3 of the 5 frames"), (0, "a.avi: it would have none of")])
def test_a_video_that_is_not_whole_is_said(tmp_path: Path, room: int, told: str) -> None:
    """OpenCV does not tell of a full disk."""

    class Full:
        def __init__(self, writer: cv2.VideoWriter) -> None:
            self.writer, self.room = writer, room

        def write(self, image: np.ndarray) -> None:
            if self.room:
                self.room -= 1
                self.writer.write(image)

        def release(self) -> None:
            self.writer.release()

    sink = VideoSink(tmp_path / "a.avi", "MJPG", 10.0, SIZE_HW, by_clock=False)
    sink._writer = Full(sink._writer)
    for index in range(5):
        sink.write(VideoFrame(index, index / 10, picture(0)), (), picture(0))
    with pytest.raises(KpError, match=rf"{told}.* is the disk full\?"):
        sink.close()
    assert len(levels(tmp_path / "a.avi")) == 3 if room else not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["avi", "mp4"])
def test_a_video_ends_while_its_disk_has_room_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = FolderSource(folder_of_frames(tmp_path / "frames"))
    free = [4 << 20] * 3 + [1 << 20] * 9
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Mock(total=9 << 20, free=free.pop(0)))
    told = r"keypoints.{0}: its disk is nearly full, 1.0 MB are left; it ends with the last frame that fitted".format
    with pytest.raises(KpError, match=told(kind)):
        run_video(source, one_face(), sinks_for(source, tmp_path, kind))
    assert len(levels(tmp_path / f"frames_keypoints.{kind}")) == 3


def test_a_video_whose_head_tells_no_frames_keeps_those_that_can_be_read(tmp_path: Path) -> None:
    """As an AVI's on a disk that was full before it had its end."""
    sink = VideoSink(tmp_path / "a.avi", "MJPG", 10.0, SIZE_HW, by_clock=False)
    for index in range(200):
        noise = np.random.default_rng(index).integers(0, 255, (*SIZE_HW, 3), np.uint8)
        sink.write(VideoFrame(index, index / 10, noise), (), noise)
    data = sink._temporary.path.read_bytes()
    sink._writer.release()
    sink._writer = Mock()
    sink._temporary.path.write_bytes(data)
    with pytest.raises(KpError) as raised:
        sink.close()
    assert f"a.avi has {len(levels(sink.path))} of the 200 frames" in str(raised.value)
    assert len(levels(sink.path)) > 100


@pytest.mark.parametrize(("live", "frames"), [(True, 1), (False, 3)])
def test_frames_that_come_too_fast_are_left_out_of_a_live_video_alone(tmp_path: Path, live: bool, frames: int) -> None:
    (sink,) = open_sinks(["avi"], tmp_path, "a", rate=10, size_hw=SIZE_HW, live=live)
    for index in range(3):
        sink.write(VideoFrame(index, index / 1000, picture(0)), (), picture(0))
    sink.close()
    assert len(levels(sink.path)) == frames


def test_a_format_that_is_named_twice_is_written_once(tmp_path: Path) -> None:
    sinks = open_sinks(["jsonl", "avi", "jsonl"], tmp_path, "a", rate=10, size_hw=SIZE_HW, live=False)
    for sink in sinks:
        sink.close(keep=False)
    assert [sink.path.suffix for sink in sinks] == [".jsonl", ".avi"]


def test_lines_can_be_read_as_they_come(tmp_path: Path) -> None:
    sink, track = LinesSink(tmp_path / "a.jsonl"), Track(1, np.zeros(4), np.zeros((68, 2), np.float32), 0.123456)
    (file,) = tmp_path.glob("*.jsonl")
    for index in range(3):
        sink.write(VideoFrame(index, index / 3, picture(0)), (track,), None)
        lines = file.read_bytes().splitlines()
        assert len(lines) == index + 1
    row = json.loads(lines[1])
    assert (row["time"], row["lost_score"]) == (0.333333, 0.12346)
    sink.close()
