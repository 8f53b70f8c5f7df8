"""A moving picture from source to sinks: reading, tracking, drawing and writing overlap, each in its thread.

Between two steps waits a bounded number of frames. A file's reader waits when the next step is behind; a live
source's oldest frame is dropped instead.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kp_runtime.draw import put_boxes, put_keypoints, put_label
from kp_runtime.effects import Effect
from kp_runtime.errors import BackendError, ImageError, KpError
from kp_runtime.frame import Frame, bgr_copy, import_cv2
from kp_runtime.geometry import boxes_from_points
from kp_runtime.in_order import no_thread
from kp_runtime.track import Track, Tracker
from kp_runtime.video_sink import Sink
from kp_runtime.video_source import Source, VideoFrame

if TYPE_CHECKING:
    from kp_runtime.prometheus import Metrics

__all__ = ["Ahead", "VideoRun", "Window", "draw_effect", "draw_tracks", "run_video"]

T = TypeVar("T")
_ROOM = 4  # frames between two steps: enough that an uneven one does not stop the others
_TURN_S = 0.1  # how long a wait lasts before it looks whether it should end
_LAST_S = 5.0  # how long a step may take to finish its last frame; a camera may block for longer


@dataclass(frozen=True)
class VideoRun:
    """What a run did.

    Attributes:
        frames: frames through all steps.
        dropped: frames of a live source that were left out to keep up.
        faces: tracks.
        detector_runs: frames on which the detector was asked.
        seconds: from the first frame to the last file closed.
        stopped: whether it was ended from outside.
        files: what was written.
    """

    frames: int
    dropped: int
    faces: int
    detector_runs: int
    seconds: float
    stopped: bool
    files: tuple[Path, ...]


class Ahead(Generic[T]):
    """Works through an iterable in a thread of its own, up to `room` items ahead of whoever takes them.

    Its error is raised to the taker, after the items before it.

    Args:
        items: what is worked through.
        room: most items that wait.
        newest: drop the oldest waiting item rather than stop; `dropped` counts them.
        stop: once it is set, only what waits is given, as what is asked for the next item may never answer.
        drop: is called for each item that is dropped.

    Raises:
        BackendError: no thread could be started.
    """

    def __init__(
        self,
        items: Iterable[T],
        room: int = _ROOM,
        *,
        newest: bool = False,
        stop: threading.Event | None = None,
        drop: Callable[[], object] = lambda: None,
    ) -> None:
        self._room, self._newest, self._stop = room, newest, stop or threading.Event()
        self._drop, self._waiting = drop, deque[T]()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self.dropped = 0
        # the thread alone has them: with it a generator ends, and a camera is free while its run's error is told
        self._thread = threading.Thread(target=self._work, args=(items,), daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise no_thread(error) from error

    def __iter__(self) -> Iterator[T]:
        """The items, in order."""
        while True:
            with self._changed:
                # in turns, so that the main thread gets to see Ctrl-C on every system
                while not (self._waiting or self._ended or self._closed or self._stop.is_set()):
                    self._changed.wait(_TURN_S)
                if not self._waiting:
                    break
                item = self._waiting.popleft()
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error

    def waiting(self) -> int:
        """How many items wait."""
        return len(self._waiting)

    def close(self) -> None:
        """Ends the thread without taking what is left."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_LAST_S)

    def _work(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    break
        except BaseException as error:  # it belongs to the taker
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, item: T) -> bool:
        with self._changed:
            if self._newest and len(self._waiting) >= self._room:
                self._waiting.popleft()
                self.dropped += 1
                self._drop()
            while len(self._waiting) >= self._room and not self._closed:
                self._changed.wait()
            self._waiting.append(item)
            self._changed.notify_all()
            return not self._closed


class Window:
    """A window that shows frames; any of q, Esc or closing it ends the run.

    Raises:
        BackendError: this OpenCV has no windows, or there is no screen.
    """

    def __init__(self, title: str) -> None:
        self._cv2, self._title = import_cv2(), title.encode(errors="replace").decode()
        try:
            self._cv2.namedWindow(self._title, self._cv2.WINDOW_NORMAL)
        except self._cv2.error as error:
            raise BackendError(
                "this OpenCV can't open a window (the headless wheel has none, or there is no screen); "
                "leave out --show, or install opencv-python in place of opencv-python-headless"
            ) from error

    def show(self, picture: NDArray[np.uint8]) -> bool:
        """Shows a frame; false when the person wants no more."""
        cv2 = self._cv2
        cv2.imshow(self._title, picture)
        wanted = cv2.waitKey(1) & 0xFF not in (ord("q"), 27)
        return bool(wanted and cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) >= 1)

    def close(self) -> None:
        """Closes it."""
        self._cv2.destroyWindow(self._title)


def draw_tracks(image: Frame | NDArray[np.uint8], tracks: Sequence[Track]) -> NDArray[np.uint8]:
    """Points, the boxes around them and ids on a BGR copy of a `Frame` or a uint8 image: BGR, BGRA or grey."""
    canvas = bgr_copy(image)
    if not tracks:
        return canvas
    points = np.stack([track.xy for track in tracks])
    boxes = boxes_from_points(points)  # a track's own lags behind a face that moves: it was looked for there
    put_boxes(canvas, boxes)
    for track, box in zip(tracks, boxes, strict=True):
        put_label(canvas, str(track.id), box)
    put_keypoints(canvas, points)
    return canvas


