"""What each stage of a face's way costs one core: decoding, detecting, cutting, the network.

    python -m benchmarks.stages --bundle engines/resnet18-68-lite --yunet yunet.onnx

Everything runs on one thread and in turns. Beside the time of a call there is the processor time that it
took, which other work on the machine hardly changes: that is what a plan for many cores needs. The
picture is scikit-image's portrait before its cup of coffee, on a 720p and a 1080p frame; JPEG at quality
90, and H.264 as the command ffmpeg makes it with libx264 (left out where it is not installed) of a face
that wanders.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import parser, run
from benchmarks.faces import picture, portrait, varied_crops
from benchmarks.record import record_from
from benchmarks.table import finish
from kp_runtime.backend import Backend
from kp_runtime.backend_by_name import open_backend
from kp_runtime.bench import StagedCalls
from kp_runtime.center_detector import CenterDetector
from kp_runtime.detect import HaarDetector, YuNetDetector
from kp_runtime.errors import KpError
from kp_runtime.frame import as_frame, image_from_file, import_cv2
from kp_runtime.geometry import matrices_from_boxes
from kp_runtime.preprocess_cpu import CpuCropper
from kp_runtime.timing import StageTimer, TimeSummary, measure_in_turns, summary_from_turns

__all__ = ["Case", "Stages", "cases_of", "measure_stages", "scene"]

DETECTOR = Path(__file__).resolve().parents[1] / "engines" / "face-detector"
SIZES_HW = ((720, 1280), (1080, 1920))
BATCHES = (1, 8)
RATE, CLIP_FRAMES = 30, 150
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Case:
    """What was measured.

    Attributes:
        stage: `decode`, `detect`, `crop` or `network`.
        what: of it, for people.
        faces: in a call; 0 where none are looked at.
        bytes: of the frame that is decoded; None elsewhere.
        time: of a call.
        cpu: processor time of a call, all threads together.
    """

    stage: str
    what: str
    faces: int
    bytes: float | None
    time: TimeSummary
    cpu: TimeSummary


@dataclass(frozen=True)
class Stages:
    """All cases, and what was left out, with the reason."""

    cases: list[Case]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Planned:
    """A call to measure; see `Case`."""

    stage: str
    what: str
    faces: int
    bytes: float | None
    call: Callable[[], object]


def scene(size_hw: tuple[int, int], t: float = 0.0) -> NDArray[np.uint8]:
    """The portrait before a photograph: `(h, w, 3)` uint8, BGR. The face wanders with `t`, seconds."""
    cv2 = import_cv2()
    height, width = size_hw
    frame = cv2.resize(image_from_file(picture("coffee.png")), (width, height))
    zoom = height / 720
    x, y = (0.4 + 0.15 * np.sin(0.9 * t)) * width, (0.15 + 0.1 * np.cos(1.3 * t)) * height
    matrix = np.array([[zoom, 0, x], [0, zoom, y]])
    drawn = cv2.warpAffine(portrait(), matrix, (width, height), dst=frame, borderMode=cv2.BORDER_TRANSPARENT)
    return np.asarray(drawn, np.uint8)


def cases_of(backend: Backend, yunet: Path | None, folder: Path, left_out: dict[str, str]) -> Iterator[Planned]:
    """The calls; `left_out` gets what can't be measured here. `folder` holds the video clips."""
    cv2 = import_cv2()
    for size_hw in SIZES_HW:
        frame, lines = scene(size_hw), f"{size_hw[0]}p"
        jpeg = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        yield Planned("decode", f"JPEG {lines}", 0, float(len(jpeg)), partial(cv2.imdecode, jpeg, cv2.IMREAD_COLOR))
        try:
            clip = h264_clip(folder / f"{lines}.mp4", size_hw)
            yield Planned("decode", f"H.264 {lines}", 0, clip.stat().st_size / CLIP_FRAMES, frames_of(clip))
        except KpError as error:
            left_out[f"H.264 {lines}"] = str(error)
        own = CenterDetector(DETECTOR, smallest=0.1, threads=1)
        yield Planned("detect", f"own {lines}", 0, None, partial(own, frame))
        yield Planned("detect", f"Haar {lines}", 0, None, partial(HaarDetector(smallest=0.1), frame))
        if yunet is not None:
            yield Planned("detect", f"YuNet {lines}", 0, None, partial(YuNetDetector(yunet), frame))
    if yunet is None:
        left_out["YuNet"] = "give its model file: --yunet FILE"
    spec = backend.spec
    wide = as_frame(scene(SIZES_HW[0]))
    box = np.array([[0.4 * 1280 + 181, 0.25 * 720 + 88, 0.4 * 1280 + 269, 0.25 * 720 + 178]])
    cropper = CpuCropper(1, None)
    for faces in BATCHES:
        matrices = matrices_from_boxes(np.tile(box, (faces, 1)), spec.size, spec.margin)
        yield Planned(
            "crop", f"{spec.size} px", faces, None, partial(cropper.crops_from_frame, wide, matrices, spec.size)
        )
        backend.warmup(faces)
        crops = varied_crops(faces, spec)
        yield Planned("network", backend.report.precision, faces, None, partial(backend.infer, crops))


