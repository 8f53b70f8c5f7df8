"""A quick run of `kp bench`, and the same with times that hardly vary."""

from __future__ import annotations

import dataclasses

import numpy as np

from kp_runtime.bench_results import Bench, BenchSettings, Times, times_from_turns

QUICK = BenchSettings(batches=(1, 3), seconds=0, samples=3, threads=1)


def astronaut_box(image: object, layout: str = "bgr") -> np.ndarray:
    return np.array([[181.0, 88.0, 269.0, 178.0]])


def slower(times: Times, factor: float) -> Times:
    return times_from_turns([[ms * factor / 1e3 for ms in turn] for turn in times.turns_ms])


def steady(bench: Bench, factor: float = 1.0) -> Bench:
    """The same with times that hardly vary; those of the first network case are `factor` times as long."""
    even = times_from_turns([[0.010, 0.0101, 0.0102]] * 10)
    network = [dataclasses.replace(case, times=even) for case in bench.network]
    network[0] = dataclasses.replace(network[0], times=slower(even, factor))
    stages = dict.fromkeys(bench.photo.stages, even)
    photo = dataclasses.replace(bench.photo, whole=even, stages=stages)
    return dataclasses.replace(bench, network=tuple(network), photo=photo)
