from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from kp_runtime.timing import StageTimer, measure_in_turns, ratio_of_medians, summary_from_turns


class Clock:
    """A clock that only moves when somebody sleeps or a call says how long it took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_percentiles_of_known_samples() -> None:
    summary = summary_from_turns([[i / 1000 for i in range(51)], [i / 1000 for i in range(51, 101)]])
    found = (summary.p50_ms, summary.p95_ms, summary.p99_ms, summary.max_ms, summary.min_ms, summary.mean_ms)
    assert found == pytest.approx((50, 95, 99, 100, 0, 50))
    assert summary.samples == 101


def test_outliers_stay_in() -> None:
    assert summary_from_turns([[0.001] * 9 + [10.0]]).max_ms == pytest.approx(10_000)


def test_the_interval_knows_that_a_turn_is_one_look(rng: np.random.Generator) -> None:
    """Turns that differ from one another make a wide interval, however many samples each has."""
    turns = [(level + rng.normal(0, 0.001, 100)).tolist() for level in rng.normal(1, 0.1, 20)]
    alike = [[sample] for turn in turns for sample in turn]
    wide, narrow = summary_from_turns(turns), summary_from_turns(alike)
    assert wide.p50_low_ms < wide.p50_ms < wide.p50_high_ms
    assert wide.p50_high_ms - wide.p50_low_ms > 3 * (narrow.p50_high_ms - narrow.p50_low_ms)


def test_the_interval_of_the_median_covers(rng: np.random.Generator) -> None:
    """Of a hundred benches of one thing, about 95 intervals hold the true median."""
    hits = 0
    for _ in range(100):
        turns = [rng.exponential(1.0, 5).tolist() for _ in range(40)]
        summary = summary_from_turns(turns)
        hits += summary.p50_low_ms <= np.log(2) * 1e3 <= summary.p50_high_ms
    assert 88 <= hits <= 100


@pytest.mark.parametrize(("factor", "verdict"), [(0.8, "faster"), (1.0, "not distinguishable"), (1.25, "slower")])
def test_verdicts(factor: float, verdict: str, rng: np.random.Generator) -> None:
    old = [rng.normal(1, 0.05, 20).tolist() for _ in range(30)]
    new = [rng.normal(factor, 0.05, 20).tolist() for _ in range(30)]
    ratio = ratio_of_medians(new, old)
    assert ratio.low < ratio.value < ratio.high
    assert ratio.value == pytest.approx(factor, rel=0.03)
    assert ratio.verdict == verdict


def test_turns_alternate_and_all_samples_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls: list[str] = []

    def case(name: str, seconds: float) -> object:
        def call() -> None:
            calls.append(name)
            clock.sleep(seconds)

        return call

    cases = {"fast": case("fast", 0.01), "slow": case("slow", 0.4)}
    shares: list[float] = []
    found = measure_in_turns(cases, seconds=1.0, samples=10, warm_up=0.1, turn=0.15, step=shares.append)  # type: ignore[arg-type]
    for name, each in (("fast", 0.01), ("slow", 0.4)):
        flat = [sample for turn in found[name] for sample in turn]
        assert flat == pytest.approx([each] * len(flat))
        assert len(flat) >= 10
        assert sum(flat) >= 1.0
    assert len(found["fast"]) == len(found["slow"])
    runs = [name for name, _ in itertools.groupby(calls)]
    assert runs.count("slow") > 4
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_one_sample_a_turn_is_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = measure_in_turns({"a": lambda: clock.sleep(1)}, seconds=0, samples=1, warm_up=0, turn=0)
    assert found == {"a": [[1.0], [1.0]]}


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
