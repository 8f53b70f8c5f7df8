"""Feeds damaged and hostile files and arrays to everything that reads them; `make fuzz`.

The property: a typed error of `kp_runtime.errors`, or a right answer. Never another exception, a crash
of the process, over 5 s of CPU time (60 s of wall time) or over 512 MiB of memory beyond what the
process had before its first case.

Cases run in child processes, so that a crash of a native parser is seen, counted and gone on from. Case
N of a target depends on the seed, the target and N alone: `--target onnx --only 123` runs one again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuzz_targets import TARGETS, Case

CPU_SECONDS = 5
WALL_SECONDS = 60
MEMORY_MIB = 512
SPAN = 5000
"""Cases of one process: what libraries keep for good may not add up to the bound."""


@dataclass
class Result:
    """What came of one target's cases.

    Attributes:
        cases: how many ran.
        outcomes: `value` or the error's type, to how often.
        findings: cases that broke the property, each as `case N: what`.
    """

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def fuzz(targets: Sequence[str], cases: int, seed: int) -> dict[str, Result]:
    """Runs about this many cases, shared among the targets by their weights."""
    whole = sum(TARGETS[name].weight for name in targets)
    wanted = {name: max(1, round(cases * TARGETS[name].weight / whole)) for name in targets}
    results = {name: Result() for name in targets}
    groups: dict[bool, list[str]] = {}
    for name in targets:
        groups.setdefault(TARGETS[name].slow_start, []).append(name)
    for names in groups.values():
        _run_group({name: wanted[name] for name in names}, seed, results)
    return results


def _run_group(wanted: dict[str, int], seed: int, results: dict[str, Result]) -> None:
    """Runs targets that may share a process."""
    spans = [[name, at, min(at + SPAN, count)] for name, count in wanted.items() for at in range(0, count, SPAN)]
    while spans:
        batch, size = [], 0
        while spans and (not batch or size + spans[0][2] - spans[0][1] <= SPAN):
            size += spans[0][2] - spans[0][1]
            batch.append(spans.pop(0))
        while batch := _run_child(batch, seed, results):
            pass


def _run_child(spans: list[list], seed: int, results: dict[str, Result]) -> list[list]:  # type: ignore[type-arg]
    """Runs a process over the spans; what is left of them when it died."""
    words = [sys.executable, __file__, "--child", json.dumps(spans), "--seed", str(seed)]
    log = tempfile.TemporaryFile()  # noqa: SIM115  what native code says, for the report of a crash
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, env={**os.environ, **QUIET}) as child, log:
        assert child.stdout is not None
        at = -1
        for line in _lines(child):
            at += 1
            name, case, outcome = json.loads(line)
            results[name].cases += 1
            if outcome.startswith("!"):
                results[name].findings.append(f"case {case}: {outcome[1:]}")
            results[name].outcomes[outcome.split(":")[0].lstrip("!")] += 1
        status = child.wait()
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()[-1:]
    order = [(name, case) for name, first, stop in spans for case in range(first, stop)]
    if at + 1 == len(order) and status == 0:
        return []
    if at + 1 == len(order):  # every case has answered, and it died behind the last one
        name, case = order[-1]
        results[name].findings.append(f"crash at the end, after case {case}: {_signal_name(status)} {said}")
        return []
    if at < 0 and status == 1:
        raise SystemExit(f"the child could not start: {said}")
    name, case = order[at + 1]
    what = "hang" if status in (-signal.SIGPROF, -signal.SIGKILL) else f"crash, {_signal_name(status)}"
    results[name].cases += 1
    results[name].outcomes[what] += 1
    results[name].findings.append(f"case {case}: {what} {said}")
    left = order[at + 2 :]
    names = dict.fromkeys(name for name, _ in left)
    return [[n, min(c for m, c in left if m == n), max(c for m, c in left if m == n) + 1] for n in names]


QUIET = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OPENCV_LOG_LEVEL": "OFF", "PYTHONHASHSEED": "0",
    "OPENCV_IO_MAX_IMAGE_PIXELS": str(1 << 26),  # which MEMORY_MIB holds: of more a MemoryError would be right
}  # fmt: skip


def _lines(child: subprocess.Popen[bytes]) -> Iterator[str]:
    """The child's lines; a child that says nothing for long is killed."""
    assert child.stdout is not None
    rest, patience = b"", 10 * WALL_SECONDS  # imports take long on a busy machine
    while True:
        if not select.select([child.stdout], [], [], patience)[0]:
            child.kill()
            return
        block = os.read(child.stdout.fileno(), 1 << 16)
        if not block:
            return
        patience = WALL_SECONDS
        *lines, rest = (rest + block).split(b"\n")
        yield from (line.decode() for line in lines)


def _signal_name(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def child(spans: list[list], seed: int) -> None:  # type: ignore[type-arg]
    """Runs cases and writes one line each."""
    warnings.simplefilter("ignore")
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the code under test prints is no result
    with tempfile.TemporaryDirectory() as folder:
        ready: dict[str, Case] = {}
        for name, _, _ in spans:
            if name not in ready:
                (Path(folder) / name).mkdir()
                ready[name] = TARGETS[name].prepare(Path(folder) / name)
        _limit_memory()
        for name, first, stop in spans:
            for case in range(first, stop):
                signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
                outcome = outcome_of(ready[name], random.Random(f"{seed} {name} {case}"))
                report.write(json.dumps([name, case, outcome]) + "\n")
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + (MEMORY_MIB << 20)
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


def outcome_of(case: Case, rng: random.Random) -> str:
    """`value`, the name of a typed error, or `!` and what went wrong."""
    from kp_runtime.errors import KpError

    try:
        case(rng)
    except KpError as error:
        if len(str(error)) > 3000:
            return f"!{type(error).__name__} with a text of {len(str(error))} characters: {str(error)[:60]!r}"
        return type(error).__name__
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "kp_" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return f"!{type(error).__name__}: {where}: {str(error)[:200]}"
    return "value"


def report_json(results: dict[str, Result], seed: int) -> dict[str, object]:
    """All that is to be told, as plain data."""
    rows = {
        name: {"cases": r.cases, "outcomes": dict(r.outcomes.most_common()), "findings": r.findings}
        for name, r in results.items()
    }
    bounds = {"cpu_seconds": CPU_SECONDS, "wall_seconds": WALL_SECONDS, "memory_mib": MEMORY_MIB}
    return {"seed": seed, "cases": sum(r.cases for r in results.values()), "bounds": bounds, "targets": rows}


def main(words: Sequence[str] | None = None) -> int:
    """Parses the command; the exit status is 1 where a case broke the property."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="repeatable; all when left out")
    parser.add_argument("--only", type=int, metavar="N", help="run this one case in this process, with its traceback")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.child:
        child(json.loads(args.child), args.seed)
        return 0
    targets = args.target or list(TARGETS)
    if args.only is not None:
        if len(targets) != 1:
            parser.error("--only goes with one --target")
        with tempfile.TemporaryDirectory() as folder:
            case = TARGETS[targets[0]].prepare(Path(folder))
            print(case(random.Random(f"{args.seed} {targets[0]} {args.only}")))
        return 0
    results = fuzz(targets, args.cases, args.seed)
    if args.json:
        print(json.dumps(report_json(results, args.seed), indent=1))
    else:
        for name, result in results.items():
            print(f"{name}: {result.cases} cases, " + ", ".join(f"{n} {k}" for k, n in result.outcomes.most_common()))
            print("".join(f"    {text}\n" for text in result.findings[:20]), end="")
    return 1 if any(result.findings for result in results.values()) else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
