"""The bounded pipeline: every frame of a file, the newest of a camera, whatever ends it; windows and drawing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import pytest

from kp_runtime.errors import BackendError, ImageError, KpError
from kp_runtime.results import Keypoints
from kp_runtime.track import Track, Tracker
from kp_runtime.video import Ahead, Window, draw_tracks, run_video
from kp_runtime.video_sink import Sink, open_sinks
from kp_runtime.video_source import FileSource, FolderSource, LiveSource, VideoFrame
from tests.conftest import no_thread_at, until

SIZE_HW = (96, 128)
T = TypeVar("T")


def picture(level: int, size_hw: tuple[int, int] = SIZE_HW) -> np.ndarray:
    return np.full((*size_hw, 3), level, np.uint8)


def video(path: Path, frames: int = 20, codec: str = "MJPG") -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 25, SIZE_HW[::-1])
    for i in range(frames):
        writer.write(picture(10 * (i % 25)))
    writer.release()
    return path


def levels(path: Path) -> list[int]:
    """The mean grey level of each frame of a video."""
    capture, found = cv2.VideoCapture(str(path)), []
    while True:
        read, image = capture.read()
        if not read:
            return found
        found.append(round(float(image.mean())))


def folder_of_frames(folder: Path, frames: int = 6) -> Path:
    folder.mkdir()
    for i in range(frames):
        cv2.imwrite(str(folder / f"{i:03}.png"), picture(10 * i))
    return folder


def one_face() -> Tracker:
    """A tracker whose detector and model always find the same face."""
    xy = np.random.default_rng(0).uniform(20, 80, (68, 2)).astype(np.float32)

    def model(image: np.ndarray, boxes: object) -> Keypoints:
        found = np.asarray(boxes, np.float64)
        return Keypoints(np.stack([xy] * len(found)), found, np.zeros((len(found), 2, 3)), SIZE_HW)

    return Tracker(model, lambda image: np.array([[20.0, 20, 80, 80]]))  # type: ignore[arg-type]


def sinks_for(source: object, out: Path, *formats: str) -> list[Sink]:
    return open_sinks(
        formats, out, source.stem, rate=source.rate, size_hw=source.size_hw, live=source.live  # type: ignore[attr-defined]
    )  # fmt: skip


class Camera:
    """A `cv2.VideoCapture` that plays a script: a number is a frame of that level, None is a failure."""

    def __init__(self, *script: int | None, rate: float = 0.0) -> None:
        self.script, self.rate, self.released = list(script), rate, False

    def read(self) -> tuple[bool, np.ndarray | None]:
        level = self.script.pop(0) if self.script else None
        return level is not None, None if level is None else picture(level)

    def get(self, property_: int) -> float:
        return self.rate

    def release(self) -> None:
        self.released = True


def live(*cameras: Camera, patience: float = 60.0, say: list[str] | None = None) -> LiveSource:
    waiting = list(cameras)
    told = [] if say is None else say
    opener = lambda: waiting.pop(0) if waiting else Camera()  # noqa: E731
    return LiveSource("camera 3", "camera_3", opener, patience=patience, stop=threading.Event(), say=told.append)


def take(items: Iterable[T], into: list[T]) -> None:
    """Keeps what came before an error."""
    for item in items:
        into.append(item)


class FullSink:
    """A sink that can't write."""

    path, pictures = Path("full"), False

    def write(self, frame: VideoFrame, tracks: object, drawn: object) -> None:
        raise KpError("the disk is full")

    def close(self, keep: bool = True) -> None:
        pass


def test_a_source_is_free_while_the_error_of_its_run_is_told() -> None:
    """Who opens the camera anew then must get it; the error keeps all that it came through."""
    camera = Camera(*[9] * 200)
    with pytest.raises(KpError, match="the disk is full") as error:
        run_video(FileSource(Path("v"), capture=camera, name="v"), one_face(), [FullSink()])
    assert camera.released, error
    assert camera.script


