"""How long everything that is not the network takes: crops of a frame, keypoints back to its pixels.

    python -m benchmarks.crop_path

A 1920 x 1080 BGR frame, one box or 32, crops of 224 and 112 px, and a backend that answers at once.
Beside it the chain that one would write by hand: slice, cvtColor, warpAffine; it averages nothing,
so it reads a large face at a fraction of its pixels. OpenCV has one thread in all of it; many boxes
are cut on one thread of ours, and again on as many as there are cores. The last line of stdout is one
JSON document.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import parser, run
from benchmarks.faces import portrait
from benchmarks.record import record_from
from benchmarks.table import finish
from kp_runtime.backend import Backend
from kp_runtime.bench import StagedCalls
from kp_runtime.cores import usable_cores
from kp_runtime.frame import import_cv2
from kp_runtime.pipeline import Model
from kp_runtime.spec import ModelSpec
from kp_runtime.timing import (
    Ratio,
    TimeSummary,
    measure_in_turns,
    ratio_of_medians,
    summary_from_turns,
)

__all__ = ["BOXES", "CropPath", "CropPathCase", "Scene", "crops_by_hand", "measure_crop_path"]

FRAME_HW = (1080, 1920)
BOXES = ((1, 80), (1, 200), (1, 400), (1, 700), (1, 1000), (32, 80), (32, 200))
"""Number of boxes and their side in pixels of the frame."""
SIZES = (224, 112)
CALLS = 1000
"""Of a scene with one box, for the growth of memory; with 32 a tenth of it tells as much."""


@dataclass(frozen=True)
class CropPathCase:
    """One number of boxes of one side, at one crop size.

    Attributes:
        faces: boxes a call.
        box: their side in pixels of the frame.
        size: side of the crop.
        threads: that cut them; by hand it is one.
        total: a call of `Model` with a backend that answers at once.
        crop: its stage from frame and boxes to crops.
        map_back: its stage from keypoints of the crops to keypoints of the frame.
        by_hand: slice, cvtColor and warpAffine for the same boxes; nothing else.
        crop_over_by_hand: ratio of the medians of these two.
        peak_kb: most memory that a call held at once beyond what was held before, in 1000 bytes.
        growth_kb: what `growth_calls` calls left behind.
        growth_calls: how many these were.
    """

    faces: int
    box: int
    size: int
    threads: int
    total: TimeSummary
    crop: TimeSummary
    map_back: TimeSummary
    by_hand: TimeSummary
    crop_over_by_hand: Ratio
    peak_kb: float
    growth_kb: float
    growth_calls: int


@dataclass(frozen=True)
class CropPath:
    """All cases of one run."""

    cases: tuple[CropPathCase, ...]


class InstantBackend(Backend):
    """Answers the same keypoints at once, whatever it is shown."""

    name = "instant"

    def __init__(self, spec: ModelSpec, faces: int, threads: int) -> None:
        super().__init__(spec)
        self.threads = threads
        self._keypoints = np.random.default_rng(0).uniform(0, spec.size, (faces, spec.points, 2)).astype(np.float32)

    def _run(self, crops: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        return [self._keypoints[: len(crops)]]


class Scene:
    """A frame, boxes on it, and the calls that are compared.

    Args:
        frame: `(h, w, 3)` uint8, BGR.
        faces: number of boxes.
        box: their side in pixels.
        size: side of the crop.
        threads: most that cut them.
    """

    def __init__(self, frame: NDArray[np.uint8], faces: int, box: int, size: int, threads: int = 1) -> None:
        self.faces, self.box, self.size, self.threads = faces, box, size, threads
        self.frame, self.boxes_xyxy = frame, spread_boxes(faces, box, frame.shape[:2])
        self._model = Model(InstantBackend(ModelSpec("instant", size=size), faces, threads))
        self.staged = StagedCalls(partial(self._model, self.frame, self.boxes_xyxy))

    @property
    def name(self) -> str:
        """What tells one scene from another."""
        return f"{self.faces} x {self.box} px to {self.size} px on {self.threads}"

    def total(self) -> object:
        """The whole call."""
        return self._model(self.frame, self.boxes_xyxy)

    def by_hand(self) -> object:
        """The floor."""
        return crops_by_hand(self.frame, self.boxes_xyxy, self.size, self._model.spec.margin)


def wide_frame() -> NDArray[np.uint8]:
    """The portrait enlarged and repeated to `(1080, 1920, 3)` uint8, BGR."""
    cv2 = import_cv2()
    height, width = FRAME_HW
    square = cv2.resize(portrait(), (height, height), interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(np.tile(square, (1, 2, 1))[:, :width])


def spread_boxes(faces: int, box: int, size_hw: tuple[int, ...]) -> NDArray[np.float64]:
    """Boxes `(faces, 4)` x0 y0 x1 y1, one in the middle or a grid of 8 columns, at fractions of a pixel."""
    height, width = size_hw
    columns = min(faces, 8)
    i = np.arange(faces)
    centres = np.stack(
        [(i % columns + 0.5) / columns * width + 0.3, (i // columns + 0.5) / -(-faces // columns) * height + 0.6], 1
    )
    return np.concatenate([centres - box / 2, centres + box / 2], axis=1)


def crops_by_hand(
    frame: NDArray[np.uint8], boxes_xyxy: NDArray[np.float64], size: int, margin: float
) -> NDArray[np.uint8]:
    """What one would write with OpenCV for the same squares: `(n, 1, size, size)` uint8, luma."""
    cv2 = import_cv2()
    height, width = frame.shape[:2]
    crops = np.empty((len(boxes_xyxy), 1, size, size), np.uint8)
    for crop, (x0, y0, x1, y1) in zip(crops, boxes_xyxy.tolist(), strict=True):
        side, cx, cy = margin * max(x1 - x0, y1 - y0), (x0 + x1) / 2, (y0 + y1) / 2
        left, top = max(0, int(cx - side / 2) - 1), max(0, int(cy - side / 2) - 1)
        right, bottom = min(width, int(cx + side / 2) + 2), min(height, int(cy + side / 2) + 2)
        grey = cv2.cvtColor(frame[top:bottom, left:right], cv2.COLOR_BGR2GRAY)
        scale, middle = size / side, (size - 1) / 2
        matrix = np.array([[scale, 0, middle - scale * (cx - left)], [0, scale, middle - scale * (cy - top)]])
        cv2.warpAffine(grey, matrix, (size, size), dst=crop[0], borderMode=cv2.BORDER_REPLICATE)
    return crops


def measure_crop_path(
    scenes: Sequence[Scene],
    *,
    seconds: float = 0.4,
    samples: int = 20,
    warm_up: float = 0.05,
    calls: int = CALLS,
) -> CropPath:
    """Times all scenes against each other in one run, then counts what their calls allocate.

    Args:
        scenes: what is compared.
        seconds: least time measured for each of a scene's three calls.
        samples: least number of samples of each.
        warm_up: seconds that each runs before anything is measured.
        calls: of each scene with one box, for the growth of memory.
    """
    cv2 = import_cv2()
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        cases: dict[str, Callable[[], object]] = {}
        for s in scenes:
            cases |= {f"{s.name} total": s.total, f"{s.name} staged": s.staged, f"{s.name} by hand": s.by_hand}
        # no engine's threads spin here: short turns and pauses are enough
        turns = measure_in_turns(cases, seconds=seconds, samples=samples, warm_up=warm_up, turn=0.06, pause=0.01)
        return CropPath(tuple(_case(s, turns, calls if s.faces == 1 else calls // 10) for s in scenes))
    finally:
        cv2.setNumThreads(threads)


def _case(scene: Scene, turns: dict[str, Any], calls: int) -> CropPathCase:
    staged, by_hand = turns[f"{scene.name} staged"], turns[f"{scene.name} by hand"]
    stages = scene.staged.turns(staged)
    crop, back = stages["crop"], stages["map back"]
    return CropPathCase(
        scene.faces,
        scene.box,
        scene.size,
        scene.threads,
        summary_from_turns(turns[f"{scene.name} total"]),
        summary_from_turns(crop),
        summary_from_turns(back),
        summary_from_turns(by_hand),
        ratio_of_medians(crop, by_hand),
        *_allocated(scene.total, calls),
        calls,
    )


def _allocated(call: Callable[[], object], calls: int) -> tuple[float, float]:
    """The peak of a call and the growth over all, in 1000 bytes, as numpy and Python tell tracemalloc."""
    call()
    gc.collect()
    tracemalloc.start()
    try:
        call()  # what is only made once counts as held
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        call()
        peak = tracemalloc.get_traced_memory()[1] - before
        for _ in range(calls - 1):
            call()
        gc.collect()
        growth = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    return round(peak / 1000, 3), round(growth / 1000, 3)


def main() -> None:
    """Measures all scenes."""
    made = parser(__doc__, bundle=False)
    made.add_argument("--seconds", type=float, default=0.4, help="least time measured for each case")
    args = made.parse_args()
    frame = wide_frame()
    scenes = [
        Scene(frame, faces, box, size, threads)
        for size in SIZES
        for faces, box in BOXES
        for threads in sorted({1, usable_cores() if faces > 1 else 1})
    ]
    result = measure_crop_path(scenes, seconds=args.seconds)
    settings = {"seconds": args.seconds, "opencv_threads": 1, "frame_hw": FRAME_HW}
    finish(record_from("crop-path", None, settings, result), args.out)


if __name__ == "__main__":
    run(main)
