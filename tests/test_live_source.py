"""Cameras and streams: how they are opened, and how they come back when they went away."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_runtime.errors import ImageError
from kp_runtime.video_source import VideoFrame, open_source
from tests.test_video import Camera, live, take


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between two tries take no time; how long they would have been, on a clock that they move."""
    waits: list[float] = []

    def wait(self: threading.Event, seconds: float | None = None) -> bool:
        waits.append(seconds or 0)
        return self.is_set()

    monkeypatch.setattr(threading.Event, "wait", wait)
    monkeypatch.setattr(time, "monotonic", lambda: sum(waits))
    return waits


class Steady(Camera):
    """One that gives a frame each 4 s of that clock."""

    def __init__(self, clock: list[float], *script: int) -> None:
        super().__init__(*script)
        self.clock = clock

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.clock += [4] if self.script else []
        return super().read()


def test_a_camera_that_went_away_is_opened_anew(no_waits: list[float]) -> None:
    say: list[str] = []
    first, broken, back = Camera(1, 2, rate=15.0), Camera(), Steady(no_waits, 3, 4)
    source = live(first, broken, back, say=say, patience=8)
    assert source.rate == 15.0
    shown: list[VideoFrame] = []
    with pytest.raises(ImageError, match=r"camera 3 went away and was not back for good within 8 s \(--patience\)"):
        take(source, shown)
    assert [(f.index, int(f.image[0, 0, 0])) for f in shown] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [frame.seconds for frame in shown] == [0, 0, 5.5, 9.5]
    assert say == [
        "camera 3 went away; trying again for 8 s",
        "camera 3 is back after 5.5 s",
        "camera 3 went away; trying again for 8 s",
    ]
    assert no_waits == [0.5, 1, 4, 4, 0.5, 1, 2, 4, 0.5]  # the last try is at the end of the patience
    assert first.released
    assert broken.released
    assert back.released


def test_a_camera_that_gives_a_frame_each_time_uses_its_patience_up(no_waits: list[float]) -> None:
    """And the waits grow: otherwise it said two lines each half a second, for ever."""
    say: list[str] = []
    source = live(*(Camera(7) for _ in range(99)), say=say, patience=30)
    with pytest.raises(ImageError, match="camera 3 went away and was not back for good within 30 s"):
        list(source)
    assert no_waits == [0.5, 1, 2, 4, 8, 8, 6.5]
    assert say[-2:] == ["camera 3 went away; trying again for 6.5 s", "camera 3 is back after 6.5 s"]
    assert len(say) == 14


def test_a_live_source_without_patience_ends(no_waits: list[float]) -> None:
    camera = Camera(1, 2)
    assert [frame.index for frame in live(camera, patience=0)] == [0, 1]
    assert camera.released
    assert no_waits == []


@pytest.mark.parametrize("text", ["2", "/dev/video2", "002"])
def test_a_camera_is_opened_by_its_index(text: str, monkeypatch: pytest.MonkeyPatch, no_waits: list[float]) -> None:
    asked: list[tuple[object, ...]] = []

    def opened(*words: object) -> Camera:
        asked.append(words)
        return Camera(5, rate=15.0)

    monkeypatch.setattr(cv2, "VideoCapture", opened)
    source = open_source(text, rate=12.5, patience=0)
    assert (asked, source.live, source.rate) == ([(2,)], True, 12.5)
    assert len(list(source)) == 1
    assert no_waits == []  # without patience it ends with its first gap
    stop = threading.Event()
    stopped = open_source(text, stop=stop)
    stop.set()
    assert next(iter(stopped), None) is None
    said: list[str] = []
    leaving = iter(open_source(text, patience=1, say=said.append))
    next(leaving), next(leaving)
    assert said[0].endswith("went away; trying again for 1 s")


def test_a_camera_is_opened_by_a_name_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as udev's in /dev/v4l/by-id; it is followed anew each time, as the index changes."""
    name = tmp_path / "usb-Cam_left"
    os.mkfifo(name)  # in place of a device
    monkeypatch.setattr(os.path, "realpath", lambda path: "/dev/video2")
    monkeypatch.setattr(cv2, "VideoCapture", lambda *words: Camera(5) if words == (str(name), cv2.CAP_V4L2) else None)
    source = open_source(str(name))
    assert (source.live, source.name, source.stem) == (True, f"camera {name}", "usb-Cam_left")


def test_each_connection_to_a_stream_gives_up_when_nothing_comes(
    monkeypatch: pytest.MonkeyPatch, no_waits: list[float]
) -> None:
    asked: list[tuple[object, ...]] = []

    def opened(*words: object) -> Camera:
        asked.append(words)
        return Camera(5) if len(asked) == 1 else Camera()

    monkeypatch.setattr(cv2, "VideoCapture", opened)
    with pytest.raises(ImageError, match="went away and was not back for good within 1 s"):
        list(open_source("rtsp://camera.local/live", patience=1))
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, 10_000, cv2.CAP_PROP_READ_TIMEOUT_MSEC, 10_000]
    assert asked == [("rtsp://camera.local/live", cv2.CAP_FFMPEG, limits)] * 3
    assert no_waits == [0.5, 0.5]


def test_a_stream_without_an_end_keeps_its_first_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    cameras = [Camera(5, 6), Camera(7)]
    monkeypatch.setattr(cv2, "VideoCapture", lambda *words: cameras.pop(0))
    source = open_source("http://camera.local/live", patience=0)
    assert source.live
    assert len(cameras) == 1
    assert [int(frame.image[0, 0, 0]) for frame in source] == [5, 6]
