"""What a program pays before its first result: imports, load, first run, memory; and `kp --help`.

    python -m benchmarks.start --bundle out/resnet18-68

Each sample is a fresh process; the kinds take turns, in an order that is drawn anew each round. The
files are in the system's cache, since one process of each kind ran before. Beside it stands
ONNX Runtime alone on the same file: no checks of hash and contract, no crop rule, no golden crop.
The last line of stdout is one JSON document.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.command import parser, run
from benchmarks.record import median_of, record_from
from benchmarks.table import finish
from kp_runtime.backend_by_name import open_backend
from kp_runtime.cores import checked_threads
from kp_runtime.errors import BackendError, InputError
from kp_runtime.timing import Ratio

__all__ = ["Start", "StartTime", "measure_start", "run_process", "summaries_from_samples"]

ROOT = Path(__file__).resolve().parents[1]
LEAST_RUNS = 15

Sample = dict[str, float]
"""What one process told: quantity to seconds or MiB."""


@dataclass(frozen=True)
class StartTime:
    """One quantity over all processes of a kind.

    Attributes:
        subject: what was started.
        quantity: what was measured of it.
        unit: `ms` or `MiB`.
        median: with its 95% bootstrap interval.
        values: of the single processes, in `unit`.
    """

    subject: str
    quantity: str
    unit: str
    median: Ratio
    values: list[float]


@dataclass(frozen=True)
class Start:
    """All quantities of one run, and which file of the bundle was opened."""

    file: str
    times: tuple[StartTime, ...]


def measure_start(bundle: Path, *, threads: int, runs: int = LEAST_RUNS) -> Start:
    """Starts each kind of process `runs` times, in turns.

    Args:
        bundle: the bundle's folder; the file that `load` would choose is opened.
        threads: of the engine.
        runs: processes of each kind.

    Raises:
        InputError: too few runs to say anything.
        BackendError: a process failed.
    """
    if runs < 2:
        raise InputError(f"runs must be 2 or more, got {runs}")
    opened = open_backend(bundle, "ort-cpu", threads=threads)
    file = str((bundle / opened.report.file).resolve())
    child = [sys.executable, "-m", "benchmarks.first_result"]
    kinds = {
        "import": [*child, "import"],
        "kp_runtime": [*child, "kp", file, str(threads)],
        "ONNX Runtime alone": [*child, "ort", file, str(threads), str(opened.spec.size)],
        "kp --help": [sys.executable, "-c", "import sys; sys.argv = ['kp', '--help']; import kp_cli; kp_cli.main()"],
        "python alone": [sys.executable, "-c", "pass"],
    }
    for command in kinds.values():
        run_process(command)
    rng = np.random.default_rng(0)
    samples: dict[str, list[Sample]] = {name: [] for name in kinds}
    for _ in range(runs):
        for name in rng.permutation(list(kinds)).tolist():
            samples[name].append(run_process(kinds[name]))
    return Start(opened.report.file, summaries_from_samples(samples))


def run_process(command: list[str]) -> Sample:
    """One process: what it printed, or its whole time where it printed no measurement."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    whole = time.perf_counter() - start
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BackendError(f"{' '.join(command[1:])} failed: {last}")
    if "benchmarks.first_result" not in command:
        return {"whole process": whole}
    told = json.loads(done.stdout.splitlines()[-1])
    peak = {} if told["peak_mib"] is None else {"peak memory": told["peak_mib"]}
    return told["seconds"] | peak  # type: ignore[no-any-return]


def summaries_from_samples(samples: dict[str, list[Sample]]) -> tuple[StartTime, ...]:
    """Median and interval of each quantity of each kind of process."""
    return tuple(
        _summary(subject, quantity, [sample[quantity] for sample in taken])
        for subject, taken in samples.items()
        for quantity in taken[0]
    )


def _summary(subject: str, quantity: str, values: list[float]) -> StartTime:
    unit, factor = ("MiB", 1.0) if quantity == "peak memory" else ("ms", 1e3)
    values = [round(value * factor, 4) for value in values]
    return StartTime(subject, quantity, unit, median_of(values), values)


def main() -> None:
    """Measures one bundle."""
    made = parser(__doc__)
    made.add_argument("--runs", type=int, default=LEAST_RUNS, help="processes of each kind")
    args = made.parse_args()
    result = measure_start(args.bundle, threads=checked_threads(args.threads), runs=args.runs)
    finish(record_from("start", args.bundle, {"threads": args.threads, "runs": args.runs}, result), args.out)


if __name__ == "__main__":
    run(main)
