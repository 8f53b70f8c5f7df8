"""Writes the tables of docs/scale.md: what a face costs, what a machine holds, and how many of them many streams need.

    python -m benchmarks.scale [--price 0.10]

Times are those of benchmarks/results/ and nothing else: a device without a result has no number. How
many streams a machine holds comes of `benchmarks.queues` with the measured processor times. `--price`
is what a machine costs an hour, in a currency of yours; with it the costs are printed and the page stays.
What stands between the two markers of the page is made; the text around them is written by hand.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.command import markdown_table, run, with_made_part
from benchmarks.queues import Outcome, Sources, Stage, fixed, simulate
from benchmarks.record import RESULTS, Record, machine_name, read_records
from kp_runtime.errors import InputError
from kp_runtime.files import write_file

__all__ = ["BEGIN", "DOCS", "END", "Way", "scale_page", "streams_held"]

DOCS = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
BEGIN = "<!-- begin: made by python -m benchmarks.scale -->"
END = "<!-- end: made by python -m benchmarks.scale -->"

STREAMS = (10, 1_000, 100_000)
RATE = 15.0
"""Frames a second of a stream."""

LIMIT_S = 0.5
"""A machine is full when p99 from a frame's arrival to its keypoints is over this, or a frame of 1,000 is dropped."""

SECONDS, WARM_UP = 12.0, 2.0
ROOM = 2
"""Frames of each stream that may wait before a stage; then the oldest is dropped."""

CORES = (2, 16)


@dataclass(frozen=True)
class Way:
    """What is done with a stream's frames.

    Attributes:
        decode: how its frames come, by the name of the measured case.
        detect: the detector, likewise.
        every: frames from one run of the detector to the next.
        faces: on a frame.
        host_only: the network runs elsewhere, on a GPU.
    """

    decode: str
    detect: str
    every: int
    faces: int
    host_only: bool = False

    def __str__(self) -> str:
        often = "each frame" if self.every == 1 else f"every {self.every}th"
        where = "; network on a GPU" if self.host_only else ""
        faces = f"{self.faces} face{'s' * (self.faces != 1)}"
        return f"{self.decode}, {self.detect.split()[0]} detector {often}, {faces}{where}"


WAYS = (
    Way("JPEG 720p", "own 720p", 1, 1),
    Way("JPEG 720p", "YuNet 720p", 1, 1),
    Way("JPEG 720p", "Haar 720p", 1, 1),
    Way("H.264 720p", "own 720p", 30, 1),
    Way("H.264 720p", "own 720p", 30, 4),
    Way("H.264 1080p", "own 1080p", 30, 1),
    Way("H.264 720p", "own 720p", 30, 1, True),
    Way("H.264 720p", "own 720p", 30, 4, True),
)
STREAM = WAYS[3]
"""The way of the streams that are counted: what `kp run` does."""