def draw_effect(effect: Effect) -> Callable[[NDArray[np.uint8], Sequence[Track]], NDArray[np.uint8]]:
    """What `run_video` draws to put an effect on all faces."""
    return lambda image, tracks: effect(image, [track.xy for track in tracks])


def run_video(
    source: Source,
    tracker: Tracker,
    sinks: Sequence[Sink],
    *,
    draw: Callable[[NDArray[np.uint8], Sequence[Track]], NDArray[np.uint8]] = draw_tracks,
    window: Any = None,
    stop: threading.Event | None = None,
    step: Callable[[int], None] = lambda frames: None,
    metrics: Metrics | None = None,
) -> VideoRun:
    """Reads, tracks, draws and writes until the source ends.

    Args:
        source: of `video_source.open_source`.
        tracker: a fresh one.
        sinks: of `video_sink.open_sinks`; they are closed in any case, and leave older files alone where no frame came.
        draw: gives the picture of a frame and its tracks; `draw_effect(…)` for an effect.
        window: a `Window` that shows the frames.
        stop: set it to end the run: no more is read, what was read is finished.
        step: is told how many frames are through.
        metrics: gets the times of reading, drawing and writing, the lengths of the queues, and what was dropped; the
            rest comes from a tracker of `Metrics.tracker`.

    Raises:
        ImageError: the source broke off, or its frames changed their size; what came before is written.
        BackendError: no thread could be started.
        KpError: a sink can't write any more; the other files are finished, and it says what each holds.
    """
    stop = stop or threading.Event()
    room = 1 if source.live else _ROOM
    stage: Callable[[str], Any] = metrics.timer if metrics else contextlib.nullcontext
    pictures = window is not None or any(sink.pictures for sink in sinks)

    def tracked() -> Iterator[tuple[VideoFrame, tuple[Track, ...]]]:
        for frame in read:
            if frame.image.shape[:2] != source.size_hw:
                (height, width), new = source.size_hw, frame.image.shape
                raise ImageError(
                    f"{source.name} changes its size from {width} x {height} to {new[1]} x {new[0]} "
                    f"at frame {frame.index}; run that part by itself"
                )
            yield frame, tracker(frame.image, frame.seconds)

    def pictured() -> Iterator[tuple[VideoFrame, tuple[Track, ...], NDArray[np.uint8] | None]]:
        for frame, tracks in found:
            with stage("draw") if pictures else contextlib.nullcontext():
                picture = draw(frame.image, tracks) if pictures else None
            yield frame, tracks, picture

    begin, came, frames = time.perf_counter(), 0, 0
    failed: dict[int, KpError] = {}  # by the id of the sink, or of the source
    steps: list[Ahead[Any]] = []
    try:
        drop = metrics.dropped.inc if metrics else lambda: None
        steps.append(read := Ahead(_until(source, stop, stage), room, newest=source.live, stop=stop, drop=drop))
        steps.append(found := Ahead(tracked(), room))
        steps.append(drawn := Ahead(pictured(), room))
        if metrics:
            metrics.queues({"read": read.waiting, "tracked": found.waiting, "drawn": drawn.waiting})
        for frame, tracks, picture in drawn:
            with stage("write"):
                for sink in sinks:
                    try:
                        sink.write(frame, tracks, picture)
                    except KpError as error:
                        failed[id(sink)] = error
            came += 1
            if failed:
                break
            frames += 1
            step(frames)
            if window is not None and picture is not None and not window.show(picture):
                stop.set()
    except KpError as error:
        failed[id(source)] = error
    finally:
        with contextlib.ExitStack() as closing:  # every one of them, whatever another raises, from the last one on
            if window is not None:
                closing.callback(window.close)
            for sink in reversed(sinks):
                closing.callback(_close, sink, frames > 0, failed)
            for ahead in reversed(steps):  # a second Ctrl-C ends the wait for a camera that hangs
                closing.callback(ahead.close)
    files = tuple(sink.path for sink in sinks if frames and id(sink) not in failed)
    if failed:
        first, *others = failed.values()
        kept = f"; {came} frame{'s are' if came > 1 else ' is'} in {', '.join(map(str, files))}" if files else ""
        first.args = (f"{'; '.join(map(str, (first, *others)))}{kept}",)
        raise first
    seconds = time.perf_counter() - begin
    return VideoRun(frames, read.dropped, tracker.faces, tracker.detector_runs, seconds, stop.is_set(), files)


def _until(source: Source, stop: threading.Event, stage: Callable[[str], Any]) -> Iterator[VideoFrame]:
    frames = iter(source)
    while True:
        with stage("read"):  # one more than there are frames: the last finds the end
            frame = next(frames, None)
        if frame is None or stop.is_set():
            return
        yield frame


def _close(sink: Sink, keep: bool, failed: dict[int, KpError]) -> None:
    """Closes a sink, which knows best what became of it."""
    try:
        sink.close(keep)
    except KpError as error:
        failed[id(sink)] = error
