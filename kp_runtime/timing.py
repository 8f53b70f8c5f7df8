"""Timing: stages of a call, things compared in turns, and what the samples say.

What is compared is run in turns, in an order that is drawn anew each round, so that a change of
the machine's speed touches all alike. A turn begins with a pause and one call that is not timed:
an engine's idle threads go on spinning for some milliseconds after a call and would take the
next engine's cores (measured on two cores: a median of 10 ms instead of 4). Within a turn every
call is a sample; none is dropped.

Calls of one turn are alike, so intervals come from a bootstrap over whole turns (Davison and
Hinkley 1997, section 3.8, resampling of clusters).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FEW_TURNS",
    "Ratio",
    "StageTimer",
    "TimeSummary",
    "measure_in_turns",
    "ratio_of_medians",
    "summary_from_turns",
]

Turns = list[list[float]]
"""Seconds, a list of samples for each turn."""

RESAMPLES = 2000

FEW_TURNS = 6
"""Under so many turns of a case, its 95% interval holds the truth in under nine of ten runs (docs/bench.md)."""


@dataclass(frozen=True)
class TimeSummary:
    """Percentiles of times in milliseconds; no sample is left out.

    Attributes:
        samples: how many.
        mean_ms: their mean.
        p50_ms: the median; `p50_low_ms` to `p50_high_ms` is its 95% bootstrap interval.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
        max_ms: the longest.
        min_ms: the shortest.
    """

    samples: int
    mean_ms: float
    p50_ms: float
    p50_low_ms: float
    p50_high_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    min_ms: float


@dataclass(frozen=True)
class Ratio:
    """How the median of one thing relates to that of another, with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`faster`, `slower`, or `not distinguishable` where the interval holds 1."""
        if self.low <= 1 <= self.high:
            return "not distinguishable"
        return "faster" if self.high < 1 else "slower"


class StageTimer:
    """Collects wall-clock times by stage; `with timer("crop"): …` adds one sample.

    Attributes:
        seconds: each stage's samples.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __repr__(self) -> str:
        stages = (f"{stage}: {len(samples)} sample(s)" for stage, samples in self.seconds.items())
        return f"StageTimer({', '.join(stages)})"

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times the block as one sample of `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds.setdefault(stage, []).append(time.perf_counter() - start)

    def totals(self) -> dict[str, float]:
        """Each stage's seconds in all, such as of the looks of one call."""
        return {stage: sum(seconds) for stage, seconds in self.seconds.items()}

    def add(self, call: StageTimer) -> None:
        """Adds one sample a stage of a call."""
        for stage, seconds in call.totals().items():
            self.seconds.setdefault(stage, []).append(seconds)

    def summaries(self) -> dict[str, TimeSummary]:
        """Each stage's summary in milliseconds (`p50_ms`, `p95_ms`, …), in the order in which the stages first ran."""
        # nothing is known of turns: every sample is one
        return {stage: summary_from_turns([[s] for s in samples]) for stage, samples in self.seconds.items()}


def measure_in_turns(
    cases: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 3.0,
    samples: int = 200,
    warm_up: float = 0.2,
    turn: float = 0.15,
    pause: float = 0.05,
    step: Callable[[float], None] = lambda share: None,
) -> dict[str, Turns]:
    """Times calls against each other.

    Args:
        cases: name to a call without arguments that returns when its work is done.
        seconds: least time measured for each case, pauses not counted.
        samples: least number of samples for each case.
        warm_up: seconds that each case runs before anything is measured.
        turn: least seconds of a turn; a turn has at least one sample.
        pause: seconds of rest before each turn.
        step: told the share that is done after each turn.

    Returns:
        The samples of each case, by turn, in seconds.
    """
    for call in cases.values():
        _until(call, warm_up)
    rng = np.random.default_rng(0)
    result: dict[str, Turns] = {name: [] for name in cases}
    names = list(cases)
    while names:
        for name in rng.permutation(names).tolist():
            time.sleep(pause)
            cases[name]()
            result[name].append(_until(cases[name], turn))
            step(float(np.mean([_share(turns, seconds, samples) for turns in result.values()])))
        names = [name for name in cases if _share(result[name], seconds, samples) < 1]
        # two turns are the least from which anything about their spread is known
        names = list(cases) if names or any(len(turns) < 2 for turns in result.values()) else []
    return result


def _share(turns: Turns, seconds: float, samples: int) -> float:
    """How much of a case's measuring is done, 0 to 1."""
    done = sum(map(sum, turns)) / seconds if seconds else 1.0
    return min(1.0, done, sum(map(len, turns)) / max(samples, 1))


def _until(call: Callable[[], object], seconds: float) -> list[float]:
    """Calls at least once and until the time is over; the time of each call."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    start = time.perf_counter()
    while not times or start < end:
        call()
        now = time.perf_counter()
        times.append(now - start)
        start = now
    return times


def summary_from_turns(turns: Sequence[Sequence[float]]) -> TimeSummary:
    """Percentiles of times given in seconds, by turn; at least one sample."""
    ms = np.concatenate([np.asarray(turn) for turn in turns]) * 1e3
    p50, p95, p99 = np.percentile(ms, [50, 95, 99]).tolist()
    low, high = np.percentile(_medians(turns), [2.5, 97.5]).tolist()
    return TimeSummary(
        len(ms), float(ms.mean()), p50, low * 1e3, high * 1e3, p95, p99, float(ms.max()), float(ms.min())
    )


def ratio_of_medians(new: Sequence[Sequence[float]], old: Sequence[Sequence[float]]) -> Ratio:
    """The new median over the old one: under 1 is faster. Times by turn, in any one unit."""
    value = float(np.median(np.concatenate([np.asarray(t) for t in new])))
    value /= float(np.median(np.concatenate([np.asarray(t) for t in old])))
    low, high = np.percentile(_medians(new, seed=1) / _medians(old, seed=2), [2.5, 97.5]).tolist()
    return Ratio(value, low, high)


def _medians(turns: Sequence[Sequence[float]], seed: int = 0) -> NDArray[np.float64]:
    """Medians of resampled sets of turns, `(RESAMPLES,)`: each a weighted median of all samples."""
    values = np.concatenate([np.asarray(turn, np.float64) for turn in turns])
    owner = np.repeat(np.arange(len(turns)), [len(turn) for turn in turns])
    order = np.argsort(values, kind="stable")
    values, owner = values[order], owner[order]
    rng = np.random.default_rng(seed)
    result = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = np.bincount(rng.integers(len(turns), size=len(turns)), minlength=len(turns))
        weight = np.cumsum(drawn[owner])
        middle = weight[-1] / 2
        low, high = np.searchsorted(weight, middle), np.searchsorted(weight, middle, side="right")
        result[i] = (values[low] + values[high]) / 2
    return result
