"""What is written of a moving picture: the annotated video, and a row a face as JSON Lines or Parquet.

Every sink writes beside its target and takes the target's name when it is closed, whatever ended the run; so
a file of that name can always be read. Where no frame came through, an older file of that name stays. A sink that
can't write any more keeps what can be read: JSON Lines and videos end early, and of Parquet, whose end tells where all
is, nothing is left; nor of an MP4 where the disk did not tell that its room ran out.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kp_runtime.errors import InputError, KpError
from kp_runtime.face_table import import_pyarrow
from kp_runtime.files import make_folder, short_name, sync
from kp_runtime.frame import cv2_name, import_cv2
from kp_runtime.track import Track
from kp_runtime.video_source import VideoFrame

__all__ = ["FORMATS", "LinesSink", "ParquetSink", "Sink", "VideoSink", "open_sinks"]

FORMATS = {"mp4": ".mp4", "avi": ".avi", "jsonl": ".jsonl", "parquet": ".parquet"}
"""The formats and their suffixes."""

_CODECS = {"mp4": "mp4v", "avi": "MJPG"}
"""What every OpenCV with FFmpeg can encode: MPEG-4 part 2, and JPEGs one after the other."""

_MOST_PX = {"mp4v": 8191, "MJPG": 65_500}
"""The most pixels a side: MPEG-4 counts them in 13 bits, JPEG in 16."""

_SLOWEST = 0.01  # frames a second
_LONGEST_S = 60  # that a frame is shown
_LONGEST_FILL_S = 5.0  # for the repeats between two frames of a live source, which goes on meanwhile
_ROOM = 1 << 20  # bytes of a disk that are kept for buffers, and for the rows written beside
_INDEX = 32  # bytes a frame that are kept for the index at a video's end; of mp4 it took 15, of avi 19
_ROWS_AT_ONCE = 1000


class Sink(Protocol):
    """Takes frames in order."""

    path: Path
    pictures: bool

    def write(self, frame: VideoFrame, tracks: Sequence[Track], drawn: NDArray[np.uint8] | None) -> None:
        """Takes one frame; `drawn` is `(h, w, 3)` uint8 BGR and given where `pictures` is true."""
        ...

    def close(self, keep: bool = True) -> None:
        """Finishes the file and gives it its name, or removes what there is of it.

        Raises:
            KpError: it is not whole, here or since a `write` that failed; says what there is.
        """
        ...


def open_sinks(
    formats: Sequence[str], out: Path, stem: str, *, rate: float, size_hw: tuple[int, int], live: bool,
    points: int = 68, drawn: str = "keypoints", say: Callable[[str], None] = lambda text: None,
) -> list[Sink]:  # fmt: skip
    """Opens `out/<stem>_<drawn>.<suffix>` for each format of pictures, `out/<stem>_keypoints.<suffix>` for the others.

    `points` is their number a face; `say` is told at the end, in a line, that a video is shorter than what it shows.

    Raises:
        InputError: an unknown format.
        KpError: a file can't be written.
        MissingExtraError: Parquet without pyarrow.
    """
    if odd := [name for name in formats if name not in FORMATS]:
        raise InputError(f"there is no format {odd[0]!r}; choose from {', '.join(FORMATS)}")
    if formats:
        make_folder(out)
    sinks: list[Sink] = []
    try:
        for name in dict.fromkeys(formats):
            path = out / f"{stem}_{drawn if name in _CODECS else 'keypoints'}{FORMATS[name]}"
            if name in _CODECS:
                sinks.append(VideoSink(path, _CODECS[name], rate, size_hw, by_clock=live, say=say))
            else:
                sinks.append(LinesSink(path) if name == "jsonl" else ParquetSink(path, points))
    except BaseException:
        for sink in sinks:
            sink.close(keep=False)
        raise
    return sinks


class _Temporary:
    """A file beside its target until it takes its name, and a lock as long as its process lives.

    It has the target's suffix, which tells OpenCV the container. The lock is a file of its own, as into a locked one
    FFmpeg can't write on some network disks. What killed runs left of the same target is removed.
    """

    def __init__(self, target: Path) -> None:
        name, end = short_name(target.stem), f".tmp{target.suffix}"
        for left in target.parent.glob(f".{glob.escape(name)}.*{end}.lock"):
            with contextlib.suppress(ImportError, OSError), _locked(left, "r+b", wait=False):
                left.with_suffix("").unlink(missing_ok=True)
                left.unlink()
        self._target, self.path = target, target.with_name(f".{name}.{secrets.token_hex(8)}{end}")
        self._lock_path, self._lock = self.path.with_name(f"{self.path.name}.lock"), contextlib.ExitStack()
        with contextlib.suppress(ImportError, OSError):  # where there are no locks, nobody removes what is left
            self._lock.enter_context(_locked(self._lock_path, "wb", wait=True))

    def end(self, keep: bool) -> None:
        """Gives the file its name, or removes it."""
        try:
            if keep:
                sync(self.path)
                os.replace(self.path, self._target)
            else:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise KpError(f"can't write {self._target}: {reason}; what was written is {self.path}") from error
        finally:
            self._lock.close()
            with contextlib.suppress(OSError):
                self._lock_path.unlink()


def _locked(path: Path, mode: str, *, wait: bool) -> IO[bytes]:
    """A file that no other process has locked meanwhile.

    Raises:
        OSError: another one has, or the disk has no locks.
        ImportError: the system, Windows, has none of these.
    """
    import fcntl

    file = open(path, mode)  # noqa: SIM115 - open as long as it is locked
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        file.close()
        raise
    return file


class VideoSink:
    """An annotated video.

    Args:
        path: the target.
        codec: its four characters.
        rate: frames a second.
        size_hw: of all frames.
        by_clock: frames come when they come, and those that come too fast are left out. Otherwise each is written.
            In both cases one is repeated until the next came: the video lasts as long as what it shows. (But where
            times jump by over a minute, where a file's frames come faster than its rate for a while, and by the clock
            where the repeats take over half of the time that they fill, or over five seconds.)
        say: is told at the end, in a line, that the video is a second or more shorter than what it shows.

    Raises:
        KpError: OpenCV can't write there.
    """

    pictures = True

    def __init__(
        self, path: Path, codec: str, rate: float, size_hw: tuple[int, int], *, by_clock: bool,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        cv2 = import_cv2()
        if rate > 65:  # MPEG-4 counts a second in up to 65,535 parts, and OpenCV takes thousandths of a frame
            rate = round(rate, 2 if rate < 655 else 1)
        self.path, self._cv2, self._rate, self._by_clock = path, cv2, rate, by_clock
        self._temporary, self._say = _Temporary(Path(cv2_name(path.absolute()))), say
        self._written = self._left_out = 0
        self._last: NDArray[np.uint8] | None = None
        self._error: KpError | None = None
        fourcc = cv2.VideoWriter_fourcc(*codec)
        self._writer: Any = None
        # what the encoder does not take ends the process in OpenCV 4.5.4, JetPack 6's, so it is not asked
        most = _MOST_PX[codec]
        if max(size_hw) <= most and rate >= _SLOWEST:
            self._writer = cv2.VideoWriter(str(self._temporary.path), fourcc, rate, size_hw[::-1])
        if self._writer is None or not self._writer.isOpened():
            self._temporary.end(keep=False)
            raise KpError(
                f"can't write the video {path} of {size_hw[1]} x {size_hw[0]} px at {rate:g} frames/s; check the "
                f"folder and the room on its disk; a side may have {most} px here, and the rate be {_SLOWEST} and "
                "more; or take another --format"
            )

    def write(self, frame: VideoFrame, tracks: Sequence[Track], drawn: NDArray[np.uint8] | None) -> None:
        """Adds a frame."""
        assert drawn is not None  # as `pictures` says
        due = round(frame.seconds * self._rate) + 1 - self._left_out
        gap = (due - self._written) / self._rate
        end = time.monotonic() + min(gap / 2, _LONGEST_FILL_S) if self._by_clock else math.inf
        while self._written < due - 1 and gap <= _LONGEST_S and time.monotonic() < end:
            self._put(drawn if self._last is None else self._last)
        if self._written < due or not self._by_clock:
            self._put(drawn)
        self._left_out += max(0, due - self._written)
        self._last = drawn

    def _put(self, picture: NDArray[np.uint8]) -> None:
        with contextlib.suppress(OSError):  # a disk that does not tell may have room
            disk = shutil.disk_usage(self._temporary.path.parent)
            # what the encoder and its buffer hold is less than two pictures that are not compressed
            if disk.total and disk.free < _ROOM + _INDEX * self._written + 2 * picture.nbytes:
                self._error = KpError(f"its disk is nearly full, {disk.free / 1e6:.1f} MB are left")
                raise _unwritable(self.path, self._error)
        self._writer.write(picture)
        self._written += 1

    def close(self, keep: bool = True) -> None:
        """See `Sink.close`; looks whether all is there, as OpenCV does not tell of a full disk."""
        self._writer.release()
        if not keep:
            self._temporary.end(keep=False)
            return
        check = self._cv2.VideoCapture(str(self._temporary.path))
        there = int(check.get(self._cv2.CAP_PROP_FRAME_COUNT)) if check.isOpened() else 0
        try:
            if there < self._written:  # the head of what found no room does not count it
                there = 0
                while check.grab():
                    there += 1
        finally:
            check.release()
            self._temporary.end(keep=there > 0)
        if self._left_out >= self._rate:
            slow = ", and what the encoder was too slow for" if self._by_clock else ""
            shorter = f"{self._left_out / self._rate:.0f} s shorter than what it shows"
            self._say(f"{self.path} is {shorter}: pauses of over a minute are left out{slow}")
        if there < self._written:
            have = f"{self.path} has {there}" if there else f"can't write {self.path}: it would have none"
            raise KpError(f"{have} of the {self._written} frames written to it; is the disk full?")
        if self._error is not None:
            raise _unwritable(self.path, self._error, "it ends with the last frame that fitted" if there else "")


class LinesSink:
    """JSON Lines: an object a face and frame.

    Raises:
        KpError: the file can't be written.
    """

    pictures = False

    def __init__(self, path: Path) -> None:
        self.path, self._temporary = path, _Temporary(path)
        self._whole = 0  # bytes that are in the file for certain
        self._error: OSError | None = None
        try:
            self._file = open(self._temporary.path, "wb")  # noqa: SIM115 - open until close()
        except OSError as error:
            self._temporary.end(keep=False)
            raise _unwritable(path, error) from error

    def write(self, frame: VideoFrame, tracks: Sequence[Track], drawn: NDArray[np.uint8] | None) -> None:
        """Adds a line a face."""
        lines = "".join(json.dumps(_row(frame, track)) + "\n" for track in tracks).encode()
        try:
            self._file.write(lines)
            self._file.flush()
        except OSError as error:
            self._error = error
            raise _unwritable(self.path, error) from error
        self._whole += len(lines)

    def close(self, keep: bool = True) -> None:
        """See `Sink.close`; where it failed, the last frame that fitted is the last."""
        try:
            self._file.close()
        except OSError as error:
            self._error = self._error or error
        if self._error is None:
            self._temporary.end(keep)
            return
        kept = keep and self._whole > 0
        if kept:
            os.truncate(self._temporary.path, self._whole)
        self._temporary.end(kept)
        raise _unwritable(self.path, self._error, "it ends with the last frame that fitted" if kept else "")


class ParquetSink:
    """Parquet: a row a face and frame, the columns as in JSON Lines.

    Raises:
        MissingExtraError: pyarrow is not installed.
        KpError: the file can't be written.
    """

    pictures = False

    def __init__(self, path: Path, points: int = 68) -> None:
        pa, pq = import_pyarrow()
        self.path, self._temporary, self._pa = path, _Temporary(path), pa
        self._rows: list[dict[str, Any]] = []
        self._error: Exception | None = None
        point = pa.list_(pa.float32(), 2)
        self._schema = pa.schema([
            ("time", pa.float64()), ("frame", pa.int64()), ("track", pa.int64()),
            ("box_xyxy", pa.list_(pa.float32(), 4)), ("keypoints_xy", pa.list_(point, points)),
            ("lost_score", pa.float32()),
        ])  # fmt: skip
        try:
            self._writer = pq.ParquetWriter(self._temporary.path, self._schema)
        except OSError as error:
            self._temporary.end(keep=False)
            raise _unwritable(path, error) from error

    def write(self, frame: VideoFrame, tracks: Sequence[Track], drawn: NDArray[np.uint8] | None) -> None:
        """Adds a row a face; they reach the disk by the thousand."""
        self._rows += [_row(frame, track) for track in tracks]
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._to_disk(self._flush)

    def close(self, keep: bool = True) -> None:
        """See `Sink.close`; writes the last rows and the file's end."""
        with contextlib.suppress(KpError):
            if self._error is None:
                self._to_disk(self._flush)
            self._to_disk(self._writer.close)
        self._temporary.end(keep and self._error is None)
        if self._error is not None:
            raise _unwritable(self.path, self._error)

    def _to_disk(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, self._pa.ArrowException) as error:
            self._error = self._error or error
            raise _unwritable(self.path, error) from error

    def _flush(self) -> None:
        self._writer.write_table(self._pa.Table.from_pylist(self._rows, self._schema))
        self._rows = []


def _row(frame: VideoFrame, track: Track) -> dict[str, Any]:
    """One face on one frame as plain data; time in seconds, positions in pixels to a thousandth."""
    return {
        "time": round(frame.seconds, 6),
        "frame": frame.index,
        "track": track.id,
        "box_xyxy": np.round(track.box_xyxy, 3).tolist(),
        "keypoints_xy": np.round(track.xy.astype(np.float64), 3).tolist(),
        "lost_score": round(track.lost_score, 5),
    }


def _unwritable(path: Path, error: Exception, left: str = "") -> KpError:
    return KpError(f"can't write {path}: {getattr(error, 'strerror', None) or error}{left and f'; {left}'}")
