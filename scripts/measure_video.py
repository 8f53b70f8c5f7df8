"""Measures `kp run`: its speed (docs/video_measured.md), and jitter and lag of the smoothing (docs/video.md).

    python scripts/measure_video.py BUNDLE [--frames N] [--rounds N] [--threads N] [--detector NAME]

The picture is scikit-image's astronaut (NASA, public domain) on its cup of coffee, 1280 x 720 at 30 frames a
second. The detector looks for faces of at least a tenth of the height, as kp run does.

Speed: the face wanders and grows; each step runs alone on the same frames, then all of them together, in
turns, `--rounds` times each; and once with steps that wait instead of computing. Jitter: the same picture again
and again under fresh noise of 5 grey levels. Lag: the face moves sideways by a sine; the time shift that brings
the smoothed points nearest to the raw ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import starmap
from pathlib import Path

import cv2
import numpy as np
import skimage.data

from kp_cli.options import open_detector
from kp_cli.report import one_line_errors, print_table
from kp_runtime.detect import Detector
from kp_runtime.errors import InputError
from kp_runtime.pipeline import Model, load
from kp_runtime.track import Tracker, TrackerSettings
from kp_runtime.video import draw_tracks, run_video
from kp_runtime.video_sink import open_sinks
from kp_runtime.video_source import FileSource, VideoFrame

RATE, SIZE_WH = 30, (1280, 720)
FACE = 75
"""Longer side of the astronaut's 68 points in her photograph, pixels."""


def picture(x: float, y: float, zoom: float) -> np.ndarray:
    """The astronaut at a place on the background."""
    face = cv2.cvtColor(skimage.data.astronaut(), cv2.COLOR_RGB2BGR)
    ground = cv2.resize(cv2.cvtColor(skimage.data.coffee(), cv2.COLOR_RGB2BGR), SIZE_WH)
    matrix = np.array([[zoom, 0, x], [0, zoom, y]], np.float64)
    return np.asarray(cv2.warpAffine(face, matrix, SIZE_WH, dst=ground, borderMode=cv2.BORDER_TRANSPARENT))


def wandering(path: Path, frames: int) -> Path:
    """Writes a video of a face that wanders and grows."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), RATE, SIZE_WH)
    for t in np.arange(frames) / RATE:
        writer.write(picture(380 + 250 * np.sin(0.9 * t), 120 + 80 * np.cos(1.3 * t), 0.9 + 0.2 * np.sin(t)))
    writer.release()
    return path


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def speed(model: Model, detector: Detector, frames: int, rounds: int) -> None:
    """Prints frames a second of each step alone, and of the whole."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        video = wandering(folder / "in.mp4", frames)
        shown = list(FileSource(video))
        images = [frame.image for frame in shown]
        tracker = Tracker(model, detector)
        tracks = [tracker(frame.image, frame.seconds) for frame in shown]
        drawn = list(starmap(draw_tracks, zip(images, tracks, strict=True)))

        def sinks() -> list:
            return open_sinks(["mp4", "jsonl"], folder, "out", rate=RATE, size_hw=SIZE_WH[::-1], live=False)

        def write() -> None:
            opened = sinks()
            for frame, found, image in zip(shown, tracks, drawn, strict=True):
                for sink in opened:
                    sink.write(frame, found, image)
            for sink in opened:
                sink.close()

        def track() -> None:
            again = Tracker(model, detector)
            for frame in shown:
                again(frame.image, frame.seconds)

        steps: dict[str, Callable[[], object]] = {
            "read": lambda: deque(FileSource(video), maxlen=1),
            "track": track,
            "draw": lambda: deque(starmap(draw_tracks, zip(images, tracks, strict=True)), maxlen=1),
            "write": write,
            "whole": lambda: run_video(FileSource(video), Tracker(model, detector), sinks()),
        }
        times: dict[str, list[float]] = {step: [] for step in steps}
        for _ in range(rounds):
            for step, work in steps.items():
                times[step].append(frames / seconds(work))
    rows = [(step, *(f"{f(found):.1f}" for f in (max, np.median, min))) for step, found in times.items()]
    print_table(f"frames/s, {frames} frames {rounds} times", ("step", "best", "median", "worst"), rows)
    print(f"detector on {tracker.detector_runs} of {frames} frames, {tracker.faces} track(s)")


