"""Frames on their way through queues: a discrete-event simulation of cameras, decoders, detectors and networks.

Sources give frames; each goes through the stages in order. A stage's jobs run on the servers of its
pool (cores, GPUs), which stages may share; a free server takes the job of the latest stage that has
one, so that what was begun is finished. A stage may work on every n-th frame of a source alone, and
may collect frames into batches: it starts when a batch is full or its oldest frame has waited
`max_delay`. Where the room before a stage is full, its oldest frame is dropped, as of a live camera.

Time is in seconds. The same settings and seed give the same result.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kp_runtime.errors import InputError

__all__ = ["Outcome", "Sources", "Stage", "exponential", "fixed", "simulate"]

Seconds = Callable[[random.Random, int], float]
"""How long a job of so many frames takes."""


@dataclass(frozen=True)
class Sources:
    """Where frames come from.

    Attributes:
        count: number of cameras.
        rate: frames a second of each.
        random_gaps: gaps are exponential, as of a Poisson process; else the same, each camera's first frame at
            a random moment of the first gap.
    """

    count: int
    rate: float
    random_gaps: bool = False


@dataclass(frozen=True)
class Stage:
    """One step of the way.

    Attributes:
        name: of the stage.
        pool: name of the servers that do its jobs.
        seconds: how long a job takes.
        every: frames of a source from one that this stage works on to the next; the others pass it.
        batch: most frames of a job.
        max_delay: longest that a frame waits for others while a server is free.
        room: most frames that wait before it; None: any number.
    """

    name: str
    pool: str
    seconds: Seconds
    every: int = 1
    batch: int = 1
    max_delay: float = 0.0
    room: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of it; `used`, the times and `done_share` are of what came after the warm-up.

    Attributes:
        arrived: frames that came.
        done: frames that went the whole way.
        dropped: frames that were dropped.
        under_way: frames that were neither at the end.
        used: share of a pool's time that its servers worked.
        p50, p99, mean: seconds from a frame's arrival to its end; NaN where none was done.
        mean_batch: frames a job, by stage.
        done_share: of the frames that came, how many were done or still under way: 1 less the share that was dropped.
    """

    arrived: int
    done: int
    dropped: int
    under_way: int
    used: dict[str, float]
    p50: float
    p99: float
    mean: float
    mean_batch: dict[str, float]
    done_share: float


def fixed(first: float, more: float = 0.0) -> Seconds:
    """Jobs of a fixed time: `first` for one frame, and `more` for each further one of a batch."""
    return lambda rng, frames: first + (frames - 1) * more


def exponential(mean: float) -> Seconds:
    """Jobs whose times are exponential."""
    return lambda rng, frames: rng.expovariate(1 / mean)


def simulate(
    sources: Sources,
    stages: Sequence[Stage],
    servers: dict[str, int],
    *,
    seconds: float,
    warm_up: float = 0.0,
    seed: int = 0,
) -> Outcome:
    """Runs the queues from empty to `seconds`.

    Args:
        sources: the cameras.
        stages: the way of a frame, in order.
        servers: how many each pool has.
        seconds: when it ends.
        warm_up: frames that come before this are served but not measured.
        seed: of everything random.

    Raises:
        InputError: numbers that make no sense, or a stage whose pool has no server.
    """
    _check(sources, stages, servers, seconds, warm_up)
    run = _Run(sources, stages, servers, seconds, warm_up, random.Random(seed))
    run.go()
    return run.outcome()


def _check(sources: Sources, stages: Sequence[Stage], servers: dict[str, int], seconds: float, warm_up: float) -> None:
    if sources.count < 1 or not 0 < sources.rate < math.inf:
        raise InputError(f"there must be sources with a rate over 0, got {sources}")
    if not stages or not 0 <= warm_up < seconds < math.inf:
        raise InputError("there must be stages, and the end must come after the warm-up")
    for stage in stages:
        if servers.get(stage.pool, 0) < 1:
            raise InputError(f"the stage {stage.name} needs servers of the pool {stage.pool}, there are none")
        if stage.every < 1 or stage.batch < 1 or stage.max_delay < 0 or (stage.room is not None and stage.room < 1):
            raise InputError(f"every, batch and room of {stage.name} must be 1 or more, max_delay 0 or more")


@dataclass(slots=True)
class _Frame:
    arrived: float
    place: int
    """Its number in its source, plus an offset, so that not all sources want a stage at once."""
    queued: float = 0.0


