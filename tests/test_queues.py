"""The simulation of queues against what queueing theory knows exactly.

Random runs are of fixed seeds and long enough that the named tolerance is several of their standard
errors; the formulas are those of Kleinrock, Queueing Systems (1975), volume 1.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.queues import Outcome, Sources, Stage, exponential, fixed, simulate
from kp_runtime.errors import InputError

CAMERAS = Sources(40, 10.0)


def one_queue(seconds: Any, servers: int, rate: float, *, until: float = 5000, **stage: Any) -> Outcome:
    """A Poisson stream through one stage."""
    way = [Stage("work", "cores", seconds, **stage)]
    return simulate(Sources(1, rate, True), way, {"cores": servers}, seconds=until, warm_up=until / 20)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_m_m_1(load: float) -> None:
    """The time in the system is exponential of mean 1 / (mu - lambda)."""
    outcome = one_queue(exponential(0.1), 1, load * 10)
    mean = 1 / (10 - load * 10)
    assert outcome.mean == pytest.approx(mean, rel=0.05)
    assert outcome.p50 == pytest.approx(mean * math.log(2), rel=0.05)
    assert outcome.p99 == pytest.approx(mean * math.log(100), rel=0.1)
    assert outcome.used["cores"] == pytest.approx(load, rel=0.02)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_m_d_1(load: float) -> None:
    """Pollaczek and Khinchine: the wait is rho s / (2 (1 - rho)), half of M/M/1's."""
    outcome = one_queue(fixed(0.1), 1, load * 10)
    assert outcome.mean == pytest.approx(0.1 + load * 0.1 / (2 * (1 - load)), rel=0.03)


@pytest.mark.parametrize(("servers", "load"), [(2, 0.7), (4, 0.8)])
def test_m_m_c(servers: int, load: float) -> None:
    """Erlang's C: the wait is C / (c mu - lambda)."""
    offered = servers * load
    tail = offered**servers / math.factorial(servers) / (1 - load)
    waits = tail / (sum(offered**k / math.factorial(k) for k in range(servers)) + tail)
    outcome = one_queue(exponential(0.1), servers, offered * 10, until=2000)
    assert outcome.mean == pytest.approx(0.1 + waits / (servers * 10 * (1 - load)), rel=0.05)


def test_d_d_c_waits_for_nobody() -> None:
    """One camera whose frames come in even gaps, and jobs that take less than the servers' gaps."""
    outcome = simulate(Sources(1, 10.0), [Stage("work", "cores", fixed(0.19))], {"cores": 2}, seconds=100)
    assert outcome.p50 == pytest.approx(0.19)
    assert outcome.p99 == pytest.approx(0.19)
    assert outcome.used["cores"] == pytest.approx(0.95, rel=0.01)


def test_d_d_c_overloaded_works_all_the_time_and_drops_the_rest() -> None:
    way = [Stage("work", "cores", fixed(0.02), room=4)]
    outcome = simulate(CAMERAS, way, {"cores": 4}, seconds=60, warm_up=1)
    assert outcome.used["cores"] == pytest.approx(1.0, abs=1e-6)
    assert outcome.done / 60 == pytest.approx(4 / 0.02, rel=0.01)  # c mu
    assert outcome.done_share == pytest.approx(4 / 0.02 / 400, rel=0.02)
    # it waits for at most the four before it on four servers, and then is served
    assert outcome.p99 <= 0.02 + 0.02 + 1e-9


def test_tandem_of_m_m_1() -> None:
    """Jackson: what leaves one M/M/1 is Poisson again, so the times of two add up."""
    way = [Stage("first", "a", exponential(0.1)), Stage("second", "b", exponential(0.05))]
    outcome = simulate(Sources(1, 6.0, True), way, {"a": 1, "b": 1}, seconds=5000, warm_up=250)
    assert outcome.mean == pytest.approx(1 / (10 - 6) + 1 / (20 - 6), rel=0.05)
    assert outcome.used == pytest.approx({"a": 0.6, "b": 0.3}, rel=0.03)


