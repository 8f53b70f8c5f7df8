"""What tells about the machine: `kp bench`, `kp tune`, `kp doctor`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import typer

from kp_cli.options import (
    CHECKOUT_DETECTOR,
    ELSE_DEFAULT,
    Cores,
    Detector,
    Json,
    Threads,
    bundle_or_default,
    check_file,
    folder_or_default,
    open_detector,
)
from kp_cli.report import (
    note,
    print_bench,
    print_comparison,
    print_diagnosis,
    print_json,
    print_tuning,
    share_progress,
    shown_before_kept,
    tell,
    tell_subject,
)
from kp_runtime.errors import InputError, KpError


def bench(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; " + ELSE_DEFAULT)] = None,
    photo: Annotated[
        Path | None, typer.Option(help="A photo with a face; scikit-image's astronaut when left out.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch size of the network alone. Repeatable; 1 and 8 when left out.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="Only files of this precision. Repeatable; all files when left out.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(help="tensorrt, ort-tensorrt, ort-cuda or ort-cpu; auto takes each file's best that works here."),
    ] = "auto",
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Least time that each case is measured; 3 when left out.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Least number of samples of each case; 200 when left out.")
    ] = None,
    threads: Threads = None,
    cores: Cores = None,
    detector: Detector = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the results, with every sample, to this JSON file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots and all numbers to this file.")] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="OLD", help="Older results (--out): say what is faster or slower since.")
    ] = None,
    new: Annotated[
        Path | None, typer.Option("--with", metavar="NEW", help="Compare with these results; measure nothing.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--compare-anyway", help="Compare different machines or settings too, and say what differs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a bundle's files and each stage, to be believed.

    The network alone by file and batch size, and the whole way from a photo's file to its keypoints. All
    cases run in turns; each has a median with a 95% interval, p95, p99 and the longest, and no sample is
    dropped. It takes minutes on a small board: --samples 50 and --precision make it shorter. docs/bench.md
    explains the numbers.

    Example: kp bench out/resnet18-68 --compare old.json --html bench.html
    """
    from kp_runtime.bench import run_bench
    from kp_runtime.bench_compare import check_alike, compared
    from kp_runtime.bench_page import bench_page
    from kp_runtime.bench_results import BenchSettings, json_from_bench, results_from_file, write_results

    if compare is None and (new or anyway):
        raise InputError("--with and --compare-anyway go with --compare OLD")
    given = (bundle, photo, batch, precision, seconds, samples, threads, cores, out)
    if new and (detector != "auto" or backend != "auto" or any(value is not None for value in given)):
        raise InputError("--with measures nothing: it goes with --compare, --compare-anyway, --html and --json alone")
    check_file(out)
    check_file(html)
    if html and os.path.realpath(html) in {os.path.realpath(path) for path in (out, compare, new) if path}:
        raise InputError(f"--html would replace the results in {html}; name another file")
    old = results_from_file(compare) if compare else None
    if new:
        result = results_from_file(new)
    else:
        settings = BenchSettings(
            tuple(batch or BenchSettings.batches),
            BenchSettings.seconds if seconds is None else seconds,
            BenchSettings.samples if samples is None else samples,
            threads,
            tuple(precision or ()),
            cores,
            backend,
        )
        with share_progress() as step:
            face = photo or _astronaut()
            result = run_bench(
                bundle or folder_or_default(None),
                face,
                open_detector(detector, threads=threads),
                settings,
                admit=lambda setup: check_alike(old.setup, setup) if old and not anyway else None,
                step=step,
            )
    comparison = compared(old, result, anyway=anyway) if old else None
    with shown_before_kept() as raise_lost:
        if as_json:
            print_json(json_from_bench(result) | ({"comparison": dataclasses.asdict(comparison)} if comparison else {}))
        else:
            print_bench(result)
            print_comparison(comparison)
    written = [] if out is None else [write_results(result, out)]
    written += [] if html is None else [bench_page(result, html, comparison)]
    raise_lost()
    for path in written if not as_json else ():
        tell(path)