@dataclass
class _Run:
    """A simulation at work."""

    sources: Sources
    stages: Sequence[Stage]
    servers: dict[str, int]
    end: float
    warm_up: float
    rng: random.Random
    arrived: int = 0
    dropped: int = 0
    counted: int = 0
    counted_dropped: int = 0
    done: int = 0
    latencies: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._now = 0.0
        self._queues: list[deque[_Frame]] = [deque() for _ in self.stages]
        self._free = dict(self.servers)
        self._busy = dict.fromkeys(self.servers, 0.0)
        self._jobs = [[0, 0] for _ in self.stages]  # jobs, frames

    def go(self) -> None:
        gap = 1 / self.sources.rate
        for source in range(self.sources.count):
            first = self.rng.expovariate(1 / gap) if self.sources.random_gaps else self.rng.random() * gap
            self._at(first, lambda source=source: self._arrive(source, 0))  # type: ignore[misc]
        while self._events and self._events[0][0] <= self.end:
            self._now, _, happen = heapq.heappop(self._events)
            happen()

    def outcome(self) -> Outcome:
        times = sorted(self.latencies)
        span = self.end - self.warm_up
        return Outcome(
            self.arrived,
            self.done,
            self.dropped,
            self.arrived - self.done - self.dropped,
            {pool: busy / (self.servers[pool] * span) for pool, busy in self._busy.items()},
            _percentile(times, 0.50),
            _percentile(times, 0.99),
            sum(times) / len(times) if times else math.nan,
            {s.name: frames / jobs if jobs else 0.0 for s, (jobs, frames) in zip(self.stages, self._jobs, strict=True)},
            1 - self.counted_dropped / self.counted if self.counted else 1.0,
        )

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        self._number += 1  # events of one moment happen in the order in which they were made
        heapq.heappush(self._events, (when, self._number, happen))

    def _arrive(self, source: int, number: int) -> None:
        gap = self.rng.expovariate(self.sources.rate) if self.sources.random_gaps else 1 / self.sources.rate
        self._at(self._now + gap, lambda: self._arrive(source, number + 1))
        self.arrived += 1
        self.counted += self._now >= self.warm_up
        self._enter(_Frame(self._now, number + source), 0)

    def _enter(self, frame: _Frame, at: int) -> None:
        """A frame comes to a stage, or to the next one that works on it, or to its end."""
        while at < len(self.stages) and frame.place % self.stages[at].every:
            at += 1
        if at == len(self.stages):
            self.done += 1
            if frame.arrived >= self.warm_up:
                self.latencies.append(self._now - frame.arrived)
            return
        stage, queue = self.stages[at], self._queues[at]
        frame.queued = self._now
        queue.append(frame)
        self._start(stage.pool)
        if stage.room is not None and len(queue) > stage.room:
            self.dropped += 1
            self.counted_dropped += queue.popleft().arrived >= self.warm_up
        if stage.batch > 1 and stage.max_delay and queue and queue[-1] is frame:
            self._at(self._now + stage.max_delay, lambda: self._start(stage.pool))

    def _start(self, pool: str) -> None:
        """Gives free servers of a pool what is ready."""
        while self._free[pool] and (at := self._ready(pool)) is not None:
            stage, queue = self.stages[at], self._queues[at]
            job = [queue.popleft() for _ in range(min(stage.batch, len(queue)))]
            self._jobs[at][0] += 1
            self._jobs[at][1] += len(job)
            until = self._now + stage.seconds(self.rng, len(job))
            self._busy[pool] += max(0.0, min(until, self.end) - max(self._now, self.warm_up))
            self._free[pool] -= 1
            self._at(until, lambda job=job, at=at: self._finish(job, at))  # type: ignore[misc]

    def _ready(self, pool: str) -> int | None:
        """The latest stage of a pool with a job that may start."""
        for at in reversed(range(len(self.stages))):
            stage, queue = self.stages[at], self._queues[at]
            if (
                stage.pool == pool
                and queue
                and (len(queue) >= stage.batch or self._now >= queue[0].queued + stage.max_delay)
            ):
                return at
        return None

    def _finish(self, job: list[_Frame], at: int) -> None:
        self._free[self.stages[at].pool] += 1
        for frame in job:
            self._enter(frame, at + 1)
        self._start(self.stages[at].pool)


def _percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan
