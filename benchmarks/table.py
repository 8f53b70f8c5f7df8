"""Writes the tables of docs/benchmarks.md and benchmarks_operators.md from benchmarks/results/, a section a machine.

    python -m benchmarks.table

Operators by batch have the second page, all else the first. What stands between the two markers of a page is made; the
text around them is written by hand and stays.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import markdown_table, run, with_made_part
from benchmarks.record import KINDS, RESULTS, Record, machine_name, read_records, write_record
from kp_runtime.errors import InputError
from kp_runtime.files import write_file
from kp_runtime.timing import Ratio

__all__ = [
    "BEGIN",
    "DOCS",
    "END",
    "PAGES",
    "docs_with_tables",
    "finish",
    "pages_with_tables",
    "tables_from_records",
    "without_samples",
]

DOCS = Path(__file__).resolve().parents[1] / "docs"
OPERATORS = "operators"
PAGES = {
    "benchmarks.md": tuple(kind for kind in KINDS if kind != OPERATORS),
    "benchmarks_operators.md": (OPERATORS,),
}
"""The kinds of results whose tables each page shows."""
BEGIN = "<!-- begin: made by python -m benchmarks.table -->"
END = "<!-- end: made by python -m benchmarks.table -->"
NOTHING = "There are no results here yet; `make bench` makes them."


def pages_with_tables(folder: Path, records: Sequence[Record]) -> dict[Path, str]:
    """The pages of a folder with their tables made anew, by path; nothing is written.

    Raises:
        InputError: a page lacks the markers, or a record a field.
    """
    return {
        folder / name: docs_with_tables(
            (folder / name).read_text(encoding="utf-8"), [record for record in records if record.kind in kinds]
        )
        for name, kinds in PAGES.items()
    }


def docs_with_tables(text: str, records: Sequence[Record]) -> str:
    """A page with the tables of these records made anew.

    Raises:
        InputError: the page lacks the markers, or a record a field.
    """
    return with_made_part(text, BEGIN, END, tables_from_records(records))


def tables_from_records(records: Sequence[Record]) -> str:
    """All tables as Markdown: by machine, then by kind, then as the records are ordered.

    Raises:
        InputError: a record lacks a field of its kind.
    """
    machines: dict[str, list[Record]] = {}
    for record in records:
        try:
            machines.setdefault(machine_name(record.machine), []).append(record)
        except (KeyError, TypeError) as error:
            raise InputError(f"a result does not say on what machine it is, {error}; measure again") from error
    sections = [_section(name, members) for name, members in machines.items()]
    return "\n\n".join(sections) or NOTHING


def _section(name: str, records: Sequence[Record]) -> str:
    parts = [f"## {name}", _machine_line(records[0].machine)]
    for record in sorted(records, key=lambda r: KINDS.index(r.kind)):
        try:
            parts += [*_KINDS[record.kind](record)]
        except (KeyError, TypeError, IndexError) as error:
            raise InputError(
                f"a result of kind {record.kind} lacks or mistakes the field {error}; measure again with: make bench"
            ) from error
    return "\n\n".join(parts)


def _machine_line(machine: dict[str, Any]) -> str:
    mib = machine.get("memory_mib")
    told = [
        str(machine.get("architecture")),
        ", ".join(machine.get("instructions") or ()),
        f"{mib / 1024:.0f} GiB" if mib else "",
        f"{machine.get('system')}, kernel {machine.get('kernel')}",
    ]
    return "; ".join(part for part in told if part) + "."


def _caption(record: Record) -> str:
    """Which model and versions, under how many threads."""
    bundle, settings = record.bundle, record.settings
    versions = {**record.machine["versions"], **record.packages}
    told = [f"{bundle['name']}, {bundle['size']} px crops" if bundle else ""]
    if bundle.get("reduce", 1) > 1:
        told[0] += f" of which the network sees means of {bundle['reduce']} x {bundle['reduce']}"
    told.append(f"{settings['threads']} threads" if "threads" in settings else "")
    told.append(", ".join(f"{name} {version}" for name, version in versions.items() if version))
    load = f"load average after it {record.load_average[0]:.1f}" if record.load_average else ""
    return "; ".join(part for part in (*told, load) if part) + "."


def _engines(record: Record) -> Iterable[str]:
    cases = record.measured["cases"]
    batches = sorted({case["batch"] for case in cases})
    by_engine: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for case in cases:
        by_engine.setdefault((case["engine"], case["precision"]), {})[case["batch"]] = case
    yield f"### The network in each engine: {record.bundle['folder']}"
    yield _caption(record) + " Milliseconds a face, median with its 95% interval."
    columns = ("engine", "precision", *(f"batch {batch}" for batch in batches), "most px from PyTorch")
    yield markdown_table(columns, [(*key, *_engine_cells(by_batch, batches)) for key, by_batch in by_engine.items()])
    if ratios := record.measured["int8_ort_over_openvino"]:
        yield "ONNX Runtime's time over OpenVINO's, both int8; under 1 ONNX Runtime is faster:"
        rows = [(r["batch"], *_ratio_cells(r["ratio"]), Ratio(**r["ratio"]).verdict) for r in ratios]
        yield markdown_table(("batch", "ratio", "95% interval", "ONNX Runtime is"), rows)
    fed = [f"{c['precision']} {c['batch']} {c['feeding']}" for c in cases if c["feeding"]]
    if fed:
        yield f"How `kp_runtime` fed ONNX Runtime's batches: {', '.join(fed)}."
    if out := record.measured["left_out"]:
        yield "Left out:\n\n" + "\n".join(f"- {_left_out_name(item)}: {item['reason']}" for item in out)


def _engine_cells(by_batch: dict[int, dict[str, Any]], batches: Sequence[int]) -> list[str]:
    cells = []
    for batch in batches:
        if case := by_batch.get(batch):
            low, high = case["ms_a_face_low"], case["ms_a_face_high"]
            cells.append(f"{case['ms_a_face']:.2f} ({low:.2f} to {high:.2f})")
        else:
            cells.append("")
    return [*cells, f"{max(case['distance_px'] for case in by_batch.values()):.4f}"]


def _left_out_name(item: dict[str, Any]) -> str:
    return f"{item['engine']} {item['precision']}" + (f" at batch {item['batch']}" if item["batch"] else "")


def _operators(record: Record) -> Iterable[str]:
    batches = record.measured["batches"]
    yield f"### Operators by batch: {record.bundle['folder']}"
    yield _caption(record) + " Microseconds a face; the last column is the last batch over the first."
    columns = ("", "nodes", *(f"batch {batch}" for batch in batches), "ratio")
    for file in record.measured["files"]:
        all_of_them = {"name": "all", "nodes": sum(kind["nodes"] for kind in file["kinds"])}
        total = all_of_them | {"us_a_face": file["total_us_a_face"]}
        yield f"`{file['file']}`:"
        yield markdown_table(columns, [_operator_cells(kind) for kind in [*file["kinds"], total]])
        yield "Its dearest nodes:"
        yield markdown_table(columns, [_operator_cells(node) for node in file["nodes"]])


def _operator_cells(time: dict[str, Any]) -> tuple[Any, ...]:
    us = time["us_a_face"]
    return time["name"], time["nodes"], *(f"{value:.1f}" for value in us), f"{us[-1] / us[0]:.2f}" if us[0] else ""


def _crop_path(record: Record) -> Iterable[str]:
    yield "### Everything but the network"
    yield _caption(record) + " Microseconds a call of all boxes, medians; OpenCV on one thread."
    rows = [
        (
            f"{case['faces']} x {case['box']} px",
            f"{case['size']} px",
            case["threads"],
            *(f"{case[stage]['p50_ms'] * 1e3:.0f}" for stage in ("total", "crop", "map_back", "by_hand")),
            *_ratio_cells(case["crop_over_by_hand"]),
            f"{case['peak_kb']:.0f}",
            f"{case['growth_kb']:.1f} in {case['growth_calls']}",
        )
        for case in record.measured["cases"]
    ]
    columns = (
        "boxes",
        "crop",
        "threads",
        "total",
        "crop stage",
        "map back",
        "by hand",
        "crop / by hand",
        "95% interval",
    )
    yield markdown_table((*columns, "peak kB a call", "kB left by calls"), rows)


def _stages(record: Record) -> Iterable[str]:
    yield f"### What a stage costs one core: {record.bundle['folder']}"
    yield (
        f"{_caption(record)} `{record.settings['file']}`. Medians in milliseconds a call; the processor time is "
        "what all threads of the process took."
    )
    rows = [
        (
            f"{case['stage']} {case['what']}",
            case["faces"] or "",
            "" if case["bytes"] is None else f"{case['bytes'] / 1e3:.0f}",
            *(f"{case[of]['p50_ms']:.3f}" for of in ("time", "cpu")),
        )
        for case in record.measured["cases"]
    ]
    yield markdown_table(("stage", "faces", "kB a frame", "time", "processor time"), rows)
    if left := record.measured["left_out"]:
        yield "Left out:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in left.items())


def _start(record: Record) -> Iterable[str]:
    yield f"### Start: {record.bundle['folder']}"
    yield _caption(record) + f" `{record.measured['file']}`, {record.settings['runs']} fresh processes of each kind."
    rows = [
        (t["subject"], t["quantity"], t["unit"], f"{t['median']['value']:.1f}", _interval(t["median"], 1))
        for t in record.measured["times"]
    ]
    yield markdown_table(("what", "of it", "unit", "median", "95% interval"), rows)


def _gpu(record: Record) -> Iterable[str]:
    device = record.measured["device"]
    title = {"gpu-crops": "Crops", "gpu-network": "The network", "gpu-end-to-end": "From a 1080p frame"}[record.kind]
    yield f"### {title} on {device['name']}: {record.bundle['folder']}"
    told = [f"Compute capability {device['compute_capability']}, CUDA {device['cuda']}, driver {device['driver']}"]
    told += [f"nvidia-smi after it: {device['smi']}"] if device["smi"] else []
    yield f"{_caption(record)} {'; '.join(told)}. Milliseconds a call."
    rows = [
        (
            case["what"],
            case["batch"] or "",
            *(f"{case['time'][key]:.3f}" for key in ("p50_ms", "p50_low_ms", "p50_high_ms", "p95_ms")),
            f"{case['gb_a_second']:.0f}" if case["gb_a_second"] else "",
            f"{case['of_copy']:.0%}" if case["of_copy"] else "",
            "" if case["distance_px"] is None else f"{case['distance_px']:.3f}",
        )
        for case in sorted(record.measured["cases"], key=lambda case: case["batch"] or 0)
    ]
    columns = ("what", "faces", "p50", "low", "high", "p95", "GB/s", "of the copy", "px from PyTorch")
    yield markdown_table(columns, rows)
    if left := record.measured["not_run"]:
        lines = [
            f"- {c['what']}" + (f" {list(c['batches'])}" if c["batches"] else "") + f": {c['reason']}" for c in left
        ]
        yield "Not run:\n\n" + "\n".join(lines)


def _ratio_cells(ratio: dict[str, float]) -> tuple[str, str]:
    return f"{ratio['value']:.2f}", _interval(ratio, 2)


def _interval(ratio: dict[str, float], digits: int) -> str:
    return f"{ratio['low']:.{digits}f} to {ratio['high']:.{digits}f}"


_KINDS: dict[str, Callable[[Record], Iterable[str]]] = {
    "engines": _engines,
    "operators": _operators,
    "crop-path": _crop_path,
    "stages": _stages,
    "start": _start,
    **{kind: _gpu for kind in KINDS if kind.startswith("gpu-")},
}


def finish(record: Record, out: Path | None) -> None:
    """Writes the results file; prints its tables and, as the last line, the record without its single samples."""
    path = out or RESULTS / record.file_name
    write_record(record, path)
    print(f"written: {path}", file=sys.stderr)
    print(tables_from_records([record]))
    print(json.dumps(without_samples(dataclasses.asdict(record))))


def without_samples(value: Any) -> Any:
    """A JSON value whose keys for single samples (`turns_…`, `values`) are left out."""
    if isinstance(value, dict):
        return {k: without_samples(v) for k, v in value.items() if not k.startswith("turns_") and k != "values"}
    return [without_samples(item) for item in value] if isinstance(value, (list, tuple)) else value


def main() -> None:
    """Makes the pages' tables anew."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--docs", type=Path, default=DOCS, help="the folder of the pages")
    args = made.parse_args()
    for page, text in pages_with_tables(args.docs, read_records(args.results)).items():
        write_file(page, text)


if __name__ == "__main__":
    run(main)
