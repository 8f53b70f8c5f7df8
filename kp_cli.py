"""The `kp` command: a function a subcommand; everything heavy is imported inside it."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ImportError:
    sys.exit("kp: the command needs typer and rich, which are not installed; run: pip install 'kp-edge[cli]'")

from kp_report import (
    build_progress,
    frames_progress,
    print_accuracy,
    print_bench,
    print_bundle,
    print_comparison,
    print_diagnosis,
    print_groups,
    print_json,
    print_parity,
    print_run,
    print_times,
    progress,
    share_progress,
    tell_subject,
)
from kp_runtime.errors import InputError, KpError


def _stay_on(context: typer.Context, cores: str | None) -> str | None:
    """Keeps this thread, and what it starts, on the cores until the command is over; their numbers in order."""
    if cores is None:
        return None
    from kp_runtime.cores import cores_from_text, on_cores

    chosen = cores_from_text(cores)
    context.with_resource(on_cores(chosen))
    return ",".join(map(str, sorted(chosen)))


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # rich takes half as long to import as a short command takes to run
    help="68 facial keypoints, from PyTorch to the edge, provably unchanged.",
)

DEFAULT_BUNDLE = Path("engines/resnet18-68")
ELSE_DEFAULT = "the default model when left out: KP_MODEL, the model wheel, the checkout's own."
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the engine; its own choice (all cores) when left out.")]
Cores = Annotated[str | None, typer.Option(
    metavar="LIST", callback=_stay_on, help="Cores that the command runs on, such as 0,2-3 (Linux); all when left out."
)]  # fmt: skip
PublicKey = Annotated[Path | None, typer.Option(help="Refuse a bundle that this PEM file's key did not sign.")]
Looks = Annotated[
    int, typer.Option(help="Times that a face is looked at, each time in the box of the points found before.")
]
EFFECT_NAMES = "sunglasses, hat, moustache, mesh, blur, or a .toml file of your own (docs/filters.md)."
Yunet = Annotated[Path | None, typer.Option(help="A YuNet model file, to detect faces with it instead of Haar.")]
Data = Annotated[list[str], typer.Option(
    "--data", metavar="PATH[=WEIGHT]",
    help="A CSV of 68 points beside its photos, or a folder of photos with .pts files. Repeatable.",
)]  # fmt: skip


class Recipe(str, enum.Enum):
    """Recipes of `kp train`."""

    default = "default"
    seed = "seed"


class Boxes(str, enum.Enum):
    """Where `kp eval` takes face boxes from."""

    keypoints = "keypoints"
    detector = "detector"


class Engine(str, enum.Enum):
    """Whether `kp export` builds TensorRT plans."""

    auto = "auto"
    required = "required"
    never = "never"


class Split(str, enum.Enum):
    """Which faces `kp eval` measures."""

    rows = "rows"
    person = "person"


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run; the checkpoint's bundle in the end.")],
    recipe: Annotated[
        Recipe, typer.Option(help="default: face crops, ours. seed: the original project's.")
    ] = Recipe.default,
    name: Annotated[str, typer.Option(help="The model's name.")] = "resnet18-68",
    size: Annotated[int | None, typer.Option(help="Side of the crops in pixels.")] = None,
    reduce: Annotated[int | None, typer.Option(help="The backbone sees means of this many pixels square.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Most epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Faces a step, on each device.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, the schedule's peak.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of the weight averaging; 0 turns it off.")] = None,
    augment: Annotated[str | None, typer.Option(help="faces, light, crop or none.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of weights, order and augmentation.")] = None,
    precision: Annotated[str | None, typer.Option(help="32-true, bf16-mixed or 16-mixed.")] = None,
    weights: Annotated[str, typer.Option(help="auto, imagenet, none, or a torchvision ResNet-18 .pth file.")] = "auto",
    init: Annotated[Path | None, typer.Option(help="Start from this checkpoint instead.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    devices: Annotated[str, typer.Option(help="Number of devices, or auto.")] = "auto",
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    strategy: Annotated[str, typer.Option(help="Lightning's strategy, such as ddp.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that make crops, for each device.")] = 1,
    picture_every: Annotated[int, typer.Option(min=1, help="Epochs between two pictures of held-out faces.")] = 5,
) -> None:
    """Train on photos with 68 points; go on after a kill.

    Example: kp train --data training_frames_keypoints.csv --data photos_68=1.5 --out runs/first
    """
    _quiet_training()
    from kp_train.config import recipe as settings
    from kp_train.data import parse_source
    from kp_train.train import train as run

    config = settings(
        recipe.value,
        size=size,
        reduce=reduce,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        ema=ema,
        augment=augment,
        seed=seed,
        precision=precision,
    )
    path = run(
        [parse_source(text) for text in data], config, out, name=name, weights=weights, init=init, resume=resume,
        devices=devices, accelerator=accelerator, strategy=strategy, workers=workers, picture_every=picture_every,
        progress=sys.stdout.isatty(),
    )  # fmt: skip
    typer.echo(f"checkpoint: {path}\ncurves: tensorboard --logdir {out}\nnext: kp export {out} --fp16")


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A checkpoint, a bundle's folder, or an ONNX file in a bundle.")],
    data: Data,
    boxes: Annotated[
        Boxes, typer.Option(help="Boxes from the true keypoints, or from a face detector.")
    ] = Boxes.keypoints,
    split: Annotated[Split, typer.Option(help="All rows, or only people that were never trained on.")] = Split.rows,
    out: Annotated[Path | None, typer.Option(help="Folder for the error curve and the worst faces.")] = None,
    steady: Annotated[
        bool,
        typer.Option("--robustness", help="Also shake the boxes, enlarge and mirror the photos: 13 times the work."),
    ] = False,
    looks: Looks = 1,
    record: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also keep the result in the bundle's manifest under this name.")
    ] = None,
    yunet: Yunet = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure a model on labelled faces: NME, AUC, failure rate.

    Also by region, face size and turn of the head, and the original project's loss; --out adds the error
    curve and the worst faces.
    """
    from kp_export.evaluate import evaluate as measure
    from kp_export.evaluate import held_out_faces, open_model
    from kp_export.robustness import groups, robustness
    from kp_runtime.spec import Manifest
    from kp_train.data import parse_source

    if yunet and boxes is not Boxes.detector:
        raise InputError("--yunet goes with --boxes detector")
    if steady and boxes is Boxes.detector:
        raise InputError("--robustness shakes the boxes of the keypoints: leave out --boxes detector")
    opened = open_model(model, threads)
    if (steady or boxes is Boxes.detector) and opened.manifest.spec.box == "frame":
        raise InputError("this model sees whole frames, not face boxes: leave out --boxes detector and --robustness")
    sources = [parse_source(text) for text in data]
    if split is Split.person:
        sources = [held_out_faces(source, opened.manifest) for source in sources]
    faces = [face for source in sources for face in source.faces]
    detector = _detector(yunet) if boxes is Boxes.detector else None
    result = measure(opened, faces, detector, track=progress("measuring"), looks=looks)
    more: dict[str, Any] = {"groups": [dataclasses.asdict(group) for group in groups(result)]}
    if steady:
        more["robustness"] = dataclasses.asdict(robustness(opened, result.faces, progress("showing otherwise"), looks))
    if record is not None:
        kept = {record: dataclasses.asdict(result.accuracy) | {"missed": result.missed, "looks": looks} | more}
        bundle = model if model.is_dir() else model.parent
        manifest = Manifest.read(bundle)  # anew: an export may have been at work meanwhile
        with _signature_told(bundle):
            dataclasses.replace(manifest, accuracy=manifest.accuracy | kept).write(bundle)
    pictures = []
    if out is not None:
        from kp_export.pictures import error_curve, worst_faces

        pictures = [error_curve(result, opened.name, out / "error_curve.png"), worst_faces(result, out / "worst.png")]
    if as_json:
        rest = {
            "model": opened.name,
            "boxes": boxes.value,
            "split": split.value,
            "missed": result.missed,
            "looks": looks,
        }
        print_json(rest | dataclasses.asdict(result.accuracy) | more | {"pictures": [str(p) for p in pictures]})
        return
    print_accuracy(opened.name, result)
    print_groups(more)
    for picture in pictures:
        typer.echo(picture)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A bundle's folder or its checkpoint.safetensors.")],
    fp16: Annotated[bool, typer.Option("--fp16", help="Also write a typed fp16 graph.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Also write int8 graphs, for the CPU and for TensorRT.")] = False,
    calibration: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Labelled faces that set the ranges of int8. Repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The bundle to fill; the checkpoint's own when left out.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Your labelled faces for the parity check; scikit-image's when left out."),
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="Build TensorRT plans too: if possible, or fail, or not.")
    ] = Engine.auto,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to ONNX, with proof of parity.

    A file that does not predict what PyTorch does fails the export and changes nothing. Where TensorRT is
    installed, plans are built too.
    """
    from kp_export.plan_from_onnx import plan_blocker
    from kp_runtime.errors import ExportError

    blocker = None if engine is Engine.never else plan_blocker()
    if engine is Engine.required and blocker:
        raise ExportError(f"no plan can be built here: {blocker}")
    from kp_export.bundle import export_bundle
    from kp_train.data import parse_source

    own = checkpoint if checkpoint.is_dir() else checkpoint.parent
    with _signature_told(out or own, own):
        report = export_bundle(
            checkpoint,
            out,
            precisions=("fp32", *(["fp16"] * fp16), *(["int8", "int8-trt"] * int8)),
            sources=[parse_source(text) for text in data or []],
            calibration=[parse_source(text) for text in calibration or []],
            step=_note,
        )
    if not as_json:
        print_parity(report.parity)
        typer.echo(f"bundle: {report.bundle}")
    plans = []
    if engine is not Engine.never and not blocker:
        from kp_export.plan_bundle import add_plan

        wanted = [*(["fp16"] * fp16), *(["int8"] * int8)] or ["fp32"]
        plans = [add_plan(report.bundle, precision, progress=build_progress()) for precision in wanted]
    if as_json:
        rows = [dataclasses.asdict(p) for p in report.parity]
        print_json({"bundle": report.bundle, "parity": rows, "plans": [dataclasses.asdict(p) for p in plans]})
    else:
        for plan in plans:
            typer.echo(f"plan: {plan.file}")
    if blocker:
        _note(f"no TensorRT plan was built: {blocker}")


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")] = DEFAULT_BUNDLE,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Your own labelled faces; scikit-image's when left out. Repeatable."),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A model file of the bundle; all of them when left out. Repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a page with the numbers and the worst faces.")] = None,
    as_json: Json = False,
) -> None:
    """Compare a bundle's files with PyTorch on your faces.

    Exit status 1 where a file is over its limits.
    """
    from kp_export.parity import bundled_faces, faces_from_sources
    from kp_export.verify import check_verification, verification_json, verify_bundle
    from kp_export.verify_page import verification_page
    from kp_runtime.signing import signature_state
    from kp_runtime.spec import Manifest
    from kp_train.data import parse_source

    spec, signature = Manifest.read(bundle).spec, signature_state(bundle)
    sources = [parse_source(text) for text in data or []]
    faces = faces_from_sources(sources, spec) if sources else bundled_faces(spec)
    result = verify_bundle(bundle, faces, files=file or (), track=progress("comparing"))
    page = None if out is None else verification_page(result, out / "verify.html")
    if as_json:
        print_json(verification_json(result) | {"page": page, "signature": signature})
    else:
        print_parity([f.parity for f in result.files if f.parity])
        for verdict in result.files:
            typer.echo(f"{verdict.file}: {verdict.verdict}" + (f", {verdict.reason}" if verdict.reason else ""))
        typer.echo(f"signature: {signature}")
        if page is not None:
            typer.echo(page)
    check_verification(result)


@app.command()
def plan(
    bundle: Annotated[Path, typer.Argument(help="A bundle with ONNX files.")] = DEFAULT_BUNDLE,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8: the ONNX file that is built.")] = "fp16",
    min_batch: Annotated[int, typer.Option(help="Fewest faces a call.")] = 1,
    opt_batch: Annotated[int, typer.Option(help="The batch size that kernels are chosen for.")] = 8,
    max_batch: Annotated[int, typer.Option(help="Most faces a call.")] = 32,
    workspace_mib: Annotated[int, typer.Option(help="Most scratch memory that a kernel may take.")] = 1024,
    version_compatible: Annotated[bool, typer.Option("--version-compatible", help="For later TensorRTs too.")] = False,
    hardware_compatible: Annotated[bool, typer.Option("--hardware-compatible", help="For other GPUs too.")] = False,
    dla_core: Annotated[int | None, typer.Option(help="Build for this DLA core; one batch size alone.")] = None,
    as_json: Json = False,
) -> None:
    """Build a TensorRT plan on the device that will run it."""
    from kp_export.plan_bundle import add_plan
    from kp_export.plan_from_onnx import PlanOptions

    options = PlanOptions(
        min_batch, opt_batch, max_batch, workspace_mib, version_compatible, hardware_compatible, dla_core
    )
    with _signature_told(bundle):
        report = add_plan(bundle, precision, options, progress=build_progress())
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    typer.echo(f"{bundle / report.file}: {report.gpu}, TensorRT {report.tensorrt}, {report.seconds:g} s")
    typer.echo(report.receipt)


@app.command()
def pack(
    bundle: Annotated[Path, typer.Argument(help="A bundle with models.")],
    out: Annotated[Path, typer.Option(help="The bundle to write; may be the same folder.")],
    precision: Annotated[list[str], typer.Option(help="fp32, fp16, int8 or int8-trt. Repeatable.")],
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="Keep the checkpoint too.")] = False,
) -> None:
    """Copy a bundle with only the models that a device runs.

    Example: kp pack out/resnet18-68 --precision int8 --out board/resnet18-68
    """
    from kp_export.pack import pack_bundle

    with _signature_told(out, bundle):
        manifest = pack_bundle(bundle, out, precision, checkpoint=checkpoint)
    size = sum(entry.bytes for entry in manifest.files.values())
    typer.echo(f"{out}: {', '.join(manifest.files)}, {size / 1e6:.1f} MB")


@app.command()
def predict(
    photos: Annotated[list[Path], typer.Argument(help="Photos, or folders of them.")],
    model: Annotated[Path | None, typer.Option(help="A bundle, or an ONNX file in one; " + ELSE_DEFAULT)] = None,
    out: Annotated[Path, typer.Option(help="Folder for the drawn photos and the results.")] = Path("out"),
    drawn: Annotated[Path | None, typer.Option(help="File for the drawn photo, when there is one photo.")] = None,
    box: Annotated[
        list[str] | None, typer.Option(metavar="X0,Y0,X1,Y1", help="A face box, instead of detecting. Repeatable.")
    ] = None,
    looks: Looks = 1,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="json, csv, pts, coco, parquet. Repeatable; json when left out."),
    ] = None,
    yunet: Yunet = None,
    backend: Annotated[
        str, typer.Option(help="tensorrt, ort-tensorrt, ort-cuda or ort-cpu, and nothing else; auto takes the best.")
    ] = "auto",
    threads: Threads = None,
    cores: Cores = None,
    public_key: PublicKey = None,
    times: Annotated[bool, typer.Option("--times", help="Print how long each stage took.")] = False,
    as_json: Json = False,
) -> None:
    """Find the keypoints of all faces on photos.

    Draws them and writes them down. Example: kp predict photo.jpg --format json --format pts
    """
    import numpy as np

    from kp_runtime.photos import check_formats, photos_from_paths, predict_photo, results_json, write_results
    from kp_runtime.pipeline import load
    from kp_runtime.timing import StageTimer

    check_formats(formats or [])
    paths = photos_from_paths(photos)
    if len(paths) > 1 and (box or drawn):
        raise InputError(f"--box and --drawn go with one photo, got {len(paths)}")
    targets = [drawn or out / f"{path.stem}_keypoints.jpg" for path in paths]
    if len(set(targets)) < len(targets):
        raise InputError("two of the photos have the same name; predict them in two runs with their own --out")
    boxes = np.array([_parse_box(text) for text in box]) if box else None
    opened, timer = load(_bundle(model), backend, threads, public_key=public_key), StageTimer()
    detector = None if boxes is not None else _detector(yunet)
    results, failed = [], []
    for path, target in progress("predicting")(list(zip(paths, targets, strict=True))):
        try:
            results.append(
                predict_photo(opened, path, detector=detector, boxes_xyxy=boxes, drawn=target, timer=timer, looks=looks)
            )
        except KpError as error:
            failed.append(str(error))
    written = write_results(results, out, formats or ["json"]) if results else []
    if as_json:
        print_json(results_json(results))
    else:
        for photo in results:
            typer.echo(f"{photo.path}: {len(photo.keypoints)} face{'s' * (len(photo.keypoints) != 1)}")
        if times:
            print_times("stages of a photo", timer.summaries())
        for file in [*written, *(p.drawn for p in results if p.drawn)][-8:]:
            typer.echo(file)
    if failed:
        raise KpError(f"{len(failed)} of {len(paths)} photos failed: " + "; ".join(failed))


@app.command("filter")
def put_effect(
    photos: Annotated[list[Path], typer.Argument(help="Photos, or folders of them.")],
    effect: Annotated[str, typer.Option(metavar="NAME", help=EFFECT_NAMES)],
    out: Annotated[Path, typer.Option(help="Folder for the new pictures.")] = Path("out"),
    model: Annotated[Path | None, typer.Option(help="A bundle, or an ONNX file in one; " + ELSE_DEFAULT)] = None,
    looks: Looks = 1,
    yunet: Yunet = None,
    threads: Threads = None,
    public_key: PublicKey = None,
    as_json: Json = False,
) -> None:
    """Put sunglasses, a hat, a moustache or a mask on all faces of photos, or hide the faces.

    Writes copies; the photos stay. Example: kp filter photo.jpg --effect sunglasses
    """
    from kp_runtime.effects import open_effect
    from kp_runtime.photos import photos_from_paths, predict_photo
    from kp_runtime.pipeline import load

    put = open_effect(effect)
    paths = photos_from_paths(photos)
    targets = [out / f"{path.stem}_{Path(effect).stem}.jpg" for path in paths]
    if len(set(targets)) < len(targets):
        raise InputError("two of the photos have the same name; run kp filter twice with their own --out")
    opened, detector = load(_bundle(model), threads=threads, public_key=public_key), _detector(yunet)
    results, failed = [], []
    for path, target in progress("drawing")(list(zip(paths, targets, strict=True))):
        try:
            results.append(predict_photo(opened, path, detector=detector, drawn=target, draw=put, looks=looks))
        except KpError as error:
            failed.append(str(error))
    if as_json:
        print_json([{"image": p.path, "faces": len(p.keypoints), "drawn": p.drawn} for p in results])
    for photo in results:
        if not as_json:
            typer.echo(f"{photo.path}: {len(photo.keypoints)} face{'s' * (len(photo.keypoints) != 1)}: {photo.drawn}")
        if not len(photo.keypoints):
            _note(f"{photo.path}: no face was found, so {photo.drawn} shows the photo as it is")
    if failed:
        raise KpError(f"{len(failed)} of {len(paths)} photos failed: " + "; ".join(failed))


@app.command()
def run(
    source: Annotated[
        str,
        typer.Argument(help="A video, a folder of frames, a camera's index, rtsp://…, or a GStreamer pipeline."),
    ],
    model: Annotated[Path | None, typer.Option(help="A bundle, or an ONNX file in one; " + ELSE_DEFAULT)] = None,
    out: Annotated[Path, typer.Option(help="Folder for the annotated video and the results.")] = Path("out"),
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="mp4, avi, jsonl, parquet. Repeatable; mp4 and jsonl when left out."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Show the frames in a window; with no --format, only that.")
    ] = False,
    effect: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead of points and boxes: " + EFFECT_NAMES)
    ] = None,
    smooth: Annotated[
        bool, typer.Option("--smooth/--no-smooth", help="Steady the points (One-Euro); not for measurements.")
    ] = True,
    detect_every: Annotated[int, typer.Option(min=1, help="Frames between two looks for new faces.")] = 30,
    rate: Annotated[
        float | None, typer.Option("--fps", help="Frames a second of the source; what it says when left out.")
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0.0, help="Seconds that a camera or stream which went away is opened anew.")
    ] = 60.0,
    smallest: Annotated[
        float, typer.Option(min=0.02, max=1.0, help="Haar's smallest face, as a share of the frame's shorter side.")
    ] = 0.1,
    yunet: Yunet = None,
    threads: Threads = None,
    public_key: PublicKey = None,
    as_json: Json = False,
) -> None:
    """Follow the faces of a video, a camera or a stream.

    Writes an annotated video and a row a face and frame. Ctrl-C ends it; what was written stays whole.
    Example: kp run talk.mp4 --format mp4 --format parquet
    """
    stop = threading.Event()
    _quiet_video()
    from kp_runtime.effects import open_effect
    from kp_runtime.pipeline import load
    from kp_runtime.track import Tracker, TrackerSettings
    from kp_runtime.video import Window, draw_effect, draw_tracks, run_video
    from kp_runtime.video_sink import open_sinks
    from kp_runtime.video_source import open_source

    wanted = formats or ([] if show else ["mp4", "jsonl"])
    if effect and not show and not {"mp4", "avi"} & set(wanted):
        raise InputError("--effect goes with --format mp4, --format avi or --show")
    draw = draw_effect(open_effect(effect)) if effect else draw_tracks
    opened = load(_bundle(model), threads=threads, public_key=public_key)
    if opened.spec.box == "frame":
        raise InputError("this model sees whole frames, not face boxes; kp run needs one that follows faces")
    tracker = Tracker(opened, _detector(yunet, smallest), TrackerSettings(detect_every=detect_every, smooth=smooth))
    frames = open_source(source, rate=rate, patience=patience, stop=stop, say=_note)
    window = Window(source) if show else None
    sinks = open_sinks(wanted, out, frames.stem, rate=frames.rate, size_hw=frames.size_hw, live=frames.live)
    with _stopped_by_signals(stop), frames_progress(frames.name, frames.count) as step:
        result = run_video(frames, tracker, sinks, draw=draw, window=window, stop=stop, step=step)
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        print_run(frames.name, result)
    if result.stopped and not frames.live:
        raise typer.Exit(130)  # as a shell reports Ctrl-C; a camera has no other end


@app.command()
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
    seconds: Annotated[float, typer.Option(min=0.0, help="Least time that each case is measured.")] = 3.0,
    samples: Annotated[int, typer.Option(min=1, help="Least number of samples of each case.")] = 200,
    threads: Threads = None,
    cores: Cores = None,
    yunet: Yunet = None,
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

    Example: kp bench out/resnet18-68 --batch 1 --batch 8 --out new.json --compare old.json --html bench.html
    """
    from kp_runtime.bench import run_bench
    from kp_runtime.bench_compare import compared, gate
    from kp_runtime.bench_page import bench_page
    from kp_runtime.bench_results import BenchSettings, json_from_bench, results_from_file, write_results

    if compare is None and (new or anyway):
        raise InputError("--with and --compare-anyway go with --compare OLD")
    if new and any((photo, batch, precision, threads, cores, yunet, out, backend != "auto")):
        raise InputError("--with measures nothing: it goes with --compare, --compare-anyway, --html and --json alone")
    old = results_from_file(compare) if compare else None
    if new:
        result = results_from_file(new)
    else:
        settings = BenchSettings(
            tuple(batch or (1, 8)), seconds, samples, threads, tuple(precision or ()), cores, backend
        )
        with share_progress() as step:
            admit = gate(old, anyway)
            face = photo or _astronaut()
            result = run_bench(_bundle(bundle), face, _detector(yunet), settings, admit=admit, step=step)
    comparison = compared(old, result, anyway=anyway) if old else None
    written = [] if out is None else [write_results(result, out)]
    written += [] if html is None else [bench_page(result, html, comparison)]
    if as_json:
        print_json(json_from_bench(result) | ({"comparison": dataclasses.asdict(comparison)} if comparison else {}))
        return
    print_bench(result)
    print_comparison(comparison)
    for path in written:
        typer.echo(path)