class Costs:
    """Processor time of each stage on one core, milliseconds, from a result of kind `stages`."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._ms = {(c["stage"], c["what"], c["faces"]): c["cpu"]["p50_ms"] for c in record.measured["cases"]}
        self._bytes = {c["what"]: c["bytes"] for c in record.measured["cases"]}

    def of(self, stage: str, what: str) -> float:
        """A call of a stage that looks at no faces."""
        return float(self._ms[stage, what, 0])

    def of_faces(self, stage: str, faces: int) -> float:
        """A call with so many faces: what one costs, and what each further one of eight adds."""
        (one,) = [ms for (name, _, n), ms in self._ms.items() if (name, n) == (stage, 1)]
        (eight,) = [ms for (name, _, n), ms in self._ms.items() if (name, n) == (stage, 8)]
        return float(one + (faces - 1) * (eight - one) / 7)

    def bytes_of(self, what: str) -> float:
        """Bytes of a frame."""
        return float(self._bytes[what])

    def stages(self, way: Way) -> dict[str, float]:
        """Milliseconds of one core that a frame costs on average, by stage."""
        return {
            "decode": self.of("decode", way.decode),
            "detect": self.of("detect", way.detect) / way.every,
            "crop": self.of_faces("crop", way.faces),
            "network": 0.0 if way.host_only else self.of_faces("network", way.faces),
        }

    def known(self, way: Way) -> bool:
        """Whether all that the way needs was measured."""
        return ("decode", way.decode, 0) in self._ms and ("detect", way.detect, 0) in self._ms


def scale_page(text: str, records: Sequence[Record]) -> str:
    """The page with its tables made anew.

    Raises:
        InputError: the page lacks the markers, or there is no result to plan with.
    """
    return with_made_part(text, BEGIN, END, "\n\n".join(_sections(records)))


def _sections(records: Sequence[Record]) -> Iterable[str]:
    yield "## Faces a second, and what a million costs"
    yield (
        "The network alone, at the batch size that gives most faces a second. A million faces cost the machine-hours "
        "of the last column, times your price of an hour."
    )
    yield markdown_table(
        ("device", "model", "file", "engine", "batch", "faces a second", "machine-hours a million"),
        [(*row[:-1], f"{row[-1]:.3g}") for row in _faces_rows(records)],
    )
    if not _gpu_network(records):
        yield "**GPUs: not measured yet.** `make bench-gpu` on one makes the results, and this script their rows."
    costs = _costs(records)
    ways = [way for way in WAYS if costs.known(way)]
    yield "## What a frame costs one core, and where the bottleneck is"
    yield _measured_on(costs)
    yield markdown_table(
        (
            "frames",
            *("decode", "detect", "crop", "network", "all, ms"),
            "frames a second and core",
            "core-hours a million frames",
            "most is",
        ),
        [_frame_row(way, costs) for way in ways],
    )
    size = costs.record.bundle["size"]
    frames = [f"{what} {costs.bytes_of(what) / 1e3:.1f} kB" for what in dict.fromkeys(way.decode for way in ways)]
    yield f"Bytes a frame of these: {', '.join(frames)}; a crop of {size} px {size**2 / 1e3:.1f} kB; keypoints 0.5 kB."
    if STREAM not in ways:
        yield f"No streams are counted: {STREAM} was not measured here."
        return
    yield "## How many streams a machine holds"
    yield (
        f"Simulated: {STREAM}; {RATE:g} frames a second; full when p99 is over {LIMIT_S * 1e3:g} ms or a frame in "
        f"1,000 is dropped. Two cores were measured; {CORES[1]} are {CORES[1]} such cores, which we had not."
    )
    yield markdown_table(
        ("cores", "streams held", "of what the cores could do", "used", "p50 ms", "p99 ms"),
        [_held_row(cores, costs) for cores in CORES],
    )
    yield "What the load does, on the larger one:"
    yield markdown_table(("streams", "load", "used", "p50 ms", "p99 ms", "dropped"), [*_load_rows(costs)])
    yield "## 10, 1,000 and 100,000 streams"
    yield markdown_table(
        (
            "streams",
            *(f"machines of {cores} cores" for cores in CORES),
            "core-hours a day",
            "video in, Gbit/s",
            "keypoints out, Gbit/s",
        ),
        [_streams_row(streams, costs) for streams in STREAMS],
    )
    yield "## What waiting for a batch does"
    yield (
        f"Simulated: faces at random moments, at 80% of what two cores do one by one; batches of up to 8. One face "
        f"takes {costs.of_faces('network', 1):.2f} ms of a core, eight {costs.of_faces('network', 8):.2f}."
    )
    yield markdown_table(
        ("longest wait, ms", "mean batch", "used", "p50 ms", "p99 ms"),
        [_batch_row(ms, costs) for ms in (0, 2, 5, 10, 20)],
    )


def _faces_rows(records: Sequence[Record]) -> Iterable[tuple[Any, ...]]:
    for record in (record for record in records if record.kind == "engines"):
        device = machine_name(record.machine)
        best: dict[str, dict[str, Any]] = {}
        for case in record.measured["cases"]:
            if case["engine"] == "ONNX Runtime":
                kept = best.get(case["precision"], case)
                best[case["precision"]] = min(case, kept, key=lambda c: float(c["ms_a_face"]))
        for precision, case in best.items():
            yield _faces_row(device, record, precision, "ONNX Runtime", case["batch"], case["ms_a_face"])
    for record in _gpu_network(records):
        calls: dict[str, dict[str, Any]] = {}
        for case in (case for case in record.measured["cases"] if case["batch"]):
            kept = calls.get(case["what"], case)
            calls[case["what"]] = min(case, kept, key=lambda c: float(c["time"]["p50_ms"] / c["batch"]))
        for what, case in calls.items():
            ms = case["time"]["p50_ms"] / case["batch"]
            yield _faces_row(record.measured["device"]["name"], record, "", what, case["batch"], ms)


def _faces_row(device: str, record: Record, file: str, engine: str, batch: int, ms: float) -> tuple[Any, ...]:
    """A row; the last cell, machine-hours a million, is a number."""
    name, reduce = record.bundle["name"], record.bundle.get("reduce", 1)
    if reduce > 1:  # a network of the same name that sees fewer pixels is another one
        name += f", means of {reduce} x {reduce}"
    return device, name, file, engine, batch, f"{1e3 / ms:.0f}", 1e6 * ms / 3.6e6


def _gpu_network(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.kind == "gpu-network" and record.measured["cases"]]


def _costs(records: Sequence[Record]) -> Costs:
    found = [record for record in records if record.kind == "stages"]
    if not found:
        raise InputError("there is no result of kind stages; measure with: python -m benchmarks.stages")
    return Costs(found[0])


def _measured_on(costs: Costs) -> str:
    return (
        f"Processor time of one core of {machine_name(costs.record.machine)}, milliseconds a frame; "
        f"{costs.record.bundle['name']}, `{costs.record.settings['file']}`. The detector's time is spread over the "
        "frames between its runs."
    )


def _frame_row(way: Way, costs: Costs) -> tuple[Any, ...]:
    stages = costs.stages(way)
    total, most = sum(stages.values()), max(stages, key=lambda name: stages[name])
    shown = [f"{ms:.2f}" for ms in stages.values()]
    a_million = f"{total / 3.6:.1f}"  # 1e6 frames of so many ms, in hours of 3.6e6 ms
    share = f"{most}, {stages[most] / total:.0%}"
    return str(way), *shown, f"{total:.1f}", f"{1e3 / total:.0f}", a_million, share


@lru_cache(maxsize=64)
def _simulated(decode: float, detect: float, work: float, every: int, streams: int, cores: int) -> Outcome:
    room = ROOM * streams
    stages = [
        Stage("decode", "cores", fixed(decode / 1e3), room=room),
        Stage("detect", "cores", fixed(detect / 1e3), every=every, room=room),
        Stage("network", "cores", fixed(work / 1e3), room=room),
    ]
    return simulate(Sources(streams, RATE), stages, {"cores": cores}, seconds=SECONDS, warm_up=WARM_UP)


def _outcome(costs: Costs, way: Way, streams: int, cores: int) -> Outcome:
    work = costs.of_faces("crop", way.faces) + costs.of_faces("network", way.faces)
    return _simulated(costs.of("decode", way.decode), costs.of("detect", way.detect), work, way.every, streams, cores)


def _bound(costs: Costs, way: Way, cores: int) -> float:
    """Streams that the cores could do if nothing ever waited."""
    return cores * 1e3 / sum(costs.stages(way).values()) / RATE


def streams_held(costs: Costs, way: Way, cores: int) -> int:
    """The most streams that a machine of so many cores holds within the limits; 0 where not even one."""
    low, high = 0, math.floor(_bound(costs, way, cores)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        outcome = _outcome(costs, way, middle, cores)
        fits = outcome.p99 <= LIMIT_S and outcome.done_share >= 0.999
        low, high = (middle, high) if fits else (low, middle)
    return low


def _held_row(cores: int, costs: Costs) -> tuple[Any, ...]:
    held = streams_held(costs, STREAM, cores)
    if not held:
        return cores, 0, "0%", "", "", ""
    outcome = _outcome(costs, STREAM, held, cores)
    share = held / _bound(costs, STREAM, cores)
    return cores, held, f"{share:.0%}", f"{outcome.used['cores']:.0%}", *_latency(outcome)


def _load_rows(costs: Costs) -> Iterable[tuple[Any, ...]]:
    cores = CORES[-1]
    for load in (0.5, 0.8, 0.9, 1.1):
        streams = max(1, round(load * _bound(costs, STREAM, cores)))
        outcome = _outcome(costs, STREAM, streams, cores)
        real = streams / _bound(costs, STREAM, cores)
        used = f"{outcome.used['cores']:.0%}"
        yield streams, f"{real:.0%}", used, *_latency(outcome), f"{1 - outcome.done_share:.1%}"


def _latency(outcome: Outcome) -> tuple[str, str]:
    return f"{outcome.p50 * 1e3:.0f}", f"{outcome.p99 * 1e3:.0f}"


def _streams_row(streams: int, costs: Costs) -> tuple[Any, ...]:
    machines = []
    for cores in CORES:
        held = streams_held(costs, STREAM, cores)
        machines.append(f"{math.ceil(streams / held):,}" if held else "none holds one")
    core_hours = streams * RATE * sum(costs.stages(STREAM).values()) / 1e3 * 24
    video = streams * RATE * costs.bytes_of(STREAM.decode) * 8 / 1e9
    points = streams * RATE * STREAM.faces * 68 * 2 * 4 * 8 / 1e9
    return f"{streams:,}", *machines, f"{core_hours:,.0f}", f"{video:.3g}", f"{points:.3g}"


def _batch_row(wait_ms: float, costs: Costs) -> tuple[Any, ...]:
    one, eight = (costs.of_faces("network", n) / 1e3 for n in (1, 8))
    job = fixed(one, (eight - one) / 7)
    way = [Stage("network", "cores", job, batch=8, max_delay=wait_ms / 1e3)]
    faces = Sources(1, 0.8 * 2 / one, random_gaps=True)
    outcome = simulate(faces, way, {"cores": 2}, seconds=60, warm_up=2)
    times = f"{outcome.p50 * 1e3:.1f}", f"{outcome.p99 * 1e3:.1f}"
    return f"{wait_ms:g}", f"{outcome.mean_batch['network']:.1f}", f"{outcome.used['cores']:.0%}", *times


def _costs_at(price: float, records: Sequence[Record]) -> str:
    """What a million faces cost at a price of a machine-hour: the network alone, then whole frames."""
    if not 0 < price < math.inf:
        raise InputError(f"a price is over 0, got {price}")
    rows = [(*row[:-1], f"{row[-1] * price:.4f}") for row in _faces_rows(records)]
    network = markdown_table(
        ("device", "model", "file", "engine", "batch", "faces a second", "cost of a million"), rows
    )
    costs = _costs(records)
    a_core = price / costs.record.machine["cores_usable"]
    frames = [(str(way), f"{sum(costs.stages(way).values()) / 3.6 * a_core:.4f}") for way in WAYS if costs.known(way)]
    return f"{network}\n\n{markdown_table(('frames', 'cost of a million'), frames)}"


def main() -> None:
    """Makes the page's tables anew, or prints costs."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--docs", type=Path, default=DOCS)
    made.add_argument("--price", type=float, help="of a machine-hour: print the costs and leave the page")
    args = made.parse_args()
    records = read_records(args.results)
    if args.price is not None:
        print(_costs_at(args.price, records))
        return
    text = scale_page(args.docs.read_text(encoding="utf-8"), records)
    write_file(args.docs, text)


if __name__ == "__main__":
    run(main)
