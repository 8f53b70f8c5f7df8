"""Which operators a batch slows down: ONNX Runtime's own profile at several batch sizes.

    python -m benchmarks.profile_batches --bundle out/resnet18-68 --threads 2

The profiler writes a time for each node and call; the profile itself costs some microseconds a node,
so the sums lie above the times of `compare_engines`; and a batch is one call here, while `kp_runtime`
may feed it in parts and stops its threads' spinning after a call. Each file has one session; batch sizes
take turns in it, and a turn's first call is left out. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import check_batches, parser, run
from benchmarks.faces import varied_crops
from benchmarks.record import record_from
from benchmarks.table import finish
from kp_runtime.cores import checked_threads
from kp_runtime.errors import BackendError, InputError
from kp_runtime.manifest import Manifest

__all__ = ["FileProfile", "OperatorTime", "Profile", "profile_file"]

PRECISIONS = ("int8", "fp32")
PAUSE = 0.05
"""Seconds before each turn, as in `measure_in_turns`."""
DEAREST = 10


@dataclass(frozen=True)
class OperatorTime:
    """A kind of operator, or one node of a graph.

    Attributes:
        name: of the kind or the node.
        kind: of operator.
        nodes: how many nodes these are.
        us_a_face: median over the calls at each batch size, in the order of the profile's `batches`.
    """

    name: str
    kind: str
    nodes: int
    us_a_face: tuple[float, ...]


@dataclass(frozen=True)
class FileProfile:
    """One file: all its operators together, by kind (dearest first), and the dearest nodes."""

    file: str
    sha256: str
    precision: str
    total_us_a_face: tuple[float, ...]
    kinds: tuple[OperatorTime, ...]
    nodes: tuple[OperatorTime, ...]


@dataclass(frozen=True)
class Profile:
    """All files of one run; `calls` were counted at each of the batch sizes."""

    batches: tuple[int, ...]
    calls: int
    files: tuple[FileProfile, ...]


@dataclass(frozen=True)
class _Node:
    name: str
    kind: str
    us: NDArray[np.float64]


def profile_file(
    path: Path,
    crops: NDArray[np.uint8],
    *,
    precision: str,
    sha256: str,
    batches: Sequence[int],
    threads: int,
    rounds: int = 12,
    calls: int = 2,
) -> FileProfile:
    """Profiles one ONNX file.

    Args:
        path: the file.
        crops: `(n, 1, size, size)` uint8, at least as many as the largest batch.
        precision: of the file, for the record, as is `sha256`.
        sha256: see `precision`.
        batches: crops a call.
        threads: of ONNX Runtime.
        rounds: turns of each batch size.
        calls: that count in a turn; one more goes before them.

    Raises:
        InputError: a batch size that makes no sense.
        BackendError: the profile is not what ONNX Runtime's profiles are known to be.
    """
    check_batches(batches, len(crops))
    rng = np.random.default_rng(0)
    order = [int(batch) for _ in range(rounds) for batch in rng.permutation(list(batches))]
    with tempfile.TemporaryDirectory() as folder:
        events = _profiled(path, crops, order, calls, threads, folder)
    owner = np.repeat(order, calls + 1)
    owner[:: calls + 1] = 0  # a turn's first call counts for no batch
    nodes = _nodes(events, len(owner), path)
    kinds: dict[str, list[_Node]] = defaultdict(list)
    for node in nodes:
        kinds[node.kind].append(node)
    by_kind = [_operator_time(kind, kind, members, owner, batches) for kind, members in kinds.items()]
    by_node = [_operator_time(node.name, node.kind, [node], owner, batches) for node in nodes]
    total = _operator_time("all", "all", nodes, owner, batches)
    dearest = sorted(by_node, key=_most, reverse=True)[:DEAREST]
    by_kind.sort(key=_most, reverse=True)
    return FileProfile(path.name, sha256, precision, total.us_a_face, tuple(by_kind), tuple(dearest))


def _profiled(
    path: Path, crops: NDArray[np.uint8], order: Sequence[int], calls: int, threads: int, folder: str
) -> list[dict[str, Any]]:
    """Runs the turns in a session that profiles itself, and reads the profile."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(folder) / "profile")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for batch in order:
        time.sleep(PAUSE)
        for _ in range(calls + 1):
            session.run(None, {"crops": crops[:batch]})
    events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return events


def _nodes(events: list[dict[str, Any]], calls: int, path: Path) -> list[_Node]:
    """Each node's microseconds by call."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found[event["args"]["node_index"]].append(event)
    if not found or any(len(told) != calls for told in found.values()):
        raise BackendError(f"ONNX Runtime's profile of {path.name} does not name each node once a call")
    return [
        _Node(
            told[0]["name"].removesuffix("_kernel_time"),
            told[0]["args"]["op_name"],
            np.array([event["dur"] for event in told], np.float64),
        )
        for told in found.values()
    ]


def _operator_time(
    name: str, kind: str, nodes: Sequence[_Node], owner: NDArray[np.int64], batches: Sequence[int]
) -> OperatorTime:
    us = np.sum([node.us for node in nodes], axis=0)
    a_face = tuple(round(float(np.median(us[owner == batch])) / batch, 2) for batch in batches)
    return OperatorTime(name, kind, len(nodes), a_face)


def _most(time: OperatorTime) -> float:
    return max(time.us_a_face)


def profile_bundle(
    bundle: Path, *, batches: Sequence[int] = (1, 8, 32), threads: int, rounds: int = 12, calls: int = 2
) -> Profile:
    """Profiles a bundle's int8 and fp32 files, those that are there.

    Raises:
        InputError: it has neither.
    """
    manifest = Manifest.read(bundle)
    named = {entry.precision: (name, entry) for name, entry in manifest.files.items() if entry.kind == "onnx"}
    if not set(PRECISIONS) & set(named):
        raise InputError(f"{bundle} has no ONNX file of precision {' or '.join(PRECISIONS)}; kp export makes fp32")
    crops = varied_crops(max(batches), manifest.spec)
    files = tuple(
        profile_file(
            manifest.check_file(bundle, named[precision][0]),
            crops,
            precision=precision,
            sha256=named[precision][1].sha256,
            batches=batches,
            threads=threads,
            rounds=rounds,
            calls=calls,
        )
        for precision in PRECISIONS
        if precision in named
    )
    return Profile(tuple(batches), rounds * calls, files)


def main() -> None:
    """Measures one bundle."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=12, help="turns of each batch size, with two calls each")
    args = made.parse_args()
    if args.rounds < 1:
        raise InputError(f"--rounds must be 1 or more, got {args.rounds}")
    result = profile_bundle(args.bundle, threads=checked_threads(args.threads), rounds=args.rounds)
    settings = {"threads": args.threads, "rounds": args.rounds}
    finish(record_from("operators", args.bundle, settings, result), args.out)


if __name__ == "__main__":
    run(main)
