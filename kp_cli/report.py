"""What the `kp` command prints: tables, JSON, progress. Nothing is measured or decided here."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import typer

from kp_runtime.errors import BundleError, KpError
from kp_runtime.manifest import DetectorManifest

__all__ = [
    "build_progress",
    "frames_progress",
    "harmless",
    "is_terminal",
    "note",
    "print_accuracy",
    "print_bench",
    "print_bundle",
    "print_comparison",
    "print_diagnosis",
    "print_folders",
    "print_groups",
    "print_json",
    "print_parity",
    "print_run",
    "print_table",
    "print_times",
    "print_tuning",
    "progress",
    "share_progress",
    "shown_before_kept",
    "stands_nowhere",
    "tell",
    "tell_subject",
]


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody looks at a stream; one that the caller closed is None."""
    return stream is not None and stream.isatty()


def harmless(text: Any) -> str:
    """Text of a file that somebody else may have made, or named: it may not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def tell(*lines: Any, err: bool = False) -> None:
    """Prints lines on stdout, or on stderr; what breaks one, as in a file's name, is escaped."""
    typer.echo("\n".join(map(harmless, lines)), err=err)


def note(text: str) -> None:
    """Prints a line beside the result, on stderr; a log that takes none, as on a full disk, ends no work."""
    with contextlib.suppress(OSError):
        tell(text, err=True)


def progress(text: str) -> Any:
    """A progress bar on stderr, for lists of more than one on a terminal."""

    def track(items: Sequence[Any]) -> Iterable[Any]:
        if len(items) < 2 or not is_terminal(sys.stderr):
            return items
        from rich.console import Console
        from rich.progress import track as rich_track

        return rich_track(items, text, console=Console(stderr=True), transient=True)

    return track


@contextlib.contextmanager
def build_progress() -> Iterator[Callable[[str, float], None] | None]:
    """Tells TensorRT's phases on stderr, each tenth of one, until the build ends; None where nobody looks."""
    if not is_terminal(sys.stderr):
        yield None
        return
    seen: set[tuple[str, int]] = set()

    def step(phase: str, share: float) -> None:
        if (phase, int(share * 10)) not in seen:
            seen.add((phase, int(share * 10)))
            tell_subject(f"{phase} {share:.0%}")

    try:
        yield step
    finally:
        tell_subject("")


@contextlib.contextmanager
def share_progress() -> Iterator[Callable[[str, float], None]]:
    """Bars on stderr for work that tells its phase and share; none where nobody looks."""
    if not is_terminal(sys.stderr):
        yield lambda phase, share: None
        return
    from rich.console import Console
    from rich.progress import Progress

    tasks: dict[str, Any] = {}
    # drawn when told alone: a thread that draws by the clock would take time from what is measured
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as bar:

        def step(phase: str, share: float) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=1.0)
            bar.update(tasks[phase], completed=share, refresh=True)

        yield step


