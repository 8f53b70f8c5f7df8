"""What `kp bench` finds, and its JSON document: `docs/bench.md` says what each field means.

All times are in milliseconds. Raw samples are rounded to 0.1 microsecond, and the percentiles are
those of the rounded samples, so that a document agrees with itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from kp_runtime.errors import InputError
from kp_runtime.files import write_file
from kp_runtime.machine import Machine
from kp_runtime.timing import TimeSummary, summary_from_turns

__all__ = [
    "SCHEMA",
    "Bench",
    "BenchSettings",
    "ColdStart",
    "FileRun",
    "NetworkCase",
    "PhotoRun",
    "Setup",
    "Times",
    "json_from_bench",
    "results_from_file",
    "times_from_turns",
    "write_document",
    "write_results",
]

SCHEMA = 1
_TRT = re.compile(r"\.trt\d+(\.\d+)*(\.post\d+)?(?=\..*plan$)")
"""TensorRT's version in a plan's name."""

_ADDED: dict[str, dict[str, Any]] = {
    "": {"left_out": {}}, "setup": {"gpu": None}, "setup.settings": {"cores": None, "backend": "auto"},
}  # fmt: skip
"""What results of schema 1 that were written before a field was added stand for."""


@dataclass(frozen=True)
class BenchSettings:
    """What is measured and for how long.

    Attributes:
        batches: batch sizes of the network alone.
        seconds: least time for each case.
        samples: least number of samples for each case.
        threads: threads of the engine; None leaves it the choice.
        precisions: of the files that run; none means all files of the bundle.
        cores: numbers of the cores that the run was kept on, such as `0,2,3`; None means all of them.
        backend: the engine; `auto` takes each file's best that works here.
    """

    batches: tuple[int, ...] = (1, 8)
    seconds: float = 3.0
    samples: int = 200
    threads: int | None = None
    precisions: tuple[str, ...] = ()
    cores: str | None = None
    backend: str = "auto"


@dataclass(frozen=True)
class Setup:
    """All that is known before anything is measured.

    Attributes:
        bundle: the bundle's folder.
        photo: the photo's path.
        photo_sha256: of the file.
        photo_size_hw: the photo's height and width in pixels.
        faces: how many the detector found on it.
        detector: the detector's name.
        settings: what was asked for.
        machine: what it ran on.
        gpu: name and kind of the GPU; None where all ran on the CPU.
    """

    bundle: str
    photo: str
    photo_sha256: str
    photo_size_hw: tuple[int, ...]
    faces: int
    detector: str
    settings: BenchSettings
    machine: Machine
    gpu: str | None = None

    def __post_init__(self) -> None:
        if len(self.photo_size_hw) != 2:
            raise InputError("a photo's size must be its height and width")


@dataclass(frozen=True)
class Times:
    """One thing's times.

    Attributes:
        summary: percentiles of all samples.
        turns_ms: every sample, by turn.
    """

    summary: TimeSummary
    turns_ms: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.turns_ms or not all(self.turns_ms) or min(map(min, self.turns_ms)) <= 0:
            raise InputError("a case must have turns, each turn samples, and each sample must be over 0 ms")
        s = self.summary
        if not 0 < s.min_ms <= min(s.p50_low_ms, s.p50_ms) <= s.p95_ms <= s.p99_ms <= s.max_ms:
            raise InputError("a case's percentiles must rise from the shortest to the longest sample")


@dataclass(frozen=True)
class ColdStart:
    """A file in fresh processes: medians over `processes` of them.

    Attributes:
        processes: how many there were.
        load_ms: from the engine's import to a checked, loaded model.
        first_ms: the first call after that, one face.
        base_mib: peak resident memory before the load: Python, numpy and kp_runtime; None without /proc.
        peak_mib: peak resident memory after the first call.
    """

    processes: int
    load_ms: float
    first_ms: float
    base_mib: float | None
    peak_mib: float | None


@dataclass(frozen=True)
class FileRun:
    """A model file that ran.

    Attributes:
        file: its name in the bundle.
        sha256: of the file.
        bytes: its size.
        precision: of the file.
        backend: the engine that ran it.
        golden_error_px: distance of its golden keypoints from PyTorch's; None without a golden crop.
        ways: largest batch of a group of sizes to each way of feeding it, with its shortest ms a face;
            the first is the one that ran. Empty where the engine knows one way.
        cold: how it starts.
    """

    file: str
    sha256: str
    bytes: int
    precision: str
    backend: str
    golden_error_px: float | None
    ways: dict[str, dict[str, float]]
    cold: ColdStart

    def way(self, batch: int) -> str:
        """How batches of this size were fed; empty where the engine knows one way."""
        sizes = [int(size) for size in self.ways if size.isdecimal() and int(size) >= batch]
        return next(iter(self.ways[str(min(sizes))]), "") if sizes and batch > 1 else ""


@dataclass(frozen=True)
class NetworkCase:
    """The network alone: one file at one batch size; `times` are of a whole batch."""

    file: str
    batch: int
    ms_a_face: float
    times: Times

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"a batch size must be 1 or more, got {self.batch}")


@dataclass(frozen=True)
class PhotoRun:
    """The whole way from a photo's file to its keypoints.

    Attributes:
        file: the model file that ran.
        whole: the whole call, its stages not timed.
        stages: its stages, in order, from calls of their own.
    """

    file: str
    whole: Times
    stages: dict[str, Times]

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError("a photo's run must have stages")


@dataclass(frozen=True)
class Bench:
    """One run's results.

    Attributes:
        setup: machine, settings, photo.
        started: when, in UTC, ISO 8601.
        load_before: load average before the run; None where the system does not tell.
        load_after: and after it.
        files: the model files that ran.
        network: the network alone.
        photo: the whole way.
        left_out: files of the bundle that can't run here, each with the reason.
        schema: version of this layout.
    """

    setup: Setup
    started: str
    load_before: tuple[float, ...] | None
    load_after: tuple[float, ...] | None
    files: tuple[FileRun, ...]
    network: tuple[NetworkCase, ...]
    photo: PhotoRun
    left_out: dict[str, str]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if () in (self.load_before, self.load_after):
            raise InputError("a load average must have numbers, or be null")

    def cases(self) -> dict[str, Times]:
        """Everything that was timed, by a name for people."""
        stages = {f"stage {name}": times for name, times in self.photo.stages.items()}
        names = {file.file: name for name, file in self.named_files().items()}
        network = {f"{names.get(case.file, case.file)}, batch {case.batch}": case.times for case in self.network}
        return {"whole photo": self.photo.whole} | stages | network

    def named_files(self) -> dict[str, FileRun]:
        """The files that ran, by the name under which two results have them.

        A plan's is without TensorRT's version, as the one after an update is to be compared with the one before, or
        its own where two differ in that alone.
        """
        short = [_TRT.sub("", file.file) for file in self.files]
        pairs = zip(short, self.files, strict=True)
        return {name if short.count(name) == 1 else file.file: file for name, file in pairs}


def times_from_turns(turns: Sequence[Sequence[float]]) -> Times:
    """Rounds and sums up samples given in seconds."""
    rounded = tuple(tuple(max(round(s * 1e3, 4), 1e-4) for s in turn) for turn in turns)
    return Times(summary_from_turns([[ms / 1e3 for ms in turn] for turn in rounded]), rounded)


def json_from_bench(result: Any) -> dict[str, Any]:
    """The document of a `Bench`, or of a `Tuning`, as plain data, its schema first."""
    return {"schema": result.schema} | dataclasses.asdict(result)


def write_results(result: Any, path: Path) -> Path:
    """Writes the document; each turn is a line."""
    return write_document(json_from_bench(result), path)


def write_document(document: dict[str, Any], path: Path) -> Path:
    """Writes JSON whose lists of numbers are a line each."""
    text = json.dumps(document, indent=1)
    # a line break in a document is never inside a text, so this joins lists of numbers alone
    text = re.sub(r"\[\n\s+([-+.\deE,\n ]+?)\n\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    write_file(path, text + "\n")
    return path


def results_from_file(path: Path) -> Bench:
    """Reads and checks a document.

    Raises:
        InputError: it can't be read, is no results file, has another schema or a wrong field.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}); give a file that kp bench --out wrote") from error
    if not isinstance(raw, dict) or "schema" not in raw or "setup" not in raw:
        raise InputError(f"{path} is no results file of kp bench; give one that kp bench --out wrote")
    if raw["schema"] != SCHEMA:
        raise InputError(
            f"{path} has schema {raw['schema']!r:.40}, this release reads {SCHEMA}: run kp bench --out again"
        )
    try:
        bench: Bench = _decoded(Bench, raw, "")
    except InputError as error:
        raise InputError(f"{path} is no results file of kp bench: {error}; run kp bench --out again") from error
    return bench


