"""What `kp tune` is asked for and what it finds: settings, trials, and the files that are written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

from kp_runtime.backend_by_name import AUTO
from kp_runtime.bench_results import Times, write_results
from kp_runtime.errors import InputError
from kp_runtime.machine import Machine
from kp_runtime.recorded_rise import Rise
from kp_runtime.timing import Ratio
from kp_runtime.tuned import Tuned, write_tuned

__all__ = [
    "Trial",
    "TuneSettings",
    "Tuning",
    "check_chosen",
    "milliseconds_from_text",
    "write_tuning",
]

SCHEMA = 1


@dataclass(frozen=True)
class TuneSettings:
    """What is tried and what is wanted.

    Attributes:
        budget_ms: what 95 of 100 calls may take at most; None sets no limit.
        faces: in a call.
        max_rise: most percentage points that the NME may rise over the first bundle's fp32.
        allow_unknown: whether a file of which the rise is not known may be chosen.
        backends: engines that are tried.
        precisions: of the files that are tried; none means all.
        threads: of the engine on the CPU; none means 1, 2, 4 and so on, and all cores.
        seconds: least time of each case in the measurement that decides.
        samples: least number of its samples.
    """

    budget_ms: float | None = None
    faces: int = 1
    max_rise: float = 0.1
    allow_unknown: bool = False
    backends: tuple[str, ...] = AUTO
    precisions: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    seconds: float = 3.0
    samples: int = 200


@dataclass(frozen=True)
class Trial:
    """One way to run, and what was found.

    Attributes:
        bundle: its folder.
        file: the model file.
        precision: of the file.
        backend: the engine.
        threads: of the engine on the CPU; None on a GPU.
        feeding: how the batch was fed, one of `feeding.WAYS`; None where there is one way.
        ways: each way that was tried, with its shortest ms a face.
        rise: of the NME over the first bundle's fp32.
        screening: the short measurement.
        times: the one that decides; None where it did not come to that.
        verdict: chosen, or why not.
    """

    bundle: str
    file: str
    precision: str
    backend: str
    threads: int | None
    feeding: str | None
    ways: dict[str, float]
    rise: Rise
    screening: Times
    times: Times | None
    verdict: str

    def __str__(self) -> str:
        threads = "" if self.threads is None else f", {self.threads} thread{'s' * (self.threads != 1)}"
        times = self.best_known.summary
        fed = f", fed {self.feeding}" if self.feeding else ""
        return f"{self.name} on {self.backend}{threads}{fed}: p50 {times.p50_ms:.2f} ms, p95 {times.p95_ms:.2f} ms"

    @property
    def name(self) -> str:
        """The bundle's folder and the file."""
        return f"{Path(self.bundle).name}/{self.file}"

    @property
    def best_known(self) -> Times:
        """The times that decide, else the short measurement's."""
        return self.times or self.screening


@dataclass(frozen=True)
class Tuning:
    """What `run_tune` found.

    Attributes:
        settings: what was asked for.
        bundles: the folders, the first being the one whose fp32 sets the accuracy.
        photo: its path; `photo_sha256` is that of the file, `photo_size_hw` its height and width.
        machine: what it ran on.
        started: date and time, UTC.
        load_before: the load average before the run; `load_after` after it.
        trials: fastest first.
        left_out: what did not open, with the reason.
        fastest: index of the fastest trial that keeps the accuracy, whatever the budget.
        chosen: index of the fastest that also fits the budget.
        over_default: the chosen one's median over that of what `load(bundle)` opens by itself.
        tuned: the settings of the chosen one, its bundle's path as it was given.
        schema: version of this layout.
    """

    settings: TuneSettings
    bundles: tuple[str, ...]
    photo: str
    photo_sha256: str
    photo_size_hw: tuple[int, int]
    machine: Machine
    started: str
    load_before: tuple[float, ...] | None
    load_after: tuple[float, ...] | None
    trials: tuple[Trial, ...]
    left_out: dict[str, str]
    fastest: int | None
    chosen: int | None
    over_default: Ratio | None
    tuned: Tuned | None
    schema: int = SCHEMA


def milliseconds_from_text(text: str) -> float:
    """A time such as `5ms`, `800us` or `0.02s`.

    Raises:
        InputError: it is none.
    """
    found = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(us|µs|ms|s)\s*", text)
    value = float(found[1]) * {"s": 1e3, "ms": 1.0}.get(found[2], 1e-3) if found else 0.0
    if not value > 0:
        raise InputError(f"a budget is a time over 0 such as 5ms, 800us or 0.02s; got {text!r:.40}")
    return value


def check_chosen(tuning: Tuning) -> None:
    """Refuses a result in which nothing was chosen.

    Raises:
        InputError: nothing keeps the accuracy, or nothing that does fits the budget; names the fastest.
    """
    if tuning.chosen is not None:
        return
    settings = tuning.settings
    if tuning.fastest is not None:
        raise InputError(
            f"nothing that keeps the accuracy fits {settings.budget_ms:g} ms for {settings.faces} face(s); the fastest "
            f"is {tuning.trials[tuning.fastest]}; give it more time (--budget), or try a smaller model (--also)"
        )
    known = [trial for trial in tuning.trials if trial.rise.points is not None]
    raise InputError(
        f"no file keeps the NME within {settings.max_rise:g} percentage points of the first bundle's fp32; "
        + ("raise --max-nme-rise" if known else "of none it is known: give --data FACES, or --allow-unknown")
    )


def write_tuning(tuning: Tuning, out: Path) -> list[Path]:
    """Writes the table beside `out`, as `NAME.tried.json`, and the chosen settings, where there are any, as `out`.

    Where nothing was chosen, settings that were there before stay.
    """
    written = [write_results(tuning, out.with_name(f"{out.stem}.tried.json"))]
    if tuning.tuned is not None:
        place = _place(tuning.tuned.bundle, out)
        written.insert(0, write_tuned(dataclasses.replace(tuning.tuned, bundle=place), out))
    return written


def _place(bundle: str, settings: Path) -> str:
    """Where a bundle lies from its settings file's own folder; a link to it, as to the newest release, stays one."""
    here, whole = os.path.realpath(settings.parent), os.path.realpath(bundle)
    with contextlib.suppress(ValueError):  # another drive
        for path, start in ((bundle, settings.parent), (bundle, here), (whole, here)):
            place = os.path.relpath(path, start)
            if os.path.realpath(Path(here, place)) == whole:  # else it goes up out of a link
                return place
    return whole
