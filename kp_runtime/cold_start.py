"""What a fresh process pays for a model file: time of the load, of the first result, and memory.

Each file is loaded in processes of its own that import kp_runtime, numpy and the file's engine,
nothing else. The load is that of `open_backend`: importing the engine, comparing the sha256, opening
the file, running the golden crop. The files are in the system's cache, since they were read before.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kp_runtime.bench_results import ColdStart
from kp_runtime.errors import BackendError
from kp_runtime.probes import ask

__all__ = ["PROCESSES", "cold_starts"]

PROCESSES = 3


def cold_starts(
    files: Sequence[tuple[Path, str]],
    crop: NDArray[np.uint8],
    threads: int | None,
    step: Callable[[float], None] = lambda share: None,
) -> list[ColdStart]:
    """Loads each file in fresh processes, in turns.

    Args:
        files: model files of a bundle, each with the engine that runs it, one of `backend_by_name.BACKENDS`.
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
    answer = ask("start", str(path), engine, json.dumps(threads), seconds=None, given=crop.tobytes())
    if answer.state != "answered":
        raise BackendError(
            f"{path} did not start in a fresh process: {answer.text}; SIGKILL mostly means too little memory"
        )
    return [answer.facts[name] for name in ("load_ms", "first_ms", "base_kib", "peak_kib")]