def _decoded(kind: Any, raw: Any, where: str) -> Any:
    """A value of the annotated type; fields that it does not know are left aside."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if raw is None else _decoded(inner[0], raw, where)
    if dataclasses.is_dataclass(kind):
        make, hints = cast("Callable[..., object]", kind), get_type_hints(kind)
        raw = _ADDED.get(where, {}) | _checked(raw, dict, where)
        if missing := [name for name in hints if name not in raw]:
            raise InputError(f"{where or 'the document'} lacks {missing[0]}")
        fields = {name: _decoded(hint, raw[name], f"{where}.{name}".lstrip(".")) for name, hint in hints.items()}
        return make(**fields)
    if origin is dict:
        items = _checked(raw, dict, where).items()
        return {name: _decoded(inner[1], value, f"{where}.{name}") for name, value in items}
    if origin is tuple:
        return tuple(_decoded(inner[0], value, where) for value in _checked(raw, list, where))
    if kind is float and type(raw) is int and abs(raw) < 2**53:
        return float(raw)
    return _checked(raw, kind, where)


def _checked(raw: Any, kind: Any, where: str) -> Any:
    names = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}
    if type(raw) is not kind or (kind is float and not math.isfinite(raw)) or (kind is int and abs(raw) >= 2**63):
        raise InputError(f"{where or 'the document'} must be {names[kind]}, got {str(raw)[:40]}")
    return raw
