"""Load, infer, unload, over and over: does memory grow, is a descriptor or a thread left over?

    python -m benchmarks.soak --bundle engines/resnet18-68-lite --minutes 10 --threads 2

Each round opens the bundle anew, finds points in a frame from several threads at once, and closes it.
After each round what is free is handed back to the system and the resident memory is read; the first
half of the rounds is left out, where caches are still filling. Memory moves in steps and stays where
it went, so neighbouring samples say nothing new and a line through all of them would look far surer
than it is. Instead the samples are cut into eleven blocks in a row. The ten differences between the
medians of neighbouring blocks are the observations: their mean is the slope, Student's t with 9 degrees
of freedom gives its interval. A steady leak makes all ten alike; one step, or two, makes them scatter.
Where samples only wander about a level, differences go against each other and the interval is wider
than it had to be, never narrower.
Memory leaks where the 99.9% interval lies over zero (the 95% one is printed beside it); so do
descriptors and threads that are there at the end and were not after the first round. Linux alone.
With a `--backend` on a GPU what is in use of its memory, by whatever program, is watched in the same way.
Ctrl-C ends it early, with what was seen. The last line of stdout is one JSON document; the exit status is 1
where something leaks.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import sys
import threading
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import run
from kp_cli.options import stopped_by_signals
from kp_runtime.backend_by_name import BACKENDS
from kp_runtime.cores import checked_threads
from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.errors import InputError, KpError
from kp_runtime.pipeline import Model, load

__all__ = ["Slope", "Soak", "check", "device_memory", "model_round", "slope_of", "watch"]

LEAST_ROUNDS = 80
BLOCKS = 11
T95, T999 = 2.262, 4.781
"""Student's t with 9 degrees of freedom, two-sided."""

SECONDS_TO_END = 10.0
"""How long threads that were told to end may take."""


@dataclass(frozen=True)
class Slope:
    """How memory changes, in bytes a call.

    Attributes:
        value: the slope.
        low: of its 95% interval.
        high: of its 95% interval.
        grows: whether its 99.9% interval lies over zero.
    """

    value: float
    low: float
    high: float
    grows: bool


@dataclass(frozen=True)
class Soak:
    """What was seen.

    Attributes:
        seconds: how long it ran.
        rounds: loads and unloads.
        calls: inferences, all rounds together.
        slope: of the memory over the calls.
        first_mib: median resident memory of the first samples that count, a tenth of all.
        last_mib: of the last tenth of all.
        peak_mib: largest resident memory of the process.
        descriptors: open files and sockets that the first round had not left, and the last did.
        threads: likewise, threads by their names.
        device: of the GPU's memory over the calls; None where it is not watched.
    """

    seconds: float
    rounds: int
    calls: int
    slope: Slope
    first_mib: float
    last_mib: float
    peak_mib: float
    descriptors: tuple[str, ...]
    threads: tuple[str, ...]
    device: Slope | None = None


def model_round(
    bundle: Path,
    *,
    threads: int,
    engine_threads: int,
    calls: int,
    backend: str = "ort-cpu",
    use: Callable[[Model], None] = lambda model: None,
) -> Callable[[], int]:
    """One round: load, warm up for two faces, `calls` calls with a face from each of the threads, unload.

    The calling threads stay from round to round, as in a program: OpenCV keeps 0.9 KB of every thread that
    called it and ended (4.14, unless cv2.setNumThreads(1)), see docs/resources.md.

    Args:
        bundle: the bundle's folder.
        threads: that call the model at once.
        engine_threads: of the engine.
        calls: of each thread.
        backend: the engine.
        use: does more with the model before it is closed.

    Returns:
        What does it; it gives the number of calls.
    """
    frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    pool = ThreadPoolExecutor(threads)

    def call(model: Model, together: Barrier) -> None:
        together.wait()  # so that each thread has a share
        for _ in range(calls):
            model(frame, [[200, 120, 400, 330]])

    def once() -> int:
        together = Barrier(threads)
        with load(bundle, backend, engine_threads) as model:
            model.warmup(2)
            for done in [pool.submit(call, model, together) for _ in range(threads)]:
                done.result()
            use(model)
        return threads * calls

    return once


def watch(
    once: Callable[[], int],
    *,
    seconds: float,
    calls: int = 0,
    in_use: Callable[[], int] | None = None,
    step: Callable[[int, int], None] = lambda rounds, calls: None,
    stop: Callable[[], bool] = lambda: False,
) -> Soak:
    """Runs rounds until the time is over and the calls are done, or told to stop, and at least `LEAST_ROUNDS`.

    Args:
        once: a round; gives the number of its calls.
        seconds: least time.
        calls: least number of calls.
        in_use: tells the bytes of a GPU's memory that are in use, as `device_memory` gives it.
        step: told the rounds and calls so far.
        stop: asked after each round whether what there is shall do.
    """
    once()
    gc.collect()
    before = _descriptors(), _threads()
    at, memory, device = array("q"), array("q"), array("q")  # lists of numbers would grow by a hundred bytes a round
    done, start = 0, time.monotonic()
    while len(memory) < LEAST_ROUNDS or (not stop() and (done < calls or time.monotonic() < start + seconds)):
        done += once()
        _give_back()
        at.append(done)
        memory.append(_status("VmRSS"))
        if in_use is not None:
            device.append(in_use())
        step(len(memory), done)
    took = time.monotonic() - start
    gc.collect()
    left = _left(before)
    half, tenth = len(memory) // 2, len(memory) // 10
    x, counted = np.array(at[half:], np.float64), np.array(memory[half:], np.float64)
    return Soak(
        round(took, 1), len(memory), done, slope_of(x, counted),
        _mib(np.median(counted[:tenth])), _mib(np.median(counted[-tenth:])), _mib(_status("VmHWM")), *left,
        slope_of(x, np.array(device[half:], np.float64)) if device else None,
    )  # fmt: skip


