"""The page of `kp bench --html`: plots, all numbers and the machine in one HTML file without links.

Everything that stands in the page is inside it. All text from outside (names of files, the photo,
the machine) is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from kp_runtime.bench_compare import Comparison
from kp_runtime.bench_plots import SERIES, Point, batch_curves, distribution, milliseconds, stage_bar
from kp_runtime.bench_results import Bench, FileRun, Times
from kp_runtime.html_page import clean, wide_table, write_page

__all__ = ["bench_page"]

_STYLE = """
:root { --0: #0b63a5; --1: #b1480a; --2: #17693a; --3: #8a3c8f; --4: #756000; --5: #b0235f }
@media (prefers-color-scheme: dark) {
  :root { --0: #6cb4f0; --1: #f5a267; --2: #6fd197; --3: #d79be0; --4: #dcc55a; --5: #ff8fb4 } }
body { max-width: 1240px } h2 { margin: 2.4rem 0 .3rem } th, td { padding: .3rem .5rem } p { max-width: 75ch }
.files th[scope=col] { white-space: normal; max-width: 6.5em }
.machine td { white-space: normal; overflow-wrap: anywhere; text-align: left }
.faster { color: var(--2); font-weight: 600 } .slower { color: var(--5); font-weight: 600 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 1.4rem;
  margin-top: 1rem }
figure { margin: .8rem 0; overflow-x: auto } .cards figure { margin: 0 }
@media screen { .plot svg { min-width: 860px } }
figcaption b { color: var(--ink) } .swatch { display: inline-block; width: .7em; height: .7em; margin-right: .5em;
  border-radius: 2px; background: var(--c) }
svg { width: 100%; height: auto; display: block; font-size: 13px; font-variant-numeric: tabular-nums }
svg text { fill: var(--c) } svg .small { font-size: 12px }
.fill { fill: var(--c) } .stroke { stroke: var(--c); fill: none } .bold { stroke-width: 2.2 }
.c0 { --c: var(--0) } .c1 { --c: var(--1) } .c2 { --c: var(--2) } .c3 { --c: var(--3) } .c4 { --c: var(--4) }
.c5 { --c: var(--5) } .ink { --c: var(--ink) } .soft { --c: var(--soft) } .line { --c: var(--line) }
.paper { --c: var(--paper) }
"""

_READING = """<p class=soft>p50 is the median; the range beside it holds the true median with 95% confidence, by a
bootstrap over whole turns. No sample was left out. All cases ran in turns, each turn after a short rest and one call
that was not timed.</p>
"""


def bench_page(bench: Bench, path: Path, comparison: Comparison | None = None) -> Path:
    """Writes the page; with a comparison, the one of these results with older ones."""
    title = f"{Path(bench.setup.bundle).resolve().name}: bench"
    body = [_header(bench, title), _files(bench), _comparison(comparison), _curves(bench), _stages(bench)]
    body += [_distributions(bench), _numbers(bench), _machine(bench), _hashes(bench)]
    return write_page(path, title, _STYLE, body)


def _header(bench: Bench, title: str) -> str:
    setup, machine = bench.setup, bench.setup.machine
    faces = f"{setup.faces} face{'s' * (setup.faces != 1)}"
    threads = (
        "threads of the engine's choice" if setup.settings.threads is None else f"{setup.settings.threads} threads"
    )
    where = f"{machine.device or machine.cpu}, {machine.cores} cores, {threads}"
    photo = f"{Path(setup.photo).name}, {setup.photo_size_hw[1]} x {setup.photo_size_hw[0]} pixels, {faces}"
    when = f"{bench.started[:16].replace('T', ' ')} UTC"
    return f"<h1>{clean(title)}</h1>\n<p>{clean(where)}; {clean(photo)}; {clean(when)}</p>\n{_READING}"


def _files(bench: Bench) -> str:
    """The answers first: a file a line."""
    batches = list(dict.fromkeys(case.batch for case in bench.network))
    head = ["file", "precision", "engine", "MB", *(f"ms a face, batch {batch}" for batch in batches)]
    rows = [
        [*_file_cells(file), *(_a_face(bench, file, b) for b in batches), *_cold_cells(file)] for file in bench.files
    ]
    starts = bench.files[0].cold.processes if bench.files else 0
    note = f"Load and memory: medians of {starts} fresh processes each. The load checks the file's sha256 and the "
    note += "golden crop; “before” is the memory of Python, numpy and kp_runtime alone."
    table = _table("The files", [*head, "load ms", "first call ms", "peak MiB", "before"], rows, text=3)
    return f"<h2>The files</h2>\n<div class=files>{table}</div>\n<p class=soft>{note}</p>\n"


def _file_cells(file: FileRun) -> list[str]:
    return [file.file, file.precision, file.backend, f"{file.bytes / 1e6:.1f}"]


def _cold_cells(file: FileRun) -> list[str]:
    cold = file.cold
    memory = ["" if mib is None else f"{mib:.0f}" for mib in (cold.peak_mib, cold.base_mib)]
    return [milliseconds(cold.load_ms), milliseconds(cold.first_ms), *memory]


def _a_face(bench: Bench, file: FileRun, batch: int) -> str:
    found = [case for case in bench.network if (case.file, case.batch) == (file.file, batch)]
    return milliseconds(found[0].ms_a_face) if found else ""


def _curves(bench: Bench) -> str:
    curves: dict[str, list[Point]] = {}
    for case in sorted(bench.network, key=lambda case: case.batch):
        s = case.times.summary
        point = Point(case.batch, case.ms_a_face, s.p50_low_ms / case.batch, s.p50_high_ms / case.batch)
        curves.setdefault(case.file, []).append(point)
    # the files in the order of the first table, so that a file has one colour everywhere
    curves = {file.file: curves[file.file] for file in bench.files if file.file in curves}
    return (
        f"<h2>The network alone, by batch size</h2>\n<figure class=plot tabindex=0>{batch_curves(curves)}</figure>\n"
        if curves
        else ""
    )


def _stages(bench: Bench) -> str:
    photo = bench.photo
    medians = {name: times.summary.p50_ms for name, times in photo.stages.items()}
    rows = [[name, *_summary_cells(times)] for name, times in (*photo.stages.items(), ("whole call", photo.whole))]
    head = ["stage", *_SUMMARY]
    note = "The stages are of other calls than the whole one; their medians need not add up to its."
    heading = f"From the photo's file to its keypoints, with {photo.file}"
    return (
        f"<h2>{clean(heading)}</h2>\n<figure class=plot tabindex=0>{stage_bar(medians)}</figure>\n"
        f"{_table(heading, head, rows, swatches=len(medians))}<p class=soft>{note}</p>\n"
    )


def _distributions(bench: Bench) -> str:
    colors = {file.file: i % SERIES for i, file in enumerate(bench.files)}
    cases = [(f"{c.file}, batch {c.batch}", c.times, colors.get(c.file, 0)) for c in bench.network]
    cases.append((f"whole photo with {bench.photo.file}", bench.photo.whole, colors.get(bench.photo.file, 0)))
    figures = []
    for name, times, color in cases:
        s = times.summary
        words = f"{s.samples} samples in {len(times.turns_ms)} turns, longest {milliseconds(s.max_ms)} ms"
        caption = f"<figcaption><b>{clean(name)}</b><br>{words}</figcaption>"
        figures.append(f"<figure>{distribution(name, times, color)}{caption}</figure>\n")
    note = "Histograms of all samples, each on its own logarithmic axis; even a single sample has a visible bar."
    return f"<h2>Distributions</h2>\n<p class=soft>{note}</p>\n<div class=cards>\n{''.join(figures)}</div>\n"


_SUMMARY = ("samples", "turns", "p50 ms", "95% interval", "p95", "p99", "longest", "shortest", "mean")


def _summary_cells(times: Times) -> list[str]:
    s = times.summary
    interval = f"{s.p50_low_ms:.3f} to {s.p50_high_ms:.3f}"
    rest = (f"{value:.3f}" for value in (s.p95_ms, s.p99_ms, s.max_ms, s.min_ms, s.mean_ms))
    return [str(s.samples), str(len(times.turns_ms)), f"{s.p50_ms:.3f}", interval, *rest]


def _numbers(bench: Bench) -> str:
    files = {file.file: file for file in bench.files}
    rows = []
    for case in bench.network:
        way = files[case.file].way(case.batch) if case.file in files else ""
        rows.append([case.file, way, str(case.batch), *_summary_cells(case.times), f"{case.ms_a_face:.3f}"])
    head = ["file", "batch fed", "batch", *_SUMMARY, "ms a face"]
    heading = "The network alone: all numbers"
    return f"<h2>{heading}</h2>\n{_table(heading, head, rows, text=2)}"


def _comparison(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    rows = []
    for c in comparison.cases:
        interval = f"{c.ratio.low:.3f} to {c.ratio.high:.3f}"
        rows.append([c.case, f"{c.old_ms:.3f}", f"{c.new_ms:.3f}", f"{c.ratio.value:.3f}", interval, c.verdict])
    heading, head = "Against older results", ["case", "old p50 ms", "new p50 ms", "new / old", "95% interval"]
    table = _table(heading, [*head, "the new one is"], rows)
    for verdict in ("faster", "slower"):
        table = table.replace(f"<td>{verdict}</td>", f"<td class={verdict}>{verdict}</td>")
    against = [f"no fair comparison: {text}" for text in comparison.obstacles]
    lines = "".join(f"<p class=soft>{clean(text)}</p>\n" for text in (*against, *comparison.alone, *comparison.notes))
    return f"<h2>{heading}</h2>\n{table}{lines}"


def _machine(bench: Bench) -> str:
    heading = "Machine and settings"
    return f"<h2>{heading}</h2>\n<div class=machine>{_table(heading, [], list(_facts(bench)))}</div>\n"


def _facts(bench: Bench) -> Iterable[list[str]]:
    """What is known, a line each; what the system does not tell is left out."""
    setup, machine = bench.setup, bench.setup.machine
    usable = f"{machine.cores}, of which this process may use {machine.cores_usable}"
    quota = "" if machine.cpu_quota is None else f", limited to the time of {machine.cpu_quota:g}"
    clock = " ".join(_known("now {:.0f} MHz", machine.mhz) + _known("from {:.0f}", machine.mhz_least)
                     + _known("to {:.0f}", machine.mhz_most))  # fmt: skip
    facts: list[tuple[str, object]] = [
        ("device", machine.device),
        ("CPU", f"{machine.cpu} ({machine.architecture})"),
        ("cores", usable + quota),
        ("instructions that matter", " ".join(machine.instructions) or "none of those looked for"),
        ("clock of the first core", clock or "not told by the system"),
        ("governor", machine.governor or "not told by the system"),
        ("memory", f"{machine.memory_mib} MiB" if machine.memory_mib else None),
        ("system", f"{machine.system}, kernel {machine.kernel}"),
        ("versions", ", ".join(f"{name} {version or 'not installed'}" for name, version in machine.versions.items())),
        ("load average before", _loads(bench.load_before)),
        ("load average after", _loads(bench.load_after)),
        ("threads of the engine", setup.settings.threads or "its own choice"),
        ("cores that were chosen", setup.settings.cores or "all"),
        ("engine that was asked for", setup.settings.backend),
        *((f"left out: {name}", reason) for name, reason in bench.left_out.items()),
        ("least for each case", f"{setup.settings.seconds:g} s and {setup.settings.samples} samples"),
        ("detector", setup.detector),
    ]
    if jetson := machine.jetson:
        gpu = " ".join(_known("now {:.0f} MHz", jetson.gpu_mhz) + _known("from {:.0f}", jetson.gpu_mhz_least)
                       + _known("to {:.0f}", jetson.gpu_mhz_most))  # fmt: skip
        facts += [("L4T", jetson.l4t), ("power mode", jetson.power_mode or jetson.power_status), ("GPU clock", gpu)]
    return [[name, str(value)] for name, value in facts if value not in (None, "")]


def _known(text: str, value: float | None) -> list[str]:
    return [] if value is None else [text.format(value)]


def _loads(loads: tuple[float, ...] | None) -> str | None:
    return None if loads is None else ", ".join(f"{load:.2f}" for load in loads) + " (1, 5, 15 minutes)"


def _hashes(bench: Bench) -> str:
    rows = [[file.file, file.sha256] for file in bench.files] + [[bench.setup.photo, bench.setup.photo_sha256]]
    heading = "What ran, by sha256"
    return f"<h2>{heading}</h2>\n<div class=hash>{_table(heading, ['file', 'sha256'], rows, text=2)}</div>\n"


def _table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1, swatches: int = 0) -> str:
    """A table whose first `text` columns are no numbers; the first `swatches` rows begin with their colour."""
    first = "".join(_cell("th scope=col", word, i < text) for i, word in enumerate(head))
    lines = [f"<tr>{first}</tr>"] if head else []
    for number, row in enumerate(rows):
        swatch = f'<span class="swatch c{number % SERIES}"></span>' if number < swatches else ""
        cells = [
            _cell("th scope=row", row[0], True, swatch),
            *(_cell("td", w, i < text) for i, w in enumerate(row) if i),
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return wide_table(name, "".join(lines))


def _cell(tag: str, word: str, text: bool, before: str = "") -> str:
    return f"<{tag}{' class=text' if text else ''}>{before}{clean(word)}</{tag.split()[0]}>"
