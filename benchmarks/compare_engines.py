"""How long the network takes in each engine, at each batch size, all in one run of turns.

    python -m benchmarks.compare_engines --bundle out/resnet18-68 --threads 2

Every engine first answers the same crops as PyTorch; one that is further from it than `LIMITS_PX`
is not timed. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import check_batches, parser, run
from benchmarks.engines import OPENVINO, ORT, Candidate, Infer, LeftOut, candidates_from_bundle
from benchmarks.faces import varied_crops
from benchmarks.record import record_from
from benchmarks.table import finish
from kp_runtime.cores import checked_threads
from kp_runtime.errors import KpError, reason_of
from kp_runtime.manifest import Manifest
from kp_runtime.timing import Ratio, TimeSummary, measure_in_turns, ratio_of_medians, summary_from_turns

__all__ = ["LIMITS_PX", "Case", "Comparison", "Int8Ratio", "compare"]

LIMITS_PX = {"fp32": 0.1, "fp16": 0.5, "bf16": 3.0, "int8": 3.0}
"""Largest distance to PyTorch's keypoints in pixels of the crop: over it an engine is wrong, not fast."""


@dataclass(frozen=True)
class Case:
    """One engine on one file at one batch size.

    Attributes:
        engine: its name; `precision` and `file` say what it ran, `sha256` is the file's.
        batch: crops a call.
        feeding: how the batch was fed, where `kp_runtime` had a choice.
        threads: of the engine.
        distance_px: largest distance to PyTorch's keypoints on the same crops, pixels of the crop.
        time: of a call with the whole batch.
        ms_a_face: median of a call over the batch; `_low` to `_high` is its 95% interval.
        turns_ms: all samples by turn, rounded to 0.1 µs.
    """

    engine: str
    precision: str
    file: str
    sha256: str
    batch: int
    feeding: str | None
    threads: int
    distance_px: float
    time: TimeSummary
    ms_a_face: float
    ms_a_face_low: float
    ms_a_face_high: float
    turns_ms: list[list[float]]


@dataclass(frozen=True)
class Int8Ratio:
    """ONNX Runtime's int8 median over OpenVINO's at one batch size: under 1, ONNX Runtime is faster."""

    batch: int
    ratio: Ratio


@dataclass(frozen=True)
class Comparison:
    """All cases of one run, what was left out and why, and the two int8 engines against each other."""

    cases: tuple[Case, ...]
    left_out: tuple[LeftOut, ...]
    int8_ort_over_openvino: tuple[Int8Ratio, ...]


@dataclass(frozen=True)
class _Ready:
    """A case whose answers were checked."""

    candidate: Candidate
    batch: int
    infer: Infer
    crops: NDArray[np.uint8]
    distance_px: float

    def __call__(self) -> object:
        return self.infer(self.crops)


def compare(
    candidates: Iterable[Candidate | LeftOut],
    crops: NDArray[np.uint8],
    *,
    batches: Sequence[int] = (1, 8, 32),
    threads: int,
    seconds: float = 3.0,
    samples: int = 12,
    warm_up: float = 0.2,
    step: Callable[[float], None] = lambda share: None,
) -> Comparison:
    """Checks every engine, then times those that are right in one interleaved run.

    Args:
        candidates: the engines; the first is the reference and must run.
        crops: `(n, 1, size, size)` uint8, at least as many as the largest batch.
        batches: crops a call.
        threads: what the engines were given, for the record.
        seconds: least time measured for each case.
        samples: least number of samples for each case.
        warm_up: seconds that each case runs before anything is measured.
        step: told the share of the timing that is done.

    Raises:
        InputError: a batch size that makes no sense.
        KpError: the reference does not run.
    """
    check_batches(batches, len(crops))
    candidates = list(candidates)
    if isinstance(first := candidates[0], LeftOut):
        raise KpError(f"the reference does not run: {first.reason}")
    reference = first.ready(len(crops))(crops).copy()
    left_out = [c for c in candidates if isinstance(c, LeftOut)]
    runnable = [c for c in candidates if isinstance(c, Candidate)]
    checked = [_checked(c, crops[:batch], reference[:batch]) for c in runnable for batch in batches]
    left_out += [c for c in checked if isinstance(c, LeftOut)]
    ready = [c for c in checked if isinstance(c, _Ready)]
    calls = {f"{r.candidate.name} {r.batch}": r for r in ready}
    turns = measure_in_turns(calls, seconds=seconds, samples=samples, warm_up=warm_up, step=step)
    cases = tuple(_case(r, turns[name], threads) for name, r in calls.items())
    return Comparison(cases, tuple(left_out), _int8_ratios(turns, batches))


def _checked(candidate: Candidate, crops: NDArray[np.uint8], wanted: NDArray[np.float32]) -> _Ready | LeftOut:
    """The engine at one batch size after its answers were compared, or why it is not timed."""
    crops = np.ascontiguousarray(crops)
    limit = LIMITS_PX[candidate.precision]
    try:
        infer = candidate.ready(len(crops))
        distance = float(np.linalg.norm(infer(crops) - wanted, axis=-1).max())
    except (KpError, RuntimeError, ImportError, OSError, ValueError) as error:  # engines share no base
        reason = reason_of(error)
    else:
        if distance <= limit:
            return _Ready(candidate, len(crops), infer, crops, distance)
        reason = f"wrong: a keypoint is {distance:.3f} px from PyTorch's, at most {limit:g} px is right"
    return LeftOut(candidate.engine, candidate.precision, len(crops), reason)


def _case(ready: _Ready, turns: list[list[float]], threads: int) -> Case:
    time, n = summary_from_turns(turns), ready.batch
    candidate = ready.candidate
    return Case(
        candidate.engine,
        candidate.precision,
        candidate.file,
        candidate.sha256,
        n,
        candidate.feeding(n),
        threads,
        ready.distance_px,
        time,
        time.p50_ms / n,
        time.p50_low_ms / n,
        time.p50_high_ms / n,
        [[round(sample * 1e3, 4) for sample in turn] for turn in turns],
    )


def _int8_ratios(turns: dict[str, list[list[float]]], batches: Sequence[int]) -> tuple[Int8Ratio, ...]:
    pairs = [(batch, f"{ORT} int8 {batch}", f"{OPENVINO} int8 {batch}") for batch in batches]
    return tuple(
        Int8Ratio(batch, ratio_of_medians(turns[ort], turns[openvino]))
        for batch, ort, openvino in pairs
        if ort in turns and openvino in turns
    )


def main() -> None:
    """Measures one bundle."""
    made = parser(__doc__)
    made.add_argument("--batch", type=int, action="append", help="repeatable; 1, 8 and 32 when left out")
    made.add_argument("--seconds", type=float, default=3.0, help="least time measured for each case")
    made.add_argument("--samples", type=int, default=12, help="least number of samples for each case")
    args = made.parse_args()
    threads, batches = checked_threads(args.threads), tuple(args.batch or (1, 8, 32))
    crops = varied_crops(max(1, *batches), Manifest.read(args.bundle).spec)
    result = compare(
        candidates_from_bundle(args.bundle, threads),
        crops,
        batches=batches,
        threads=threads,
        seconds=args.seconds,
        samples=args.samples,
        step=_tell,
    )
    settings = {"threads": threads, "seconds": args.seconds, "samples": args.samples}
    finish(record_from("engines", args.bundle, settings, result), args.out)


def _tell(share: float) -> None:
    if sys.stderr.isatty():
        print(f"\rmeasured {share:.0%}\033[K", end="\n" if share >= 1 else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
