"""`kp bench`: how long each stage takes on a photo, and the network alone by file and batch size.

Every sample is kept. What is compared is interleaved round by round, so that a change of the
machine's speed touches all alike. The network's input is real crops of the photo's faces.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.backend import Backend, open_backend
from kp_runtime.detect import Detector
from kp_runtime.errors import ImageError, InputError
from kp_runtime.frame import as_frame, image_from_file
from kp_runtime.geometry import matrices_from_boxes
from kp_runtime.photos import predict_photo
from kp_runtime.pipeline import Model
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.spec import Manifest
from kp_runtime.timing import StageTimer, TimeSummary, summary_from_turns

__all__ = ["Bench", "NetworkTime", "machine", "run_bench"]


@dataclass(frozen=True)
class NetworkTime:
    """The network alone: one file at one batch size; the summary is of a whole batch."""

    file: str
    sha256: str
    batch: int
    time: TimeSummary
    ms_a_face: float


@dataclass(frozen=True)
class Bench:
    """One run's numbers.

    Attributes:
        machine: what it ran on.
        bundle: the bundle's folder.
        photo: the photo, and how many faces were found on it.
        faces: number of faces in the photo.
        stages: read, detect, crop, infer, map back, for the whole photo.
        network: the network alone.
        threads: threads that the engine was given; None is its own choice.
    """

    machine: dict[str, Any]
    bundle: str
    photo: str
    faces: int
    stages: dict[str, TimeSummary]
    network: tuple[NetworkTime, ...]
    threads: int | None


def run_bench(
    bundle: Path,
    photo: Path,
    detector: Detector,
    *,
    batches: tuple[int, ...] = (1, 8),
    seconds: float = 3.0,
    threads: int | None = None,
) -> Bench:
    """Measures a bundle on a photo.

    Args:
        bundle: a bundle with ONNX files.
        photo: with at least one face.
        detector: finds its faces.
        batches: batch sizes of the network alone.
        seconds: about how long each thing is measured; at least 10 samples are taken.
        threads: threads of the engine; None leaves it the choice.

    Raises:
        InputError: a batch size or a thread count that makes no sense.
        ImageError: the photo can't be read or shows no face.
    """
    cores = os.cpu_count() or 1
    if any(batch < 1 for batch in batches):
        raise InputError(f"batch sizes must be 1 or more, got {', '.join(map(str, batches))}")
    if threads is not None and not 1 <= threads <= cores:
        raise InputError(f"threads must be 1 to {cores}, the cores of this machine; got {threads}")
    if not bundle.is_dir():
        raise InputError(f"bench compares the files of a bundle: give its folder, not {bundle}")
    model = Model(open_backend(bundle, threads=threads))
    found = predict_photo(model, photo, detector=detector).keypoints
    if not len(found):
        raise ImageError(f"no face was found on {photo}; bench on a photo with one")
    stages = _measure_stages(model, photo, detector, seconds)
    frame = as_frame(image_from_file(photo))
    matrices = matrices_from_boxes(found.boxes_xyxy, model.spec.size, model.spec.margin)
    crops = crops_from_frame(frame, matrices, model.spec.size)
    network = _measure_network(bundle, crops, batches, seconds, threads)
    return Bench(machine(), str(bundle), str(photo), len(found), stages, network, threads)


def _measure_stages(model: Model, photo: Path, detector: Detector, seconds: float) -> dict[str, TimeSummary]:
    timer = StageTimer()
    rounds, start = 0, time.perf_counter()
    while rounds < 10 or time.perf_counter() - start < seconds:
        predict_photo(model, photo, detector=detector, timer=timer)
        rounds += 1
    return timer.summaries()


def _measure_network(
    bundle: Path, crops: NDArray[np.uint8], batches: tuple[int, ...], seconds: float, threads: int | None
) -> tuple[NetworkTime, ...]:
    manifest = Manifest.read(bundle)
    names = [name for name, entry in manifest.files.items() if entry.kind == "onnx"]
    backends = {name: open_backend(bundle / name, threads=threads) for name in names}
    cases = [(name, batch) for name in names for batch in batches]
    inputs = {batch: np.ascontiguousarray(crops[np.arange(batch) % len(crops)]) for batch in batches}
    samples: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for name, batch in cases:
        _once(backends[name], inputs[batch])
    rounds, start = 0, time.perf_counter()
    while rounds < 10 or time.perf_counter() - start < seconds * len(cases):
        for name, batch in cases:
            samples[name, batch].append(_once(backends[name], inputs[batch]))
        rounds += 1
    result = []
    for name, batch in cases:
        summary = summary_from_turns([[s] for s in samples[name, batch]])
        result.append(NetworkTime(name, manifest.files[name].sha256, batch, summary, summary.p50_ms / batch))
    return tuple(result)


def _once(backend: Backend, crops: NDArray[np.uint8]) -> float:
    start = time.perf_counter()
    backend.infer(crops)
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """What this machine is: enough to tell two results files of different machines apart."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    import onnxruntime

    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "load_average": round(os.getloadavg()[0], 2),
    }
