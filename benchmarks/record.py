"""What a benchmark writes down: one JSON document with the machine, the model, and the numbers.

Every file in `benchmarks/results/` is a `Record`. Its schema has a version; another one is
refused, not guessed. Times are milliseconds unless a name says otherwise.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kp_runtime.bench_results import write_document
from kp_runtime.errors import InputError
from kp_runtime.machine import load_average, machine_from_system
from kp_runtime.manifest import Manifest
from kp_runtime.timing import Ratio, ratio_of_medians

__all__ = [
    "KINDS",
    "RESULTS",
    "SCHEMA",
    "Record",
    "described_bundle",
    "machine_name",
    "median_of",
    "read_record",
    "read_records",
    "record_from",
    "write_record",
]

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"
KINDS = ("engines", "operators", "crop-path", "stages", "start", "gpu-crops", "gpu-network", "gpu-end-to-end")
PACKAGES = ("openvino", "torch")
"""Beyond those that the machine's description names."""

GPU_PACKAGES = ("cuda-bindings", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "onnxruntime-gpu", "tensorrt", "triton")
"""The same for results of a GPU."""


@dataclass(frozen=True)
class Record:
    """One run of one benchmark.

    Attributes:
        kind: one of `KINDS`.
        machine: what it ran on, a `kp_runtime.machine.Machine`.
        load_average: of 1, 5 and 15 minutes when the run was over; its own threads are in it.
        packages: versions of what was measured beyond those in `machine`; only what is installed.
        bundle: the model that was measured; empty where none was.
        settings: threads, samples and the like.
        measured: the benchmark's own result.
        schema: version of this layout.
    """

    kind: str
    machine: dict[str, Any]
    load_average: list[float] | None
    packages: dict[str, str]
    bundle: dict[str, Any]
    settings: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def file_name(self) -> str:
        """`[GPU-]MACHINE-BUNDLE-KIND.json`, so that machines and models keep files of their own."""
        gpu = self.measured.get("device", {}).get("name", "")
        words = [gpu, machine_name(self.machine), self.bundle.get("folder", ""), self.kind]
        slug = re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, words)).lower()).strip("-")
        return f"{slug}.json"


def machine_name(machine: dict[str, Any]) -> str:
    """A board's name, or a processor's with its newest instruction set, and the cores in use.

    Processors of one name differ in what they can: clouds hide all but the maker's.
    """
    name = machine.get("device") or " ".join([machine["cpu"], *(machine.get("instructions") or ())[-1:]])
    return f"{name}, {machine['cores_usable']} cores"


def record_from(kind: str, bundle: Path | None, settings: dict[str, Any], measured: Any) -> Record:
    """A record of this machine, as it is now, from a benchmark's result dataclass."""
    machine, load = dataclasses.asdict(machine_from_system()), load_average()
    described = described_bundle(bundle) if bundle else {}
    return Record(
        kind, machine, list(load or ()) or None, _versions(kind), described, settings, dataclasses.asdict(measured)
    )


def described_bundle(bundle: Path) -> dict[str, Any]:
    """Which model a bundle holds: enough to tell whether two results are of the same one."""
    manifest = Manifest.read(bundle)
    checkpoint = manifest.files.get("checkpoint.safetensors")
    return {
        "folder": bundle.resolve().name,
        "name": manifest.spec.name,
        "size": manifest.spec.size,
        "reduce": manifest.training.get("config", {}).get("reduce", 1),
        "checkpoint_sha256": checkpoint.sha256 if checkpoint else None,
    }


def _versions(kind: str) -> dict[str, str]:
    found = {}
    for name in PACKAGES + GPU_PACKAGES * kind.startswith("gpu-"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_record(record: Record, path: Path) -> None:
    """Writes the record; lists of numbers stand on one line each."""
    write_document(dataclasses.asdict(record), path)


def read_record(path: Path) -> Record:
    """Reads and checks one results file.

    Raises:
        InputError: no JSON, another schema, an unknown kind, or fields that are not the schema's.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} can't be read as JSON ({error}); measure again with: make bench") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise InputError(
            f"{path} has schema {schema}, this checkout reads schema {SCHEMA}; measure again with: make bench"
        )
    try:
        record = Record(**raw)
    except TypeError as error:
        raise InputError(f"{path} is no benchmark's result ({error}); measure again with: make bench") from error
    if record.kind not in KINDS:
        raise InputError(f"{path} is of kind {record.kind!r}, not one of {', '.join(KINDS)}; delete or rename it")
    return record


def read_records(folder: Path = RESULTS) -> list[Record]:
    """All results of a folder, in the order of their file names.

    Raises:
        InputError: there is no such folder, or one of them can't be read.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; name the one that holds the results")
    return [read_record(path) for path in sorted(folder.glob("*.json"))]


def median_of(values: list[float]) -> Ratio:
    """The median of samples that have no turns, with its 95% bootstrap interval, in their own unit."""
    return ratio_of_medians([[value] for value in values], [[1.0]])