def h264_clip(path: Path, size_hw: tuple[int, int]) -> Path:
    """Writes `CLIP_FRAMES` frames as H.264, x264's defaults.

    Raises:
        KpError: ffmpeg is not installed or has no libx264.
    """
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        raise KpError("ffmpeg is not installed: it makes the H.264 that is decoded")
    height, width = size_hw
    into = [ffmpeg, "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "bgr24", "-s", f"{width}x{height}"]
    into += ["-r", str(RATE), "-i", "-", "-c:v", "libx264", "-pix_fmt", "yuv420p", str(path)]
    with subprocess.Popen(into, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        try:
            for i in range(CLIP_FRAMES):
                process.stdin.write(scene(size_hw, i / RATE).tobytes())
            told = process.communicate()[1]
        except BrokenPipeError:
            told = process.stderr.read() if process.stderr else b""
    if process.returncode:
        raise KpError(f"ffmpeg made no H.264: {' '.join(told.decode(errors='replace').split())[:200]}")
    return path


def frames_of(path: Path) -> Callable[[], object]:
    """A call that decodes the next frame of a video on one thread; after the last one comes the first again."""
    cv2 = import_cv2()

    def opened() -> Iterator[object]:
        while True:
            capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
            found = False
            while (frame := capture.read())[0]:
                found = True
                yield frame[1]
            if not found:
                raise KpError(f"OpenCV can't decode {path.name}")

    return partial(next, opened())


def measure_stages(planned: list[Planned], *, seconds: float, samples: int) -> list[Case]:
    """Times all calls in turns, each with its processor time."""
    staged = {f"{p.stage} {p.what} {p.faces}": StagedCalls(partial(_with_cpu, p.call)) for p in planned}
    turns = measure_in_turns(staged, seconds=seconds, samples=samples)
    return [
        Case(
            p.stage,
            p.what,
            p.faces,
            p.bytes,
            summary_from_turns(turns[name]),
            summary_from_turns(calls.turns(turns[name])["cpu"]),
        )
        for p, (name, calls) in zip(planned, staged.items(), strict=True)
    ]


def _with_cpu(call: Callable[[], object], timer: StageTimer) -> None:
    before = time.process_time()
    call()
    timer.seconds["cpu"] = [time.process_time() - before]


def main() -> None:
    """Measures the stages with a bundle's network."""
    made = parser(__doc__, bundle=False)
    made.add_argument("--bundle", type=Path, required=True, help="a bundle's folder; its int8 file, or its best one")
    made.add_argument("--yunet", type=Path, help="a YuNet model file")
    made.add_argument("--seconds", type=float, default=3.0, help="least time for each case")
    made.add_argument("--samples", type=int, default=30, help="least number of samples of each case")
    args = made.parse_args()
    import_cv2().setNumThreads(1)
    backend = open_backend(args.bundle, "ort-cpu", threads=1)
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        planned = list(cases_of(backend, args.yunet, Path(folder), left_out))
        cases = measure_stages(planned, seconds=args.seconds, samples=args.samples)
    settings = {"threads": 1, "seconds": args.seconds, "samples": args.samples, "file": backend.report.file}
    record = record_from("stages", args.bundle, settings, Stages(cases, left_out))
    finish(record, args.out)


if __name__ == "__main__":
    run(main)
