"""Where moving pictures come from: video files, folders of frames, cameras, network streams, GStreamer.

A source gives `VideoFrame`s in order. Files and folders give every frame and end; live ones (cameras, streams,
pipelines) go on until they are stopped, and are opened anew when they go away.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kp_runtime.errors import BackendError, ImageError, InputError
from kp_runtime.frame import IMAGE_SUFFIXES, cv2_name, image_from_file, import_cv2
from kp_runtime.photos import photos_from_paths
from kp_runtime.video_container import ends_early

__all__ = ["FileSource", "FolderSource", "LiveSource", "Source", "VideoFrame", "open_source"]

USUAL_RATE = 30.0
"""Frames a second where the source does not tell."""

_ADDRESS = re.compile("[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_FILE_ADDRESS = re.compile("(https?|ftp|file)://", re.IGNORECASE)
"""Where a video file may lie; what `rtsp://` and its like give comes by the clock, even where its length is known."""

_LEAST_STEP_S = 0.001  # between two frames of a file
_FAR_BEHIND_S = 0.5  # a stamp that is so much earlier is of a clock that began anew, as where files were joined
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0
_NETWORK_TIMEOUT_MS = 10_000


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """One frame.

    Attributes:
        index: counted from 0 in the source; a live source's gaps are frames that were dropped.
        seconds: since the source's start.
        image: `(h, w, 3)` uint8 BGR.
    """

    index: int
    seconds: float
    image: NDArray[np.uint8]


class Source(Protocol):
    """Gives the frames of one moving picture.

    Attributes:
        name: for messages.
        stem: for the names of result files.
        live: frames come by the clock, so old ones are dropped rather than waited with.
        rate: frames a second.
        count: how many frames there are, as far as the source knows.
        size_hw: of the first frame.
    """

    name: str
    stem: str
    live: bool
    rate: float
    count: int | None
    size_hw: tuple[int, int]

    def __iter__(self) -> Iterator[VideoFrame]:
        """The frames; `ImageError` where they end before their time, `InputError` where a file is read once more."""
        ...


def open_source(
    text: str,
    *,
    rate: float | None = None,
    patience: float = 60.0,
    stop: threading.Event | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Source:
    """Opens what a person would name.

    Args:
        text: a file, a folder of frames, a camera's index or its name in /dev (`/dev/v4l/by-id/…`), a network
            address (`rtsp://…`; by `http://…`, what has an end is a file), or a GStreamer pipeline
            (`v4l2src ! videoconvert ! appsink`).
        rate: frames a second, instead of what the source says.
        patience: for how many seconds a live source that went away is opened anew.
        stop: ends a live source.
        say: is told, in a line, that a live source went away and came back, or that a whole file gave fewer frames
            than it counts.

    Raises:
        InputError: nothing of the kind is there.
        ImageError: it is there and gives no frame.
        BackendError: this OpenCV has no GStreamer.
    """
    if rate is not None and not (math.isfinite(rate) and 0 < rate <= 1000):
        raise InputError(f"the frame rate must be over 0 and at most 1000 a second, got {rate:g}")
    if not text.strip():
        raise InputError("the source has no name; give a video, a folder, a camera's index, an address or a pipeline")
    path, is_dir, is_file, is_other = Path(text), False, False, False
    with contextlib.suppress(OSError):  # a name that is too long is no file's
        is_dir, is_file, is_other = path.is_dir(), path.is_file(), path.exists()
    if is_dir:
        return FolderSource(path, rate)
    if is_file:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            raise InputError(
                f"{path} is a photo: kp predict {shlex.quote(text)}, or give the folder that holds the frames"
            )
        return FileSource(path, rate, say=say)

    def live(name: str, stem: str, opener: Callable[[], Any]) -> LiveSource:
        return LiveSource(name, stem, opener, rate=rate, patience=patience, stop=stop or threading.Event(), say=say)

    shown = "of that name (left out here: it may hold a password)" if {"@", "?"} & set(text) else repr(text)
    cv2, text = import_cv2(), cv2_name(text).strip()
    index = text.removeprefix("/dev/video")
    if index.isascii() and index.isdigit():
        digits = index.lstrip("0") or "0"  # Python refuses to read thousands of them
        if len(digits) > 2:
            raise InputError(f"there is no camera {index}; cameras are counted from 0 (on Linux: ls /dev/video*)")
        return live(f"camera {index}", f"camera_{index}", lambda: cv2.VideoCapture(int(digits)))
    if is_other and re.fullmatch("/dev/video[0-9]+", os.path.realpath(text)):  # a name that stays, whatever the index
        return live(f"camera {text}", path.name, lambda: cv2.VideoCapture(text, cv2.CAP_V4L2))
    if _ADDRESS.match(text):
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _NETWORK_TIMEOUT_MS]
        limits += [cv2.CAP_PROP_READ_TIMEOUT_MSEC, _NETWORK_TIMEOUT_MS]
        opened, name = [cv2.VideoCapture(text, cv2.CAP_FFMPEG, limits)], _without_password(text)
        stem = _stem(name, text.partition("://")[2].rpartition("@")[2])
        if _FILE_ADDRESS.match(text) and _count(opened[0]):
            return FileSource(Path(text), rate, opened.pop(), name, stem)
        # the connection that is there is used: some cameras serve one at a time
        return live(name, stem, lambda: opened.pop() if opened else cv2.VideoCapture(text, cv2.CAP_FFMPEG, limits))
    if "!" in text:
        if not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
            raise BackendError(
                f"OpenCV {cv2.__version__} is built without GStreamer (PyPI's wheels are); "
                "use the system's OpenCV (JetPack's and Debian's have it), a camera's index, or an rtsp:// address"
            )
        return live("the pipeline", _stem("the pipeline", text), lambda: cv2.VideoCapture(text, cv2.CAP_GSTREAMER))
    if is_other:
        raise InputError(f"{text} is a pipe or a device; give a video file, or a camera by its index")
    raise InputError(f"there is no video, folder, camera index, address (rtsp://…) or GStreamer pipeline {shown}")


class FileSource:
    """A video file; no frame is left out.

    Args:
        path: the file.
        rate: frames a second, instead of what the file says.
        capture: the file, opened; opened by the path when None.
        name: for messages; the path when None.
        stem: for the names of result files; the path's when None.
        say: is told that fewer frames could be read than the file counts, of one that is not cut off.

    Raises:
        ImageError: OpenCV finds no frame in it.
    """

    live = False

    def __init__(
        self,
        path: Path,
        rate: float | None = None,
        capture: Any = None,
        name: str | None = None,
        stem: str | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        cv2 = import_cv2()
        self._path, self._is_here, self._say = path, capture is None, say
        self.name = str(path) if name is None else name
        self.stem = path.stem if stem is None else stem
        self._cv2, self._rate_given = cv2, rate is not None
        self._capture = cv2.VideoCapture(cv2_name(path.absolute())) if self._is_here else capture
        read, image = self._capture.read()
        if not read:
            raise ImageError(f"{self.name} has no frame that can be read: it is cut off, empty or no video")
        self._first: NDArray[np.uint8] = image
        self._begin, self._is_read = self._stamp(), False
        self.size_hw = (image.shape[0], image.shape[1])
        self.count, said = _count(self._capture), _rate(self._capture)
        self.rate = rate or said
        self._seconds = (self.count or 0) / said

    def __iter__(self) -> Iterator[VideoFrame]:
        """Every frame, once; `ImageError` after the last one where the file is cut off."""
        if self._is_read:
            raise InputError(f"{self.name} can be read once; open it again")
        self._is_read = True
        index, seconds, last = 0, -1 / self.rate, 0.0  # a step before the first frame
        try:
            for image, stamp in self._stamped():
                if self._rate_given:
                    seconds = index / self.rate
                elif stamp <= last:
                    seconds += 1 / self.rate
                elif stamp < seconds - _FAR_BEHIND_S:
                    seconds += max(stamp - last, _LEAST_STEP_S)
                else:  # after two of one time it takes a few frames until the stamps are ahead again
                    seconds = max(stamp, seconds + _LEAST_STEP_S)
                last = stamp
                yield VideoFrame(index, seconds, image)
                index += 1
        finally:
            self._capture.release()
        if self._is_here and ends_early(self._path):
            raise ImageError(f"{self.name} is cut off: {index} of its frames could be read")
        # some containers only estimate their number of frames, and of a trimmed one not all are shown
        is_short = self.count is not None and index < self.count - max(2, 0.02 * self.count)
        shown = last if self._rate_given else seconds
        if is_short and shown < self._seconds - max(1.0, 0.02 * self._seconds):
            told = f"{index} of the {self.count} frames that it counts could be read"
            if not self._is_here:
                raise ImageError(f"{self.name} broke off: {told}")
            self._say(f"{self.name}: {told}; it was trimmed, or is damaged inside")

    def _stamped(self) -> Iterator[tuple[NDArray[np.uint8], float]]:
        """The frames and their times since the first one's, each read when the next one is.

        A single time that is ahead of the next one, which goes on from the one before, is wrong: the middle is taken.
        """
        image: NDArray[np.uint8] | None = self._first
        last = stamp = 0.0
        while image is not None:
            read, coming = self._capture.read()
            after = self._stamp() - self._begin if read else math.inf
            if last < after < stamp:
                stamp = (last + after) / 2
            yield image, stamp
            image, last, stamp = coming if read else None, stamp, after

    def _stamp(self) -> float:
        """The time of the last frame; older OpenCVs give that of the next one."""
        return float(self._capture.get(self._cv2.CAP_PROP_POS_MSEC)) / 1000


class FolderSource:
    """A folder of frames, in the order of their names, where a number counts as one: `9.png`, then `10.png`.

    Raises:
        ImageError: it holds no photo, or the first one can't be read.
    """

    live = False

    def __init__(self, folder: Path, rate: float | None = None) -> None:
        self.name, self.stem = str(folder), folder.resolve().name
        self._paths = sorted(photos_from_paths([folder]), key=_with_numbers)
        self.rate = rate or USUAL_RATE
        self.count: int | None = len(self._paths)
        first = image_from_file(self._paths[0])
        self.size_hw = (first.shape[0], first.shape[1])

    def __iter__(self) -> Iterator[VideoFrame]:
        """Every frame; `ImageError` at one that can't be read."""
        for index, path in enumerate(self._paths):
            yield VideoFrame(index, index / self.rate, image_from_file(path))