def device_memory() -> Callable[[], int]:
    """What tells how much of the GPU's memory is in use, but for a constant: less what is free.

    Raises:
        BackendError: there is no GPU that works.
        MissingExtraError: cuda-python is not installed.
    """
    driver = CudaDriver()

    def in_use() -> int:
        driver.make_current()
        return -int(driver.call("cuMemGetInfo"))

    return in_use


def slope_of(at: NDArray[np.float64], values: NDArray[np.float64]) -> Slope:
    """The slope of samples, as the module's docstring tells.

    Args:
        at: `(n,)` where each was taken, rising; `n` is at least `BLOCKS`.
        values: `(n,)` the samples.
    """
    x, y = (np.array([np.median(block) for block in np.array_split(of, BLOCKS)]) for of in (at, values))
    slopes = np.diff(y) / np.diff(x).mean()
    value, error = float(slopes.mean()), float(slopes.std(ddof=1) / len(slopes) ** 0.5)
    return Slope(value, value - T95 * error, value + T95 * error, value > T999 * error)


def check(soak: Soak) -> None:
    """Says so where something leaks.

    Raises:
        KpError: memory grows, or a descriptor or a thread is left over.
    """
    faults = []
    for what, s in (("memory", soak.slope), ("the GPU's memory", soak.device)):
        if s is not None and s.grows:
            faults.append(f"{what} grows by {s.value:.3g} bytes a call ({s.low:.3g} to {s.high:.3g})")
    if soak.descriptors:
        faults.append(f"{len(soak.descriptors)} descriptors are left open: {', '.join(soak.descriptors[:5])}")
    if soak.threads:
        faults.append(f"{len(soak.threads)} threads are left over: {', '.join(soak.threads[:5])}")
    if faults:
        raise KpError(f"after {soak.rounds} loads and {soak.calls} calls " + "; ".join(faults))


def _give_back() -> None:
    """Hands back what is free but kept, so that the resident memory is what is in use.

    CPython's cache of attributes holds 4096 names and takes thousands of rounds to fill; glibc keeps
    freed pages, and ever new ones get touched where pieces of a model come to lie otherwise.
    """
    for name in ("_clear_internal_caches", "_clear_type_cache"):  # Python 3.13 and before
        if clear := getattr(sys, name, None):
            clear()
            break
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


def _left(before: tuple[dict[str, str], dict[str, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Descriptors and threads that were not there before, once those that end have ended."""
    end = time.monotonic() + SECONDS_TO_END
    while True:
        now = _descriptors(), _threads()
        new = [[what for number, what in n.items() if number not in b] for n, b in zip(now, before, strict=True)]
        if not any(new) or time.monotonic() > end:
            return tuple(new[0]), tuple(new[1])
        time.sleep(0.05)


def _descriptors() -> dict[str, str]:
    """Number of each open descriptor to what it is."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            found[link.name] = str(link.readlink())
        except FileNotFoundError:  # the descriptor that reads this folder
            continue
    return found


def _threads() -> dict[str, str]:
    """Number of each thread to its name."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            found[task.name] = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):  # it ended
            continue
    return found


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _mib(value: float) -> float:
    return round(float(value) / 2**20, 2)


def _tell(rounds: int, calls: int) -> None:
    """Progress, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r{rounds} loads, {calls} calls", end="", file=sys.stderr)


def main() -> None:
    """Soaks one bundle."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--bundle", type=Path, required=True, help="the bundle's folder")
    made.add_argument("--backend", choices=BACKENDS, default="ort-cpu", help="the engine")
    made.add_argument("--minutes", type=float, default=10.0, help="least time")
    made.add_argument("--inferences", type=int, default=0, help="least number of calls; none when left out")
    made.add_argument("--threads", type=int, default=2, help="that call the model at once")
    made.add_argument("--engine-threads", type=int, default=1, help="of the engine")
    made.add_argument("--calls", type=int, default=50, help="of each thread in a round")
    args = made.parse_args()
    if not sys.platform.startswith("linux"):
        raise InputError("memory, descriptors and threads are read from /proc: run this on Linux")
    if args.threads < 1 or args.calls < 1 or not 0 <= args.minutes < float("inf") or args.inferences < 0:
        raise InputError("threads and calls must be 1 or more, minutes and inferences 0 or more")
    once = model_round(
        args.bundle,
        threads=args.threads,
        engine_threads=checked_threads(args.engine_threads),
        calls=args.calls,
        backend=args.backend,
    )
    in_use = None if args.backend == "ort-cpu" else device_memory()
    stop, seconds = threading.Event(), args.minutes * 60
    with stopped_by_signals(stop):
        soak = watch(once, seconds=seconds, calls=args.inferences, in_use=in_use, step=_tell, stop=stop.is_set)
    print(f"{soak.rounds} loads and {soak.calls} calls from {args.threads} threads in {soak.seconds / 60:.1f} min")
    print(f"resident memory {soak.first_mib} MiB at first, {soak.last_mib} MiB at last, peak {soak.peak_mib} MiB")
    for what, s in (("", soak.slope), (" of the GPU's memory", soak.device)):
        if s is not None:
            print(f"slope{what} {s.value:.3g} bytes a call, 95% interval {s.low:.3g} to {s.high:.3g}")
    print(f"left over: {len(soak.descriptors)} descriptors, {len(soak.threads)} threads")
    print(json.dumps(dataclasses.asdict(soak)), flush=True)
    check(soak)


if __name__ == "__main__":
    run(main)