def test_ahead_keeps_order_and_raises_after_the_items() -> None:
    def items() -> Iterator[int]:
        yield from range(100)
        raise ImageError("broken")

    taken: list[int] = []
    with pytest.raises(ImageError, match="broken"):
        take(Ahead(items(), 3), taken)
    assert taken == list(range(100))


def test_ahead_is_bounded() -> None:
    made: list[int] = []
    ahead = Ahead((made.append(i) or i for i in range(1000)), 3)
    until(lambda: len(made) >= 4)  # three wait, one is held
    time.sleep(0.15)
    assert (len(made), ahead.dropped) == (4, 0)
    ahead.close()
    assert not ahead._thread.is_alive()
    assert len(made) == 4


def test_ahead_is_closed_when_its_thread_is_done() -> None:
    def items() -> Iterator[int]:
        yield 1
        time.sleep(0.3)
        yield 2

    ahead = Ahead(items())
    assert next(iter(ahead)) == 1
    ahead.close()
    assert not ahead._thread.is_alive()


def test_ahead_of_a_live_source_keeps_the_newest() -> None:
    ahead = Ahead(iter(range(1000)), 1, newest=True)
    ahead._thread.join(5)
    assert list(ahead) == [999]
    assert ahead.dropped == 999


def test_a_file_is_run_whole(tmp_path: Path) -> None:
    source, steps = FileSource(video(tmp_path / "a.avi", 40)), []
    run = run_video(source, one_face(), sinks_for(source, tmp_path, "avi", "mp4", "jsonl"), step=steps.append)
    assert (run.frames, run.dropped, run.faces, run.stopped) == (40, 0, 1, False)
    assert steps == list(range(1, 41))
    assert [path.name for path in run.files] == ["a_keypoints.avi", "a_keypoints.mp4", "a_keypoints.jsonl"]
    assert len(levels(run.files[0])) == len(levels(run.files[1])) == 40
    rows = [json.loads(line) for line in run.files[2].read_text().splitlines()]
    assert [(row["frame"], row["track"]) for row in rows] == [(i, 1) for i in range(40)]
    assert set(rows[0]) == {"time", "frame", "track", "box_xyxy", "keypoints_xy", "lost_score"}
    assert np.array(rows[0]["keypoints_xy"]).shape == (68, 2)
    assert rows[5]["time"] == 0.2
    assert not list(tmp_path.glob(".*"))


class Waiting(Tracker):
    """A tracker that starts when it is told to, and remembers the grey levels that it saw."""

    def __init__(self, start: threading.Event) -> None:
        self.start, self.seen = start, []  # type: ignore[var-annotated]
        super().__init__(one_face()._model, one_face()._detector)

    def __call__(self, image: np.ndarray, seconds: float) -> tuple[Track, ...]:
        assert self.start.wait(30)
        self.seen.append(int(image[0, 0, 0]))
        return super().__call__(image, seconds)


def test_a_late_step_costs_a_file_no_frame_and_a_camera_the_old_ones(tmp_path: Path) -> None:
    start = threading.Event()
    threading.Timer(0.3, start.set).start()
    of_file = Waiting(start)
    assert run_video(FolderSource(folder_of_frames(tmp_path / "f", 20)), of_file, []).frames == 20
    assert of_file.seen == [10 * i for i in range(20)]
    camera, ended = Camera(*range(200)), threading.Event()
    camera.release = ended.set  # type: ignore[method-assign]
    of_camera = Waiting(ended)
    run = run_video(live(camera, patience=0), of_camera, [])
    assert run.frames + run.dropped == 200
    assert run.dropped >= 198  # one that is worked on, and the newest
    assert of_camera.seen == sorted(of_camera.seen)
    assert of_camera.seen[-1] == 199