def tell_subject(subject: str) -> None:
    """Says on stderr what is looked at, where somebody looks; an empty one wipes it away."""
    if is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb":  # which does not know how to wipe a line
        print(f"\r{harmless(subject)}\033[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def frames_progress(text: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with frames a second and, where the total is known, the time left; none where nobody looks."""
    if not is_terminal(sys.stderr):
        yield lambda frames: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    speed = TextColumn("{task.fields[rate]:.1f} frames/s")
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        speed,
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as bar:
        task, begin = bar.add_task(harmless(text), total=total, rate=0.0), time.perf_counter()
        yield lambda frames: bar.update(task, completed=frames, rate=frames / (time.perf_counter() - begin))


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the program with one line on stderr and exit status 1 at a `KpError`, or where system or memory fail."""
    try:
        yield
    except KpError as error:
        fail(program, str(error))
    except MemoryError as error:
        fail(program, f"there is too little memory: {str(error) or 'take less at once'}")
    except OSError as error:
        if error.filename is None and stands_nowhere():
            fail(program, "the folder that this shell stands in was removed; go to another one with cd")
        fail(program, f"{error.filename or 'the system'}: {error.strerror or error}")
    except RuntimeError as error:
        if not str(error).startswith("Symlink loop"):  # of pathlib, up to Python 3.12
            raise
        fail(program, f"{error}: a link leads to itself; name a file or folder")


@contextlib.contextmanager
def shown_before_kept() -> Iterator[Callable[[], None]]:
    """Prints results before they are written: who prints and who writes can fail, and neither loses the other's.

    What it gives raises the error of a stdout that went away, after the files are written.
    """
    lost: list[BaseException] = []

    def raise_lost() -> None:
        for error in lost:
            raise error

    try:
        yield raise_lost
    except (OSError, SystemExit) as error:  # rich ends the program at a closed pipe
        lost.append(error)


def stands_nowhere() -> bool:
    """Whether the current folder was removed, or replaced, under the process."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def fail(program: str, text: str) -> NoReturn:
    """Prints one line on stderr and exits with 1."""
    note(f"{program}: " + " ".join(text.split()))
    sys.exit(1)


def print_json(value: Any) -> None:
    """Any result as one JSON document; paths become text."""
    typer.echo(json.dumps(value, indent=2, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; the first column is text, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    if title:
        tell(title)
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(harmless, row))
    # a table whose cells are cut helps nobody; a narrow terminal breaks its lines
    Console(width=10_000, markup=False).print(table)


def print_accuracy(name: str, result: Any) -> None:
    """An `Evaluation`, a measure a line."""
    measured = result.accuracy
    rows = [
        ("faces", measured.faces),
        ("missed by the detector", result.missed),
        *([] if result.given_up is None else [("taken for no face", f"{result.given_up:.2%}")]),
        ("NME", f"{measured.nme:.2%}"),
        *([] if result.interval is None else [("its 95% interval", "{:.2%} to {:.2%}".format(*result.interval))]),
        ("NME median / p95", f"{measured.median:.2%} / {measured.p95:.2%}"),
        ("AUC at 8%", f"{measured.auc:.3f}"),
        ("failures over 8%", f"{measured.failures:.2%}"),
        ("SmoothL1 as the original", f"{measured.smooth_l1:.5f}"),
        *((f"NME {region}", f"{value:.2%}") for region, value in measured.regions.items()),
    ]
    print_table(name, ("measure", "value"), rows)


def print_folders(folders: Sequence[Any]) -> None:
    """`Folder`s, a line each."""
    if folders:
        rows = [
            (
                one.folder,
                one.faces,
                f"{one.nme:.2%}",
                "{:.2%} to {:.2%}".format(*ends) if (ends := one.nme_interval) else "",
            )
            for one in folders
        ]
        print_table("by folder", ("folder", "faces", "NME", "its 95% interval"), rows)


def print_groups(more: dict[str, Any]) -> None:
    """NME by size and turn, and how steady the model is where that was measured."""
    rows = [
        (
            group["by"],
            f"{group['low']:g} or more" if group["high"] is None else f"{group['low']:g} to {group['high']:g}",
            group["faces"],
            f"{group['nme']:.2%}",
        )
        for group in more["groups"]
    ]
    if rows:
        print_table("by face", ("property", "range", "faces", "NME"), rows)
    if steady := more.get("robustness"):
        rise = steady["jitter_nme"] - steady["nme"]
        changed = [
            ("boxes 10% off in place and size", f"NME {steady['jitter_nme']:.2%}, {rise * 100:+.2f} points"),
            *((f"photo enlarged {k} times", f"points move by {v:.2%}") for k, v in steady["enlarged"].items()),
            ("photo mirrored", f"points move by {steady['mirrored']:.2%}"),
        ]
        print_table(f"the same {steady['faces']} faces shown otherwise", ("how", "result"), changed)


def print_parity(reports: Sequence[Any]) -> None:
    """`Parity` reports of one set of faces, a file a line."""
    if not reports:
        return
    rows = [
        (
            p.file,
            p.faces,
            *(f"{v:.4f}" for v in (p.mean_px, p.p50_px, p.p99_px, p.max_px, p.nme)),
            "" if p.rise is None else f"{p.rise:+.4f}",
            "" if p.score is None else f"{p.score:.4f}",
            *(f"{v:.4f}" for v in p.regions_px.values()),
        )
        for p in reports
    ]
    regions = [f"{name} px" for name in reports[0].regions_px]
    title = f"distance to PyTorch on {reports[0].origin}"
    print_table(
        title, ("file", "faces", "mean px", "p50 px", "p99 px", "max px", "NME %", "rise", "score", *regions), rows
    )
    if any(p.rise is None for p in reports):
        tell("these faces have no labels: how far the accuracy itself moves was not measured, --data does that")


def _number_of(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def print_run(name: str, result: Any) -> None:
    """A `VideoRun`: what was done in a line, then the files."""
    dropped = f", {result.dropped} dropped to keep up" if result.dropped else ""
    speed = f"{result.frames / result.seconds:.1f} frames/s{dropped}"
    tracks = f"{_number_of(result.faces, 'track')}, detector on {_number_of(result.detector_runs, 'frame')}"
    stopped = ", stopped" if result.stopped else ""
    tell(f"{name}: {_number_of(result.frames, 'frame')}{stopped}, {speed}, {tracks}")
    for path in result.files:
        tell(path)


def _ms(time: Any) -> tuple[str, ...]:
    return tuple(f"{value:.2f}" for value in (time.p50_ms, time.p95_ms, time.p99_ms, time.max_ms))


def print_times(stages: dict[str, Any]) -> None:
    """`TimeSummary` of a photo by stage, a stage a line."""
    rows = [(stage, time.samples, *_ms(time)) for stage, time in stages.items()]
    print_table("stages of a photo", ("stage", "samples", "p50 ms", "p95", "p99", "max"), rows)


def _interval(time: Any) -> str:
    return f"{time.p50_low_ms:.2f} to {time.p50_high_ms:.2f}"


def _measured(time: Any) -> tuple[Any, ...]:
    p50, *rest = _ms(time)
    return time.samples, p50, _interval(time), *rest


def print_bench(result: Any) -> None:
    """A `Bench`: the machine, the network alone, the stages, the cold starts."""
    machine, setup = result.setup.machine, result.setup
    runs = f"onnxruntime {machine.versions.get('onnxruntime')}, {setup.faces} face(s) on {setup.photo}"
    tell(f"{machine.cpu}, {machine.cores} cores, {runs}")
    tail = ("samples", "p50 ms", "95% interval", "p95", "p99", "longest")
    rows = [(c.file, c.batch, *_measured(c.times.summary), f"{c.ms_a_face:.2f}") for c in result.network]
    print_table("network alone", ("file", "batch", *tail, "ms a face"), rows)
    stages = [*result.photo.stages.items(), ("whole", result.photo.whole)]
    rows = [(name, *_measured(times.summary)) for name, times in stages]
    print_table(f"stages of a photo with {result.photo.file}", ("stage", *tail), rows)
    rows = []
    for file in result.files:
        memory = ["" if mib is None else f"{mib:.0f}" for mib in (file.cold.peak_mib, file.cold.base_mib)]
        rows.append((file.file, file.backend, f"{file.cold.load_ms:.0f}", f"{file.cold.first_ms:.1f}", *memory))
    columns = ("file", "engine", "load ms", "first call ms", "peak MiB", "before the load")
    print_table("fresh processes", columns, rows)
    for name, reason in result.left_out.items():
        tell(f"left out: {name}: {reason}")


def print_comparison(comparison: Any) -> None:
    """A `Comparison`, a case a line, and what else has to be said; nothing for None."""
    if comparison is None:
        return
    rows = []
    for case in comparison.cases:
        interval = f"{case.ratio.low:.3f} to {case.ratio.high:.3f}"
        numbers = f"{case.old_ms:.2f}", f"{case.new_ms:.2f}", f"{case.ratio.value:.3f}", interval
        rows.append((case.case, *numbers, case.verdict))
    columns = ("case", "old p50 ms", "new p50 ms", "new / old", "95% interval", "the new one is")
    print_table("against the older results", columns, rows)
    lines = [*(f"no fair comparison: {text}" for text in comparison.obstacles), *comparison.alone, *comparison.notes]
    for line in lines:
        tell(line)


def print_tuning(result: Any) -> None:
    """A `Tuning`, a trial a line, what did not open, and what was chosen."""
    from kp_runtime.timing import FEW_TURNS

    machine, settings = result.machine, result.settings
    few = any(trial.times is not None and len(trial.times.turns_ms) < FEW_TURNS for trial in result.trials)
    tell(f"{machine.cpu}, {machine.cores_usable} cores, {settings.faces} face(s) on {result.photo}")
    rows = []
    is_one_name = len({Path(bundle).name for bundle in result.bundles}) == len(result.bundles)
    names = [trial.name if is_one_name else str(Path(trial.bundle) / trial.file) for trial in result.trials]
    for trial, name in zip(result.trials, names, strict=True):
        times = trial.best_known.summary
        p50, p95 = f"{times.p50_ms:.2f}", f"{times.p95_ms:.2f}"
        rise = "?" if trial.rise.points is None else f"{trial.rise.points:+.3f}"
        how = trial.backend, trial.threads or "", trial.feeding or ""
        interval = "" if few or trial.times is None else _interval(times)  # a first look has two turns alone
        rows.append((name, *how, rise, times.samples, p50, interval, p95, trial.verdict))
    columns = ("file", "engine", "threads", "fed", "NME rise", "samples", "p50 ms", "95% interval", "p95", "verdict")
    print_table("what was tried", columns, rows)
    for name, reason in result.left_out.items():
        tell(f"left out: {name}: {reason}")
    sources = {name: trial.rise.how for trial, name in zip(result.trials, names, strict=True)}
    for how in dict.fromkeys(sources.values()):
        of = [name for name in sources if sources[name] == how]
        tell(f"NME rise of {'all' if len(of) == len(sources) else ', '.join(of)}: {how}")
    if result.chosen is not None:
        tell(f"chosen: {result.trials[result.chosen]}")
    if (ratio := result.over_default) is not None:
        interval = "" if few else f" ({ratio.low:.2f} to {ratio.high:.2f})"
        tell(f"its time over that of what load() takes by itself: {ratio.value:.2f}{interval}")
    if few:
        tell(f"under {FEW_TURNS} turns, so a 95% interval would be too narrow; measure for longer (--seconds)")


def print_diagnosis(diagnosis: Any) -> None:
    """A `Diagnosis`, a finding a line with what to do, and the verdict."""
    width = max(len(finding.subject) for finding in diagnosis.findings)
    for finding in diagnosis.findings:
        advice = f" -> {finding.advice}" if finding.advice else ""
        tell(f"{finding.status:<7}  {finding.subject:<{width}}  {finding.found}{advice}")
    tell(f"works: {', '.join(diagnosis.working) or 'nothing'}" + ("" if diagnosis.healthy else "; see the problems"))


def print_bundle(bundle: Any, manifest: Any, states: dict[str, str]) -> None:
    """A bundle's files, each with `ok` or `BAD`, where its weights are from, its recorded accuracy and licences.

    Raises:
        BundleError: what the manifest says of training, accuracy or making is not as this project writes it.
    """
    try:
        rows, lines = _file_rows(manifest, states), _provenance(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{bundle}: the manifest can't be shown as text ({error!r:.200}); use --json") from error
    spec = manifest.spec
    if isinstance(manifest, DetectorManifest):
        what = (
            f"finds faces of {spec.least_px:g} to {spec.most_px:g} px, cells of {spec.stride} px, score {spec.score:g}"
        )
    else:
        what = f"{spec.points} points, {spec.size} px crops, margin {spec.margin:g}, boxes {spec.box}"
    tell(f"{spec.name}: {what}")
    print_table(str(bundle), ("file", "kind", "precision", "bytes", "sha256", "made from", "layers", "hash"), rows)
    for line in lines:
        tell(line)


def _file_rows(manifest: Any, states: dict[str, str]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, e in manifest.files.items():
        hashes = e.sha256[:12], (e.parent_sha256 or "")[:12]
        state = "ok" if states[name] == "ok" else "BAD"
        rows.append((name, e.kind, e.precision or "", f"{e.bytes:,}", *hashes, _layers(e.made), state))
    return rows


def _provenance(manifest: Any) -> list[str]:
    lines, training = [], manifest.training
    for source in training.get("sources", []):
        all_of_it = ", of which nobody is held out" if source.get("whole") else ""
        count, name, sha256 = (source.get(key) for key in ("trained_on", "name", "sha256"))
        lines.append(f"trained on {count} faces of {name} ({sha256}){all_of_it}")
    if training:
        epoch = "".join(
            f", {kept} epoch {training[f'{kept}_epoch']}" for kept in ("best", "last") if f"{kept}_epoch" in training
        )
        lines.append(f"trained by revision {training.get('git_revision')}{epoch}")
    if (first := _first_weights(training)) not in (None, "none"):
        lines.append(f"began, or what it came from did, at the weights {first}; their terms are not told here")
    if isinstance(mean := training.get("mean_of"), list):
        lines.append(f"mean of the weights of {len(mean)} runs ({', '.join(str(r.get('sha256'))[:12] for r in mean)})")
    if isinstance(refit := training.get("refit"), dict):
        line = f"last layer solved anew on {refit.get('faces')} faces, strength {refit.get('strength')}"
        if isinstance(boxes := refit.get("boxes"), dict):
            line += ", boxes " + ", ".join(f"{kind}={weight}" for kind, weight in boxes.items())
        lines.append(line + (f", detector {refit['detector']}" if "detector" in refit else ""))
    if isinstance(score := training.get("lost_score"), dict):
        told = [f"{score[key]:.2%}" if isinstance(score.get(key), float) else "?" for key in ("given_up", "missed")]
        lines.append(f"lost score: {told[0]} of held-out views of a face given up, {told[1]} of others taken for one")
    names = {entry.sha256: f" ({name})" for name, entry in manifest.files.items()}
    for data, measured in manifest.accuracy.items():
        if {"nme", "failures", "faces"} <= set(measured):
            numbers = f"NME {measured['nme']:.2%}, failures {measured['failures']:.1%}, {measured['faces']} faces"
            lines.append(f"{data}{names.get(measured.get('sha256'), '')}: {numbers}")
    for name, entry in manifest.files.items():
        if entry.kind == "plan" and isinstance(error := entry.made.get("golden_error_px"), float):
            gpu = entry.made.get("gpu")
            lines.append(f"{name}: golden keypoints {error:.3f} px from PyTorch's where it was built ({gpu})")
    told = [f"licence of the {what}: {text}" for what, text in manifest.licence.items()]
    return lines + (told or ["licence: none is told; kp train and kp train-detector --licence tell one"])


def _first_weights(training: dict[str, Any]) -> str | None:
    """The weights of another network at which the oldest run of a model began, by its record."""
    if not isinstance(start := training.get("start"), dict):
        return None
    oldest = (start.get("before") or [start.get("training")])[-1]
    return _first_weights(oldest) if isinstance(oldest, dict) else start.get("weights")


def _layers(made: dict[str, Any]) -> str:
    """In which types a file computes: layers of an ONNX file, shares of a plan's compute."""
    shares = (made.get("receipt") or {}).get("compute_shares") or {}
    counts = [f"{count} {kind}" for kind, count in (made.get("layers") or {}).items()]
    return ", ".join(counts + [f"{share:.0%} {kind}" for kind, share in shares.items()])
