"""Two results of `kp bench` against each other: faster, slower, or not distinguishable.

Each case's ratio of medians comes with its 95% interval from the raw samples. What makes two runs
no comparison (another machine, another work) is refused; what one may want to compare (versions,
files) is told.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from kp_runtime.bench_results import Bench, Setup
from kp_runtime.errors import InputError
from kp_runtime.machine import changes, machine_conditions
from kp_runtime.timing import FEW_TURNS, Ratio, ratio_of_medians

__all__ = [
    "CaseComparison",
    "Comparison",
    "check_alike",
    "compared",
    "obstacles",
]

NOT_INTERLEAVED = (
    "the two runs were not interleaved: between them the machine itself may have changed its speed, "
    "so a small difference proves nothing, whatever its interval"
)


@dataclass(frozen=True)
class CaseComparison:
    """One case in both results; under a ratio of 1 the new one is faster."""

    case: str
    old_ms: float
    new_ms: float
    ratio: Ratio
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Two results.

    Attributes:
        cases: those that are in both.
        alone: cases that only one of them has, each with which.
        obstacles: why the two are no fair comparison; empty unless that was waved through.
        notes: what else differs, and what to keep in mind.
    """

    cases: tuple[CaseComparison, ...]
    alone: tuple[str, ...]
    obstacles: tuple[str, ...]
    notes: tuple[str, ...]


def compared(old: Bench, new: Bench, *, anyway: bool = False) -> Comparison:
    """Compares all cases that both results have.

    Raises:
        InputError: they are of different machines or settings, and not `anyway`.
    """
    if not anyway:
        check_alike(old.setup, new.setup)
    before, after = old.cases(), new.cases()
    cases = []
    for case in (name for name in before if name in after):
        ratio = ratio_of_medians(after[case].turns_ms, before[case].turns_ms)
        times = before[case].summary.p50_ms, after[case].summary.p50_ms
        cases.append(CaseComparison(case, *times, ratio, ratio.verdict))
    alone = [_alone("old", before, after), _alone("new", after, before)]
    few = [case for case in before if case in after and min(len(b[case].turns_ms) for b in (before, after)) < FEW_TURNS]
    told = f"under {FEW_TURNS} turns, so the interval is too narrow: {'; '.join(few)}; measure for longer (--seconds)"
    return Comparison(
        tuple(cases),
        tuple(filter(None, alone)),
        tuple(obstacles(old.setup, new.setup)),
        (*_notes(old, new), *([told] if few else []), NOT_INTERLEAVED),
    )


def check_alike(old: Setup, new: Setup) -> None:
    """Refuses what is no comparison.

    Raises:
        InputError: the machine, the threads, the photo or the number of its faces differs.
    """
    if found := obstacles(old, new):
        raise InputError(
            f"the old results and the new are no comparison: {'; '.join(found)}; "
            "measure both alike, or add --compare-anyway"
        )


def _alone(which: str, here: Iterable[str], there: Container[str]) -> str:
    names = [name for name in here if name not in there]
    return f"only in the {which} results: {'; '.join(names)}" if names else ""


def obstacles(old: Setup, new: Setup) -> list[str]:
    """What makes two runs no comparison, one text each: `cores 2, then 4`."""
    return changes(_conditions(old), _conditions(new))


def _conditions(setup: Setup) -> dict[str, object]:
    machine, jetson = setup.machine, setup.machine.jetson
    return machine_conditions(machine) | {
        "CPU clock": _clock(machine.mhz_least, machine.mhz_most),
        "GPU clock": jetson and _clock(jetson.gpu_mhz_least, jetson.gpu_mhz_most),
        "GPU": setup.gpu,
        "threads": setup.settings.threads or "of the engine's choice",
        "cores that were chosen": setup.settings.cores or "all",
        "photo's sha256": setup.photo_sha256,
        "faces": setup.faces,
    }


def _clock(least: float | None, most: float | None) -> str | None:
    """What a clock is allowed, which `jetson_clocks` and a power mode change: `115 to 1510 MHz`."""
    return None if least is None or most is None else f"{least:.0f} to {most:.0f} MHz"


def _notes(old: Bench, new: Bench) -> Iterator[str]:
    yield from changes(_software(old), _software(new))
    before, after = old.named_files(), new.named_files()
    for name in (name for name in before if name in after):
        yield from changes(
            {f"sha256 of {name}": before[name].sha256[:12], f"engine of {name}": before[name].backend},
            {f"sha256 of {name}": after[name].sha256[:12], f"engine of {name}": after[name].backend},
        )
    yield f"load average before the old run {_load(old)}, before the new {_load(new)}"


def _software(bench: Bench) -> dict[str, object]:
    machine = bench.setup.machine
    return {
        "system": machine.system,
        "kernel": machine.kernel,
        "L4T": machine.jetson and machine.jetson.l4t,
        "detector": bench.setup.detector,
        "the photo's model file": bench.photo.file,
        **machine.versions,
    }


def _load(bench: Bench) -> str:
    return "not known" if bench.load_before is None else f"{bench.load_before[0]:.2f}"