@pytest.mark.parametrize("room", [None, 1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_no_frame_is_lost_or_made(room: int | None, seed: int) -> None:
    way = [
        Stage("decode", "cores", exponential(0.004), room=room),
        Stage("detect", "cores", exponential(0.03), every=5, room=room),
        Stage("network", "gpu", fixed(0.01, 0.001), batch=8, max_delay=0.005, room=room),
    ]
    outcome = simulate(CAMERAS, way, {"cores": 3, "gpu": 1}, seconds=10, seed=seed)
    assert outcome.arrived == pytest.approx(4000, abs=40)
    assert outcome.arrived == outcome.done + outcome.dropped + outcome.under_way
    assert outcome.under_way >= 0
    assert (outcome.dropped > 0) == (room is not None)
    assert simulate(CAMERAS, way, {"cores": 3, "gpu": 1}, seconds=10, seed=seed) == outcome


def test_every_nth_frame_is_worked_on() -> None:
    """Of 400 frames a second a tenth takes 50 ms: 2 servers' work of 5."""
    way = [Stage("detect", "cores", fixed(0.05), every=10)]
    outcome = simulate(CAMERAS, way, {"cores": 5}, seconds=60, warm_up=5)
    assert outcome.used["cores"] == pytest.approx(0.4, rel=0.01)
    assert outcome.p50 == 0.0
    assert outcome.p99 >= 0.05


def test_stages_share_their_pool() -> None:
    way = [Stage("decode", "cores", fixed(0.004)), Stage("network", "cores", fixed(0.002))]
    outcome = simulate(CAMERAS, way, {"cores": 3}, seconds=30, warm_up=1)
    assert outcome.used["cores"] == pytest.approx(400 * 0.006 / 3, rel=0.01)


def test_a_batch_waits_until_it_is_full_or_its_time_is_over() -> None:
    """Frames every 10 ms: with 100 ms of patience four come together, with 25 ms three."""
    one, server = Sources(1, 100.0), {"gpu": 1}

    def run(max_delay: float) -> Outcome:
        way = [Stage("network", "gpu", fixed(0.001), batch=4, max_delay=max_delay)]
        return simulate(one, way, server, seconds=20, warm_up=1)

    full, timed, at_once = run(0.1), run(0.025), run(0.0)
    assert full.mean_batch["network"] == pytest.approx(4, rel=0.01)
    assert full.p99 == pytest.approx(0.03 + 0.001)  # the first of four
    assert timed.mean_batch["network"] == pytest.approx(3, rel=0.01)
    assert timed.p99 == pytest.approx(0.025 + 0.001)
    assert at_once.mean_batch["network"] == 1
    assert at_once.p99 == pytest.approx(0.001)


def test_a_busy_server_collects_batches_by_itself() -> None:
    """1000 frames a second at 4 ms a job: without batches a quarter fits, in batches all do."""
    way = [Stage("network", "gpu", fixed(0.004), batch=8)]
    outcome = simulate(Sources(50, 20.0), way, {"gpu": 1}, seconds=20, warm_up=2)
    assert outcome.mean_batch["network"] == pytest.approx(4, rel=0.05)
    assert outcome.p99 < 0.009


@pytest.mark.parametrize(
    ("sources", "stage", "servers", "message"),
    [
        (Sources(0, 1.0), {}, 1, "sources with a rate over 0"),
        (Sources(1, math.inf), {}, 1, "sources with a rate over 0"),
        (Sources(1, 1.0), {}, 0, "needs servers of the pool cores, there are none"),
        (Sources(1, 1.0), {"every": 0}, 1, "every, batch and room of work must be 1 or more"),
        (Sources(1, 1.0), {"room": 0}, 1, "every, batch and room of work"),
        (Sources(1, 1.0), {"max_delay": -1.0}, 1, "max_delay 0 or more"),
    ],
)
def test_settings_that_make_no_sense(sources: Sources, stage: dict[str, Any], servers: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate(sources, [Stage("work", "cores", fixed(0.1), **stage)], {"cores": servers}, seconds=1)
    with pytest.raises(InputError, match="the end must come after the warm-up"):
        simulate(Sources(1, 1.0), [Stage("work", "cores", fixed(0.1))], {"cores": 1}, seconds=1, warm_up=1)