class Waiting:
    """Source, tracker and sink at once, which wait instead of computing: what is left is the pipeline's own doing."""

    name, stem, live, rate, size_hw, path, pictures = "waiting", "waiting", False, 30.0, (90, 160), Path("none"), True
    faces = detector_runs = 0

    def __init__(self, frames: int, read_s: float, track_s: float, write_s: float) -> None:
        self.count, self._read_s, self._track_s, self._write_s = frames, read_s, track_s, write_s

    def __iter__(self) -> Iterator[VideoFrame]:
        """Frames of one grey level."""
        for index in range(self.count):
            time.sleep(self._read_s)
            yield VideoFrame(index, index / 30, np.zeros((90, 160, 3), np.uint8))

    def __call__(self, image: np.ndarray, at: float) -> tuple:
        """No faces."""
        time.sleep(self._track_s)
        return ()

    def write(self, frame: VideoFrame, tracks: object, drawn: object) -> None:
        """Nothing."""
        time.sleep(self._write_s)

    def close(self, keep: bool = True) -> None:
        """Nothing."""


def overlap() -> None:
    """Prints how near the pipeline comes to its slowest step when no step needs a processor core."""
    rows, frames = [], 200
    for read_s, track_s, write_s in ((0.01, 0.02, 0.01), (0.02, 0.01, 0.01), (0.01, 0.01, 0.02), (0.02, 0.02, 0.02)):
        steps = Waiting(frames, read_s, track_s, write_s)
        alone = frames / seconds(lambda steps=steps: [steps(frame.image, 0) for frame in Waiting(frames, 0, 0, 0)])
        slowest = alone * track_s / max(read_s, track_s, write_s)
        whole = frames / seconds(lambda steps=steps: run_video(steps, steps, [steps]))  # type: ignore[misc]
        waits = [f"{1000 * wait:.0f}" for wait in (read_s, track_s, write_s)]
        rows.append((", ".join(waits), f"{slowest:.1f}", f"{whole:.1f}", f"{whole / slowest:.2f}"))
    print_table("steps that wait", ("ms of read, track, write", "slowest alone, frames/s", "whole", "ratio"), rows)


def points(model: Model, detector: Detector, frames: Iterator[np.ndarray], smooth: bool) -> np.ndarray:
    """The first track's points on every frame, `(frames, 68, 2)`."""
    tracker = Tracker(model, detector, TrackerSettings(smooth=smooth))
    return np.stack([tracker(image, i / RATE)[0].xy for i, image in enumerate(frames)]).astype(np.float64)


def noisy(places: np.ndarray) -> Iterator[np.ndarray]:
    """A frame a place of the face, in pixels from the left, each under its own noise."""
    rng = np.random.default_rng(68)
    for x in places:
        image = picture(x, 120, 1.0)
        noise = rng.normal(0, 5, image.shape)
        yield np.clip(image + noise, 0, 255).astype(np.uint8)


def steadiness(model: Model, detector: Detector) -> None:
    """Prints jitter and lag with and without smoothing."""
    spread = {}
    for smooth in (False, True):
        still = points(model, detector, noisy(np.full(130, 380.0)), smooth)[30:]
        spread[smooth] = still.std(axis=0).mean() / FACE, np.linalg.norm(np.diff(still, axis=0), axis=-1).mean() / FACE
    rows = [
        (name, f"{spread[False][i]:.3%}", f"{spread[True][i]:.3%}", f"{spread[False][i] / spread[True][i]:.1f}")
        for i, name in enumerate(("standard deviation", "from frame to frame"))
    ]
    print_table("jitter of a still face, in its longer side", ("measure", "raw", "smoothed", "cut by"), rows)
    rows = []
    for swing, hertz in ((0.5, 0.5), (1.0, 0.5), (0.5, 1.0)):
        x = 380 + swing * FACE * np.sin(2 * np.pi * hertz * np.arange(90) / RATE)
        raw, smoothed = (points(model, detector, noisy(x), smooth)[30:, :, 0].mean(axis=1) for smooth in (False, True))
        t = np.arange(60) / RATE
        inside = t >= 0.3
        lags = np.arange(0, 0.25, 0.001)
        off = [np.abs(np.interp(t[inside] - lag, t, raw) - smoothed[inside]).mean() for lag in lags]
        rows.append((f"{swing:g} faces to each side, {hertz:g} Hz", f"{1000 * lags[int(np.argmin(off))]:.0f} ms"))
    print_table("lag of a face that moves", ("movement", "lag"), rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="threads of each engine, and of each OpenCV call")
    parser.add_argument("--detector", default="auto", help="as kp run takes it")
    args = parser.parse_args()
    if args.frames < 1 or args.rounds < 1:
        raise InputError("--frames and --rounds must be 1 or more")
    cv2.setNumThreads(args.threads)
    model = load(args.bundle, threads=args.threads)
    detector = open_detector(args.detector, smallest=0.1, threads=args.threads)
    steadiness(model, detector)
    overlap()
    speed(model, detector, args.frames, args.rounds)


if __name__ == "__main__":
    with one_line_errors("measure_video"):
        main()