@app.command()
def inspect(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle's folder; " + ELSE_DEFAULT)] = None,
    public_key: PublicKey = None,
    as_json: Json = False,
) -> None:
    """Show what a bundle holds, whether its hashes hold and whether it is signed.

    Exit status 1 where a hash does not hold, or --public-key is not the signer's.
    """
    from kp_runtime.errors import BundleError
    from kp_runtime.signing import signature_state
    from kp_runtime.spec import Manifest

    folder = _bundle(bundle)
    manifest = Manifest.read(folder, public_key)
    signature = "of the key that was given" if public_key else signature_state(folder)
    states: dict[str, str] = {}
    for name in manifest.files:
        try:
            manifest.check_file(folder, name)
            states[name] = "ok"
        except BundleError as error:
            states[name] = str(error)
    if as_json:
        print_json({"manifest": dataclasses.asdict(manifest), "files": states, "signature": signature})
    else:
        print_bundle(folder, manifest, states)
        typer.echo(f"signature: {signature}")
    if bad := [text for text in states.values() if text != "ok"]:
        raise BundleError("; ".join(bad))


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A .csv, .parquet or COCO .json file, a .pts file, or a folder of these.")
    ],
    out: Annotated[Path, typer.Argument(help="The file to write, or a folder for .pts files.")],
    read_as: Annotated[
        str | None, typer.Option("--from", help="pts, coco, csv or parquet; by the suffix when left out.")
    ] = None,
    write_as: Annotated[str | None, typer.Option("--to", help="As --from.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that the image paths start from: COCO needs the images' sizes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn labelled faces into another format: .pts, COCO keypoints, CSV, Parquet.

    Example: kp convert faces.csv faces.coco.json --images photos
    """
    from kp_runtime.interchange import check_format, faces_from_file, faces_to_file, format_of, with_sizes

    write_as = write_as or format_of(out)
    check_format(write_as)
    faces = faces_from_file(source, read_as)
    if images is not None:
        faces = with_sizes(faces, images)
    written = faces_to_file(faces, out, write_as)
    if as_json:
        print_json({"faces": len(faces), "written": [str(path) for path in written]})
        return
    where = str(written[0]) if len(written) == 1 else f"{len(written)} files in {out}"
    print(f"{len(faces)} faces of {source} -> {where}")


@app.command()
def sign(
    bundle: Annotated[Path | None, typer.Argument(help="The bundle's folder.")] = None,
    key: Annotated[Path | None, typer.Option(help="Your private key, a PEM file.")] = None,
    new: Annotated[
        Path | None,
        typer.Option("--new-key", metavar="PATH", help="Make a key pair: PATH and, to give away, .pub.pem."),
    ] = None,
) -> None:
    """Sign a bundle, so that devices can refuse any other; or make the keys for it.

    Example: kp sign --new-key release.pem, then kp sign out/resnet18-68 --key release.pem
    """
    from kp_runtime.signing import new_key, sign_bundle

    if new is not None and bundle is None and key is None:
        typer.echo(f"{new}: keep it to yourself\n{new_key(new)}: give it to the devices")
    elif bundle is not None and key is not None and new is None:
        typer.echo(sign_bundle(bundle, key))
    else:
        raise InputError("give a bundle and --key PRIVATE.pem, or --new-key PATH alone")


@app.command()
def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle, to run its golden crop; the default model's when left out.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds that each backend has; a first start of TensorRT takes minutes.")
    ] = 300.0,
    as_json: Json = False,
) -> None:
    """Say what works on this machine, what does not, and what to do.

    GPU, driver, packages that do not fit each other, and one real inference on each backend that claims to
    work. Each is tried in a process of its own: one that crashes or hangs is a line of the report.

    Exit status 0 where at least one backend works and there is no problem; warnings do not count. Else 1.
    """
    from kp_runtime.doctor import diagnose

    found, reason = None, ""
    try:
        found = _bundle(bundle)
    except KpError as error:  # a line of the report
        reason = str(error)
    diagnosis = diagnose(found, reason, backend_seconds=timeout, step=tell_subject)
    if as_json:
        print_json(dataclasses.asdict(diagnosis) | {"healthy": diagnosis.healthy})
    else:
        print_diagnosis(diagnosis)
    if not diagnosis.healthy:
        raise typer.Exit(1)


def main() -> None:
    """Runs the command; a `KpError` becomes one line on stderr and exit status 1."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # see kp_runtime.backend_ort.import_onnxruntime
    try:
        app()
    except KpError as error:
        _fail(str(error))
    except ImportError as error:
        _fail(f"this command needs a package that is not here ({error}); run: pip install 'kp-edge[export]'")
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}")


def _fail(text: str) -> None:
    print("kp: " + " ".join(text.split()), file=sys.stderr)
    sys.exit(1)


def _note(text: str) -> None:
    typer.echo(text, err=True)


@contextlib.contextmanager
def _signature_told(written: Path, source: Path | None = None) -> Iterator[None]:
    """Says so where a command leaves a bundle without the signature that it, or its source, had."""
    from kp_runtime.signing import is_signed

    before = is_signed(written) or (source is not None and is_signed(source))
    yield
    if before and not is_signed(written):
        _note(f"{written} has a new manifest and no signature of it; sign it: kp sign {written} --key PRIVATE.pem")


@contextlib.contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Sets `stop` at the first Ctrl-C or SIGTERM; the second one does what it always does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quiet_video() -> None:
    """Silences what OpenCV and FFmpeg print by themselves; what matters of it becomes an error of ours."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


def _quiet_training() -> None:
    """Silences what libraries say about themselves; warnings about the user's run stay."""
    import logging
    import warnings

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(LeafSpec|does not have many workers).*")


def _bundle(named: Path | None) -> Path:
    """The bundle that was named, else the default one; last, in a checkout, the checkout's own."""
    from kp_runtime.default_model import default_bundle

    return named or default_bundle(checkout=Path(__file__).parent / DEFAULT_BUNDLE)


def _detector(yunet: Path | None, smallest: float = 0.05) -> Any:
    from kp_runtime.detect import HaarDetector, YuNetDetector

    return YuNetDetector(yunet) if yunet else HaarDetector(smallest=smallest)


def _parse_box(text: str) -> list[float]:
    try:
        box = [float(word) for word in text.split(",")]
    except ValueError:
        box = []
    if len(box) != 4:
        raise InputError(f"a box is X0,Y0,X1,Y1 in pixels, such as 120,80,260,240; got {text!r}")
    return box


def _astronaut() -> Path:
    from kp_runtime.errors import MissingExtraError

    try:
        import skimage
    except ImportError as error:
        raise MissingExtraError("scikit-image", "export", "a bench without --photo") from error
    return Path(skimage.__file__).parent / "data" / "astronaut.png"


if __name__ == "__main__":
    main()