def tune(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; " + ELSE_DEFAULT)] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Most that 95 of 100 calls may take: 5ms, 800us, 0.02s.")
    ] = None,
    faces: Annotated[int, typer.Option(help="Faces in a call.")] = 1,
    max_rise: Annotated[
        float, typer.Option("--max-nme-rise", help="Most percentage points of NME over the bundle's fp32.")
    ] = 0.1,
    also: Annotated[
        list[Path] | None,
        typer.Option(help="A smaller model's bundle to try too. Repeatable; BUNDLE-lite beside it when left out."),
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Try no other bundle.")] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="Labelled faces to measure the NME on, instead of what the bundles record. Repeatable."
        ),
    ] = None,
    unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="Take files too of which nobody knows how far the NME rises.")
    ] = False,
    photo: Annotated[
        Path | None, typer.Option(help="A photo of your kind and size; scikit-image's astronaut when left out.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Engine to try. Repeatable; tensorrt, ort-cuda and ort-cpu when left out."),
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="Precision to try. Repeatable; all files when left out.")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="Threads to try. Repeatable; 1, 2, 4 and so on when left out.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Least time that each of the best is measured.")] = 3.0,
    samples: Annotated[int, typer.Option(min=1, help="Least number of samples of each of them.")] = 200,
    detector: Detector = "auto",
    out: Annotated[Path, typer.Option(help="File for the settings; NAME.tried.json beside it has the table.")] = Path(
        "tuned.json"
    ),
    as_json: Json = False,
) -> None:
    """Find the fastest way to run a model on this machine.

    One that keeps its accuracy. Tries engines, precisions, threads, ways to feed a batch, and the lite model; writes
    the settings, which kp predict --tuned and load(tuned=...) take, and the table of what was tried. Exit status 1
    where nothing fits the budget. docs/tune.md explains it.

    Example: kp tune out/resnet18-68 --budget 5ms --data faces.csv
    """
    from kp_runtime.backend_by_name import AUTO
    from kp_runtime.bench_results import json_from_bench
    from kp_runtime.tune import beside, run_tune
    from kp_runtime.tune_results import (
        TuneSettings,
        Tuning,
        check_chosen,
        milliseconds_from_text,
        write_tuning,
    )

    if also and alone:
        raise InputError("--alone tries no other bundle: leave out --also")
    check_file(out)
    settings = TuneSettings(
        None if budget is None else milliseconds_from_text(budget), faces, max_rise, unknown, tuple(backend or AUTO),
        tuple(precision or ()), tuple(threads or ()), seconds, samples,
    )  # fmt: skip
    first = bundle or folder_or_default(None)
    lite = None if also or alone else beside(first)
    if lite is not None:
        note(f"{lite} lies beside it and is tried too; --alone leaves it out")
    rise_of = None
    if data:
        from kp_export.evaluate import measured_rise
        from kp_runtime.manifest import Manifest
        from kp_train.data import parse_source

        points = Manifest.read(first).spec.points
        rise_of = measured_rise(first, [parse_source(text, points) for text in data])
    with share_progress() as step:
        bundles = [first, *(also or []), *([lite] if lite else [])]
        result: Tuning = run_tune(
            bundles, photo or _astronaut(), open_detector(detector), settings, rise_of=rise_of, step=step
        )
    with shown_before_kept() as raise_lost:
        if as_json:
            print_json(json_from_bench(result))
        else:
            print_tuning(result)
    written = write_tuning(result, out)
    raise_lost()
    for path in written if not as_json else ():
        tell(path)
    check_chosen(result)


def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle, to run its golden crop; the default model's when left out.")
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            min=1.0, max=86400.0, help="Seconds that each backend has; a first start of TensorRT takes minutes."
        ),
    ] = 300.0,
    as_json: Json = False,
) -> None:
    """Say what works on this machine, and what to do.

    GPU, driver, packages that do not fit each other, and one real inference on each backend that claims to
    work. Each is tried in a process of its own: one that crashes or hangs is a line of the report.

    Exit status 0 where at least one backend works and there is no problem; warnings do not count. Else 1.

    Example: kp doctor out/resnet18-68
    """
    from kp_runtime.doctor import diagnose

    found, reason = None, ""
    try:
        found = bundle_or_default(bundle)
    except KpError as error:  # a line of the report
        reason = str(error)
    diagnosis = diagnose(found, reason, detector=CHECKOUT_DETECTOR, backend_seconds=timeout, step=tell_subject)
    if as_json:
        print_json(dataclasses.asdict(diagnosis) | {"healthy": diagnosis.healthy})
    else:
        print_diagnosis(diagnosis)
    if not diagnosis.healthy:
        raise typer.Exit(1)


def _astronaut() -> Path:
    from kp_runtime.errors import BackendError

    try:
        import skimage
    except ImportError as error:
        raise BackendError(
            "no --photo was given, and scikit-image, whose portrait of an astronaut is taken then, is not installed; "
            "give a photo with a face: --photo photo.jpg"
        ) from error
    return Path(skimage.__file__).parent / "data" / "astronaut.png"
