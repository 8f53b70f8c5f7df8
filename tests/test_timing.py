from __future__ import annotations

import itertools
import time

import pytest

from kp_runtime.timing import StageTimer, TimeSummary, summary_from_samples


def test_percentiles_of_known_samples() -> None:
    summary = summary_from_samples([i / 1000 for i in range(101)])
    assert summary == TimeSummary(101, *map(pytest.approx, (50, 50, 95, 99, 100)))


def test_outliers_stay_in() -> None:
    assert summary_from_samples([0.001] * 9 + [10.0]).max_ms == pytest.approx(10_000)


def test_stages_are_measured_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 0.25)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = StageTimer()
    for stage in ("b", "a", "b"):
        with timer(stage):
            pass
    assert timer.seconds == {"b": [0.25, 0.25], "a": [0.25]}
    assert [(name, s.samples, s.p50_ms) for name, s in timer.summaries().items()] == [("b", 2, 250.0), ("a", 1, 250.0)]


def test_a_stage_that_raises_is_timed_too() -> None:
    timer = StageTimer()
    with pytest.raises(KeyError), timer("a"):
        raise KeyError
    assert len(timer.seconds["a"]) == 1


def test_no_stages() -> None:
    assert StageTimer().summaries() == {}
