"""What a fresh process pays for a model file: time of the load, of the first result, and memory.

Each file is loaded in processes of its own that import kp_runtime, numpy and the file's engine,
nothing else. The load is that of `open_backend`: importing the engine, comparing the sha256, opening
the file, running the golden crop. The files are in the system's cache, since they were read before.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kp_runtime.bench_results import ColdStart
from kp_runtime.errors import BackendError

__all__ = ["PROCESSES", "cold_starts"]

PROCESSES = 3

PROGRAM = """
import json, sys, time
import numpy as np
from kp_runtime.backend import open_backend

def peak_kib():
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("VmHWM:")), None)
    except OSError:
        return None

crop = np.frombuffer(sys.stdin.buffer.read(), np.uint8)
size = round(len(crop) ** 0.5)
crop = crop.reshape(1, 1, size, size)
base = peak_kib()
start = time.perf_counter()
backend = open_backend(sys.argv[1], sys.argv[2], threads=json.loads(sys.argv[3]))
loaded = time.perf_counter()
backend.infer(crop)
first = time.perf_counter()
print(json.dumps([(loaded - start) * 1e3, (first - loaded) * 1e3, base, peak_kib()]))
"""


def cold_starts(
    files: Sequence[tuple[Path, str]],
    crop: NDArray[np.uint8],
    threads: int | None,
    step: Callable[[float], None] = lambda share: None,
) -> list[ColdStart]:
    """Loads each file in fresh processes, in turns.

    Args:
        files: model files of a bundle, each with the engine that runs it, one of `backend.BACKENDS`.
        crop: `(1, size, size)` uint8, a face.
        threads: of the engine; None leaves it the choice.
        step: told the share that is done.

    Raises:
        BackendError: a process failed.
    """
    runs: list[list[list[float | None]]] = [[] for _ in files]
    for turn in range(PROCESSES):
        for i, (path, engine) in enumerate(files):
            runs[i].append(_run(path, engine, crop, threads))
            step((turn * len(files) + i + 1) / (PROCESSES * len(files)))
    return [_medians(run) for run in runs]


def _medians(run: list[list[float | None]]) -> ColdStart:
    load, first, base, peak = ([value for value in column if value is not None] for column in zip(*run, strict=True))
    mib = [round(statistics.median(kib) / 1024, 1) if kib else None for kib in (base, peak)]
    return ColdStart(len(run), round(statistics.median(load), 4), round(statistics.median(first), 4), mib[0], mib[1])


def _run(path: Path, engine: str, crop: NDArray[np.uint8], threads: int | None) -> list[float | None]:
    """Milliseconds of the load and of the first call, KiB of memory before and after them."""
    # the very kp_runtime that asks, wherever it was imported from
    house = str(Path(__file__).resolve().parents[1])
    search = os.pathsep.join(filter(None, [house, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), engine, json.dumps(threads)],
        input=crop.tobytes(),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": search},
    )
    try:
        result: list[float | None] = json.loads(done.stdout)
    except ValueError as error:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        reason = said[-1] if said else "no message"
        raise BackendError(
            f"{path} did not start in a fresh process (exit {done.returncode}): {reason}; a negative exit is "
            "the signal that ended it, 9 mostly means too little memory"
        ) from error
    return result