def test_reading_tracking_and_writing_overlap() -> None:
    together = threading.Barrier(3)

    class Source:
        name = stem = "made up"
        live, rate, count, size_hw = False, 30.0, 8, SIZE_HW

        def __iter__(self) -> Iterator[VideoFrame]:
            for index in range(8):
                if index == 6:
                    together.wait(30)
                yield VideoFrame(index, index / 30, picture(index))

    class Meeting(Tracker):
        def __call__(self, image: np.ndarray, seconds: float) -> tuple[Track, ...]:
            if image[0, 0, 0] == 3:
                together.wait(30)
            return ()

    class Late:
        path, pictures = Path("none"), False

        def write(self, frame: VideoFrame, tracks: object, drawn: object) -> None:
            if frame.index == 0:
                together.wait(30)

        def close(self, keep: bool = True) -> None:
            pass

    # frame 6 is read while frame 3 is tracked and frame 0 written, or the barrier breaks
    assert run_video(Source(), Meeting(one_face()._model, one_face()._detector), [Late()]).frames == 8


def test_a_cut_off_file_keeps_what_came_before(tmp_path: Path) -> None:
    path = video(tmp_path / "a.avi", 40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = FileSource(path)
    with pytest.raises(ImageError, match=r"a.avi is cut off: \d+ of its frames could be read; \d+ frames are in"):
        run_video(source, one_face(), sinks_for(source, tmp_path, "avi", "jsonl"))
    written = levels(tmp_path / "a_keypoints.avi")
    assert 5 < len(written) < 30
    assert len((tmp_path / "a_keypoints.jsonl").read_text().splitlines()) == len(written)


def test_frames_that_change_their_size_end_the_run(tmp_path: Path) -> None:
    folder = folder_of_frames(tmp_path / "frames")
    cv2.imwrite(str(folder / "004.png"), picture(3, SIZE_HW[::-1]))
    source = FolderSource(folder)
    with pytest.raises(ImageError, match=r"changes its size from 128 x 96 to 96 x 128 at frame 4; .*4 frames are in"):
        run_video(source, one_face(), sinks_for(source, tmp_path, "mp4", "jsonl"))
    assert len(levels(tmp_path / "frames_keypoints.mp4")) == 4


@pytest.mark.parametrize(("whole", "told"), [(1, "1 frame is in"), (3, "3 frames are in")])
def test_a_broken_frame_of_a_folder_ends_the_run(whole: int, told: str, tmp_path: Path) -> None:
    folder = folder_of_frames(tmp_path / "frames")
    broken = folder / f"00{whole}.png"
    broken.write_bytes(broken.read_bytes()[:-20])
    source = FolderSource(folder)
    with pytest.raises(ImageError, match=rf"{broken.name} is cut off.*; {told}"):
        run_video(source, one_face(), sinks_for(source, tmp_path, "jsonl"))
    assert len((tmp_path / "frames_keypoints.jsonl").read_text().splitlines()) == whole


def test_stop_finishes_what_was_read(tmp_path: Path) -> None:
    source, stop = FileSource(video(tmp_path / "a.avi", 200)), threading.Event()
    run = run_video(
        source, one_face(), sinks_for(source, tmp_path, "avi"), stop=stop, step=lambda n: stop.set() if n == 5 else None
    )
    assert run.stopped
    assert 5 <= run.frames < 30
    assert len(levels(run.files[0])) == run.frames


def test_stop_does_not_wait_for_a_camera_that_gives_nothing(tmp_path: Path) -> None:
    stop, hangs, release = threading.Event(), threading.Event(), threading.Event()

    class Hanging(Camera):
        def read(self) -> tuple[bool, np.ndarray | None]:
            if not self.script:
                hangs.set()
                release.wait(60)
            return super().read()

    source, runs = live(Hanging(*range(0, 50, 10))), []
    run = threading.Thread(
        target=lambda: runs.append(run_video(source, one_face(), sinks_for(source, tmp_path, "jsonl"), stop=stop))
    )
    run.start()
    assert hangs.wait(30)
    stop.set()
    run.join(30)
    was_alive = run.is_alive()
    release.set()
    assert not was_alive
    assert runs[0].stopped
    assert len(runs[0].files[0].read_text().splitlines()) == runs[0].frames > 0


def test_a_second_ctrl_c_leaves_a_whole_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the last frame of a camera that hangs is waited for."""

    class Interrupted(Ahead[T]):
        def close(self) -> None:
            super().close()
            raise KeyboardInterrupt

    monkeypatch.setattr("kp_runtime.video.Ahead", Interrupted)
    source = FileSource(video(tmp_path / "a.avi"))
    with pytest.raises(KeyboardInterrupt):
        run_video(source, one_face(), sinks_for(source, tmp_path / "out", "jsonl"))
    assert len((tmp_path / "out" / "a_keypoints.jsonl").read_text().splitlines()) == 20


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_step_whose_thread_can_not_be_started_ends_the_others(
    fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, begun = FileSource(Path("v"), capture=Camera(*[9] * 200), name="v"), set(threading.enumerate())
    sinks = sinks_for(source, tmp_path, "jsonl")
    no_thread_at(monkeypatch, fails)
    with pytest.raises(BackendError, match=r"no thread could be started \(can't start new thread\); end other"):
        run_video(source, one_face(), sinks)
    assert set(threading.enumerate()) <= begun
    assert not list(tmp_path.iterdir())


def test_a_window_is_shown_every_frame_and_may_end_the_run(tmp_path: Path) -> None:
    class Screen:
        shown, closed = 0, False

        def show(self, image: np.ndarray) -> bool:
            self.shown += 1
            return self.shown < 3

        def close(self) -> None:
            self.closed = True

    screen = Screen()
    run = run_video(FileSource(video(tmp_path / "a.avi", 200)), one_face(), [], window=screen)
    assert run.stopped
    assert screen.closed
    assert screen.shown == run.frames < 30


def test_no_window_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def headless(*words: object) -> None:
        raise cv2.error("The function is not implemented. Rebuild the library with Windows, GTK+ 2.x or Cocoa support")

    monkeypatch.setattr(cv2, "namedWindow", headless)
    with pytest.raises(BackendError, match=r"can't open a window .*leave out --show, or install opencv-python"):
        Window("kp")


@pytest.mark.parametrize(
    ("key", "visible", "wanted"),
    [(-1, 1.0, True), (ord("x"), 1.0, True), (ord("q"), 1.0, False), (0x10001B, 1.0, False), (-1, 0.0, False)],
)
def test_q_escape_and_closing_the_window_end_it(
    key: int, visible: float, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[object, ...]] = []
    monkeypatch.setattr(cv2, "namedWindow", lambda *_: None)
    monkeypatch.setattr(cv2, "imshow", lambda *given: shown.append(given))
    monkeypatch.setattr(cv2, "waitKey", lambda milliseconds: key)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: visible)
    frame = picture(7)
    assert Window("kp").show(frame) is wanted
    assert shown == [("kp", frame)]


@pytest.mark.parametrize("channels", [None, 1, 4])
def test_frames_of_a_pipeline_may_be_grey_or_have_four_channels(channels: int | None) -> None:
    image = np.full(SIZE_HW + (() if channels is None else (channels,)), 9, np.uint8)
    assert draw_tracks(image, ()).shape == (*SIZE_HW, 3)


def test_ids_at_the_pictures_edge_can_be_read() -> None:
    def drawn(number: int, box: tuple[float, ...]) -> np.ndarray:
        track = Track(number, np.array(box), np.linspace(box[:2], box[2:], 68, dtype=np.float32), 0.0)
        return draw_tracks(picture(0), (track,))

    for box in ((10.0, 1, 90, 80), (-30.0, 40, 90, 90)):
        assert (drawn(1, box) != drawn(8, box)).any()


def test_drawing_leaves_the_frame_alone_and_shows_the_id() -> None:
    image = picture(40)
    looked_for = np.array([10.0, 30, 60, 80])  # it has moved to the right
    track = Track(7, looked_for, np.linspace((40, 30), (90, 80), 68, dtype=np.float32), 0.01)
    drawn = draw_tracks(image, [track])
    assert (drawn[31:81, 8:38] == 40).all()
    assert (drawn[31:81, 90] != 40).any(axis=1).all()
    assert image.max() == 40
    assert np.abs(drawn[8:24, 36:60].astype(int) - 40).max() > 50
    assert draw_tracks(image, []) is not image
