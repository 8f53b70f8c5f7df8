"""Stage timing: how long each named part of a call took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["StageTimer", "TimeSummary", "summary_from_samples"]


@dataclass(frozen=True)
class TimeSummary:
    """Percentiles of a stage's times in milliseconds; no sample is left out."""

    samples: int
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


class StageTimer:
    """Collects wall-clock times by stage; `with timer("crop"): …` adds one sample."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times the block as one sample of `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds.setdefault(stage, []).append(time.perf_counter() - start)

    def summaries(self) -> dict[str, TimeSummary]:
        """Each stage's summary, in the order in which the stages first ran."""
        return {stage: summary_from_samples(samples) for stage, samples in self.seconds.items()}


def summary_from_samples(seconds: list[float]) -> TimeSummary:
    """Percentiles of times given in seconds; at least one."""
    ms = np.asarray(seconds) * 1e3
    p50, p95, p99 = np.percentile(ms, [50, 95, 99]).tolist()
    return TimeSummary(len(ms), float(ms.mean()), p50, p95, p99, float(ms.max()))