class LiveSource:
    """A camera, a stream or a pipeline; when it goes away it is opened anew, with growing waits.

    Args:
        name: for messages.
        stem: for the names of result files.
        opener: gives a new `cv2.VideoCapture`.
        rate: frames a second, instead of what the source says.
        patience: for how many seconds it is opened anew; 0 takes the first missing frame as the end. They and the waits
            go on where it gives frames for no longer than the next wait, and begin anew where it does.
        stop: ends it.
        say: is told that it went away and came back.

    Raises:
        ImageError: it gives no frame, or frames that are neither BGR nor grey, as a pipeline may.
    """

    live = True
    count: int | None = None

    def __init__(
        self,
        name: str,
        stem: str,
        opener: Callable[[], Any],
        *,
        rate: float | None = None,
        patience: float = 60.0,
        stop: threading.Event,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.name, self.stem = name, stem
        self._opener, self._patience, self._stop, self._say = opener, patience, stop, say
        self._away_since, self._back_at, self._wait = 0.0, -math.inf, _FIRST_WAIT
        self._capture = opener()
        read, image = self._capture.read()
        if not read:
            self._capture.release()
            raise ImageError(f"{name} gives no frame; check that it is connected and that nothing else uses it")
        height = self._capture.get(import_cv2().CAP_PROP_FRAME_HEIGHT)
        if (image.ndim == 2 and 0 < height != len(image)) or image.shape[2:] == (2,):  # NV12 has half as many rows more
            self._capture.release()
            raise ImageError(
                f"{name} gives frames that are neither BGR nor grey; put videoconvert ! video/x-raw,format=BGR "
                "before its appsink"
            )
        self._first: NDArray[np.uint8] = image
        self.size_hw = (image.shape[0], image.shape[1])
        self.rate = rate or _rate(self._capture)

    def __iter__(self) -> Iterator[VideoFrame]:
        """Frames until it is stopped; `ImageError` when it stays away."""
        begin, index, image = time.monotonic(), 0, self._first
        try:
            while not self._stop.is_set():
                seen = time.monotonic()
                yield VideoFrame(index, seen - begin, image)
                index += 1
                read, image = self._capture.read()
                if not read:
                    if self._patience == 0:
                        return
                    image = self._opened_anew(seen)
        finally:
            self._capture.release()

    def _opened_anew(self, seen: float) -> NDArray[np.uint8]:
        """The first frame after a gap; any one, which nobody will see, when it is stopped meanwhile."""
        begin = time.monotonic()
        if seen - self._back_at > self._wait:
            self._away_since, self._wait = begin, _FIRST_WAIT
        end = self._away_since + self._patience
        if end > begin:
            self._say(f"{self.name} went away; trying again for {round(end - begin, 1):g} s")
        while (left := end - time.monotonic()) > 0:
            self._capture.release()
            if self._stop.wait(min(self._wait, left)):
                return self._first
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
            self._capture = self._opener()
            read, image = self._capture.read()
            if read:
                self._back_at = time.monotonic()
                self._say(f"{self.name} is back after {self._back_at - begin:.1f} s")
                return image  # type: ignore[no-any-return]
        raise ImageError(f"{self.name} went away and was not back for good within {self._patience:g} s (--patience)")


def _with_numbers(path: Path) -> list[str | int]:
    """What a frame's name is sorted by: text and numbers in turns."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", path.name))]


def _stem(name: str, whole: str) -> str:
    """Of an address or a pipeline: its name as one of a file, and digits that tell it from others of that name."""
    return re.sub(r"\W+", "_", name).strip("_") + "_" + hashlib.sha256(whole.encode()).hexdigest()[:8]


def _count(capture: Any) -> int | None:
    """The number of frames where the capture tells one."""
    count = capture.get(import_cv2().CAP_PROP_FRAME_COUNT)
    return int(count) if 0 < count < 1e9 else None


def _rate(capture: Any) -> float:
    """Frames a second as the capture tells, or the usual one where it can't be true."""
    rate = float(capture.get(import_cv2().CAP_PROP_FPS))
    return rate if 1 <= rate < 1000 else USUAL_RATE  # 1000 is a time base in milliseconds


def _without_password(address: str) -> str:
    """`rtsp://user:password@host/path` without what only its owner should see."""
    scheme, _, rest = address.partition("://")
    place, slash, path = rest.partition("/")
    host, _, query = place.partition("?")
    path = path.partition("?")[0]
    if "@" in query + path:  # what stands before it may be a password
        return f"{scheme}://…"
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
