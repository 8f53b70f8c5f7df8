"""How many threads there are, and on which cores they run: chosen, checked, and taken for the length of a block.

Linux gives a new thread the cores of the one that starts it, so what a library starts inside
`on_cores` stays there. ONNX Runtime has an option of its own (`session.intra_op_thread_affinities`),
which is not used: it leaves out the calling thread, which does a share of the work; it takes cores
that were forbidden to the process (`taskset`); and of one that isn't there it only prints a line.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import SupportsIndex

from kp_runtime.errors import BackendError, InputError

__all__ = [
    "check_process",
    "checked_cores",
    "checked_threads",
    "cores_from_text",
    "cpu_quota",
    "default_threads",
    "on_cores",
    "usable_cores",
]


def usable_cores() -> int:
    """How many cores this thread may run on: its affinity where the system tells, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that limits leave: a container's, a systemd unit's, of a group around them (cgroup v2).

    None without one; `root` is where files lie.
    """
    own = re.search("^0::/(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE)
    names = own[1].split("/") if own else []
    folders = itertools.accumulate(names, operator.truediv, initial=root / "sys/fs/cgroup")
    limits = [_text(folder / "cpu.max").split() for folder in folders]
    quotas = [
        int(words[0]) / int(words[1])
        for words in limits
        if len(words) == 2 and all(word.isdigit() for word in words) and words[1] != "0"  # "max" is no limit
    ]
    return min(quotas, default=None)


def _text(path: Path) -> str:
    """A file of the system's, empty where it is not there."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def default_threads(root: Path = Path("/")) -> int:
    """How many threads where nobody says: one for each usable core, but no more than the quota keeps busy."""
    cores, quota = usable_cores(), cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def checked_cores(cores: Collection[int]) -> frozenset[int]:
    """The cores, by the numbers of /proc/cpuinfo.

    Raises:
        InputError: none, no numbers, one that this thread may not run on, or the system is not Linux.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("cores can be chosen on Linux alone; leave them out")
    try:
        chosen, allowed = frozenset(map(operator.index, cores)), os.sched_getaffinity(0)
    except TypeError as error:
        raise InputError(f"cores must be whole numbers such as [0, 1], got {cores!r:.40}") from error
    if not chosen or not chosen <= allowed:
        raise InputError(
            f"cores must be among {sorted(allowed)}, those that this process may use, at least one; "
            f"got {sorted(chosen)}"
        )
    return chosen


def checked_threads(threads: int | None, most: int | None = None) -> int:
    """How many threads, at most `most`, or the usable cores: `default_threads` when None.

    Raises:
        InputError: under 1, more than these, or no whole number.
    """
    most = usable_cores() if most is None else most
    whole = isinstance(threads, SupportsIndex) and not isinstance(threads, bool)
    if threads is not None and not (whole and 1 <= threads <= most):
        raise InputError(f"threads must be 1 to {most}, the cores that this process may use; got {threads!r:.40}")
    return default_threads() if threads is None else threads


def check_process(origin: int) -> None:
    """Refuses a process that was forked from `origin`, whose threads are needed: a call would wait for them for ever.

    Raises:
        BackendError: this is another process.
    """
    if os.getpid() != origin:
        raise BackendError(
            f"the threads that this needs stayed behind when process {origin} forked this one; load models and "
            "detectors in each process (on a CPU those with threads=1 can be called here, but not submitted to)"
        )


def cores_from_text(text: str) -> frozenset[int]:
    """The cores of a list as `taskset` takes it: `0,2-3`.

    Raises:
        InputError: it is no such list, or see `checked_cores`.
    """
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text):
        raise InputError(f"cores must be numbers and ranges such as 0,2-3; got {text!r}")
    ends = [list(map(int, part.split("-"))) for part in text.split(",")]
    if any(end[0] > end[-1] for end in ends):
        raise InputError(f"a range of cores begins at its lower end, such as 2-3; got {text!r}")
    return checked_cores([core for end in ends for core in range(end[0], end[-1] + 1)])


@contextlib.contextmanager
def on_cores(cores: frozenset[int] | None) -> Iterator[None]:
    """Runs the block in this thread on these cores; after it, the thread may run where it might before.

    Raises:
        BackendError: the cores were taken away meanwhile.
    """
    if cores is None or (before := os.sched_getaffinity(0)) <= cores:
        yield
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise BackendError(
            f"the chosen cores {sorted(cores)} can't be had any more ({error.strerror}), only {sorted(before)}; "
            "load the model anew with cores that are there"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the system has taken some away meanwhile, and put the thread elsewhere
            os.sched_setaffinity(0, before)
