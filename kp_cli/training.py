"""`kp train` and `kp eval`."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from kp_cli.options import (
    Data,
    Detector,
    Json,
    Licence,
    Looks,
    Mirror,
    Threads,
    detector_record,
    licence_from_texts,
    note_boxes,
    open_detector,
    told_of_bundle,
    whole_detector_name,
)
from kp_cli.report import (
    is_terminal,
    note,
    print_accuracy,
    print_folders,
    print_groups,
    print_json,
    print_table,
    progress,
    shown_before_kept,
    tell,
)
from kp_runtime.cores import checked_threads
from kp_runtime.errors import BundleError, ExportError, InputError


class Recipe(str, enum.Enum):
    """Recipes of `kp train`."""

    default = "default"
    seed = "seed"


class Boxes(str, enum.Enum):
    """Where `kp eval` takes face boxes from."""

    keypoints = "keypoints"
    detector = "detector"


class Split(str, enum.Enum):
    """Which faces `kp eval` measures."""

    rows = "rows"
    person = "person"


def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run; the checkpoint's bundle in the end.")],
    recipe: Annotated[
        Recipe, typer.Option(help="default: face crops, ours. seed: the original project's.")
    ] = Recipe.default,
    name: Annotated[str, typer.Option(help="The model's name.")] = "resnet18-68",
    points: Annotated[
        int | None, typer.Option(min=2, max=1000, help="Points a face in your data, where they are not the 68.")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(metavar="A-B,…", help="With --points: those that change places in a mirrored face.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the crops in pixels.")] = None,
    reduce: Annotated[int | None, typer.Option(help="The backbone sees means of this many pixels square.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Most epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Faces a step, on each device.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, the schedule's peak.")] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of the weight averaging, by the run's length when left out; 0: off.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Take the weights of the best epoch by held-out loss, or of the last.", metavar="best|last"),
    ] = None,
    augment: Annotated[
        str | None, typer.Option(help="faces, varied, bent, shaken, tight, light, crop or none.")
    ] = None,
    whole: Annotated[
        list[Path] | None,
        typer.Option(help="Hold out nobody of this --data: for a last run, when all is decided. Repeatable."),
    ] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="Share of the people that are held out: a tenth when left out.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of weights, order and augmentation.")] = None,
    precision: Annotated[str | None, typer.Option(help="32-true, bf16-mixed, or on a GPU 16-mixed.")] = None,
    weights: Annotated[str, typer.Option(help="auto, imagenet, none, or a torchvision ResNet-18 .pth file.")] = "auto",
    init: Annotated[Path | None, typer.Option(help="Start from this checkpoint instead.")] = None,
    teacher: Annotated[
        list[Path] | None,
        typer.Option(
            help="Learn from this bundle's answers too: targets are the mean of label and teachers. Repeatable."
        ),
    ] = None,
    licence: Licence = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    devices: Annotated[str, typer.Option(help="Number of devices, or auto.")] = "auto",
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu; on Apple silicon cpu.")] = "auto",
    strategy: Annotated[str, typer.Option(help="Lightning's strategy, such as ddp.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that make crops, for each device.")] = 1,
    picture_every: Annotated[int, typer.Option(min=1, help="Epochs between two pictures of held-out faces.")] = 5,
) -> None:
    """Train on photos with 68 points; go on after a kill.

    Example: kp train --data faces.csv --data photos_68=1.5 --out runs/first

    On several devices or machines: torchrun --nproc-per-node gpu --no-python kp train … (docs/training.md)
    """
    from kp_train.config import recipe as settings

    config = settings(
        recipe.value,
        points=points,
        pairs=pairs,
        size=size,
        reduce=reduce,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        ema=ema,
        keep=keep,
        augment=augment,
        val_fraction=val_fraction,
        seed=seed,
        precision=precision,
    )
    terms = licence_from_texts(licence)
    _quiet_training()  # from here on it takes seconds to import
    from lightning.pytorch.utilities import rank_zero_only

    from kp_train.data import parse_source
    from kp_train.train import train as run

    sources = _with_whole([parse_source(text, config.points) for text in data], whole or [])
    with contextlib.ExitStack() as lock:
        rank_zero_only(lock.enter_context)(_alone_in(out))  # the other workers are this command too
        path = run(
            sources, config, out, name=name, weights=weights, init=init, teachers=teacher or [], licence=terms,
            resume=resume, devices=devices, accelerator=accelerator, strategy=strategy, workers=workers,
            picture_every=picture_every, progress=is_terminal(sys.stdout),
        )  # fmt: skip
    run_folder, refitted = shlex.quote(str(out)), shlex.quote(f"{out}-refitted")
    lines = [f"checkpoint: {path}", f"curves: tensorboard --logdir {run_folder}"]
    if config.box == "keypoints":
        same_data = " ".join(f"--data {shlex.quote(text)}" for text in data)
        lines.append(f"next: kp refit {run_folder} {same_data} --out {refitted}  # minutes that are worth many epochs")
        lines.append(f"then: kp export {refitted} --fp16")
    else:  # the last layer is solved on boxes around the points
        lines.append(f"next: kp export {run_folder} --fp16")
    rank_zero_only(tell)(*lines)


def _with_whole(sources: list[Any], paths: list[Path]) -> list[Any]:
    if odd := [path for path in paths if path not in [source.path for source in sources]]:
        raise InputError(f"--whole {odd[0]} is none of the --data; name one of these, without a weight")
    return [dataclasses.replace(source, whole=source.path in paths) for source in sources]


def refit(
    bundle: Annotated[Path, typer.Argument(help="A bundle with a checkpoint, or a run of kp train.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint's bundle.")],
    score_only: Annotated[
        bool, typer.Option("--score-only", help="Add the lost score alone: no keypoint moves.")
    ] = False,
    boxes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND[=WEIGHT]",
            help="Boxes to solve on: keypoints (exact), jittered, shaken, detector; all but shaken when left out. "
            "Repeatable.",
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How strongly the old layer holds the new one, as 0.1; held-out people choose when left out."
        ),
    ] = None,
    detector: Detector = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Solve a trained model's last layer anew.

    In closed form, in minutes that are worth many epochs, on the faces that it was trained on, in boxes of several
    kinds. People who were held out choose how strongly, and show what came of it. The new model also gives a lost
    score, which tells whether a box holds a face.

    Example: kp refit runs/first --data faces.csv --out runs/refitted
    """
    import torch

    from kp_runtime.manifest import Manifest
    from kp_train.data import parse_source
    from kp_train.refit import ALIKE
    from kp_train.refit import refit as run

    weights = _parse_boxes(boxes) if boxes else ALIKE
    if threads is not None:
        torch.set_num_threads(checked_threads(threads))
    if not bundle.exists():
        raise BundleError(f"there is no bundle or run at {bundle}")
    spec = Manifest.read(bundle if bundle.is_dir() else bundle.parent).spec
    sources = [parse_source(text, spec.points) for text in data]
    if spec.scheme == "own":
        note(f"detectors give the box of 68 points, not of these {spec.points}: solved without a detector's boxes")
    finder, made = None, None
    if spec.scheme != "own":
        whole = whole_detector_name(detector)
        finder, made = open_detector(whole, threads=threads), detector_record(whole)
    result = run(
        bundle, sources, out, finder, boxes=weights, strength=strength, score_only=score_only, made=made, bar=progress
    )
    if as_json:
        print_json(dataclasses.asdict(result) | {"bundle": out})
        return
    rows = [
        (kind, result.held_out[kind], f"{result.before[kind]:.2%}", f"{nme:.2%}") for kind, nme in result.after.items()
    ]
    print_table("NME of held-out people", ("boxes", "faces", "before", "after"), rows)
    left_out = "" if result.lost_score.is_of_use else "; left out: the model does not find faces well enough for it"
    tell(f"lost score: {result.lost_score}{left_out}")
    tell(f"checkpoint: {out}", f"next: kp export {shlex.quote(str(out))} --fp16")


def _parse_boxes(texts: list[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for text in texts:
        kind, sign, weight = text.partition("=")
        if kind in weights:
            raise InputError(f"--boxes {kind} is given twice; give it once, with its weight")
        try:
            weights[kind] = float(weight) if sign else 1.0
        except ValueError:
            raise InputError(f"--boxes is KIND or KIND=WEIGHT, such as keypoints=2; got {text!r}") from None
    return weights


def train_detector(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the run; the detector's bundle in the end.")],
    no_faces: Annotated[
        list[Path] | None, typer.Option("--no-faces", help="A folder of pictures that hold no face. Repeatable.")
    ] = None,
    name: Annotated[str, typer.Option(help="The detector's name.")] = "face-detector",
    steps: Annotated[int | None, typer.Option(help="Steps of the optimiser.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, the schedule's peak.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of weights and windows.")] = None,
    score: Annotated[
        float | None, typer.Option(help="From which score on it finds a face; scripts/measure_detectors.py helps.")
    ] = None,
    licence: Licence = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out, by its own settings; --steps may be other ones."),
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make windows beside the training.")] = 0,
    threads: Threads = None,
) -> None:
    """Train a small face detector, and export it.

    On photos with 68 points; goes on after a kill.

    Example: kp train-detector --data faces.csv --out runs/detector
    """
    from kp_export.detector_bundle import export_detector
    from kp_runtime.spec import DetectorSpec
    from kp_train.config import DetectorConfig
    from kp_train.data import parse_source
    from kp_train.face_windows import read_pictures
    from kp_train.train_detector import begun_config
    from kp_train.train_detector import train_detector as run

    if score is not None:
        DetectorSpec(name, score=score)  # refused now, not after the training
    if threads is not None:
        checked_threads(threads)
    given: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    began = begun_config(out) if resume else DetectorConfig()
    config = dataclasses.replace(began, **{key: value for key, value in given.items() if value is not None})
    terms = licence_from_texts(licence)
    sources, pictures = [parse_source(text) for text in data], read_pictures(no_faces or [])
    with _alone_in(out):
        run(
            sources, pictures, config, out, name=name, licence=terms, resume=resume, workers=workers, threads=threads,
            say=lambda text: print(text, flush=True),
        )  # fmt: skip
    exported = export_detector(out, score)
    tell(f"detector: {exported}", f"next: kp predict photo.jpg --detector own={shlex.quote(str(out))}")


def evaluate(
    model: Annotated[Path, typer.Argument(help="A checkpoint, a bundle's folder, or an ONNX file or a plan in it.")],
    data: Data,
    boxes: Annotated[
        Boxes, typer.Option(help="Boxes from the true keypoints, or from a face detector.")
    ] = Boxes.keypoints,
    split: Annotated[Split, typer.Option(help="All rows, or only people that were never trained on.")] = Split.rows,
    out: Annotated[
        Path | None, typer.Option(help="Folder for pictures: error curve, error of each point, worst faces.")
    ] = None,
    steady: Annotated[
        bool,
        typer.Option("--robustness", help="Also shake the boxes, enlarge and mirror the photos: 13 times the work."),
    ] = False,
    looks: Looks = 1,
    mirror: Mirror = False,
    record: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also keep the result in the bundle's manifest under this name.")
    ] = None,
    detector: Detector = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure a model on labelled faces: NME, AUC, failure rate.

    Also by region, face size, turn of the head and folder (of 2 to 10), and the original project's loss; --out adds
    pictures: the error curve, the error of each point by turn of the head, the worst faces.

    Example: kp eval runs/first --data faces.csv --split person --out out/first
    """
    from kp_export.evaluate import evaluate as measure
    from kp_export.evaluate import held_out_faces, open_model, trained_on
    from kp_export.robustness import folders, groups, robustness
    from kp_export.staging import alone
    from kp_runtime.manifest import Manifest
    from kp_train.data import parse_source

    if detector != "auto" and boxes is not Boxes.detector:
        raise InputError("--detector goes with --boxes detector")
    if steady and boxes is Boxes.detector:
        raise InputError("--robustness shakes the boxes of the keypoints: leave out --boxes detector")
    opened = open_model(model, threads)
    if (steady or boxes is Boxes.detector) and opened.manifest.spec.box == "frame":
        raise InputError("this model sees whole frames, not face boxes: leave out --boxes detector and --robustness")
    spec = opened.manifest.spec
    if steady and spec.scheme == "own":
        raise InputError("--robustness mirrors faces of the 68 points; this model's are others: leave it out")
    sources = [parse_source(text, spec.points) for text in data]
    if split is Split.person:
        faces = held_out_faces(sources, opened.manifest)
    else:
        faces = [face for source in sources for face in source.faces]
        if seen := trained_on(sources, opened.manifest):
            others = "; --split person measures the others" if seen < len(faces) else ""
            note(f"{seen} of these {len(faces)} faces were trained on{others}")
    named = whole_detector_name(detector) if boxes is Boxes.detector else None
    finder = None
    if named:
        note_boxes(spec)
        finder = open_detector(named, threads=threads)
    result = measure(opened, faces, finder, bar=progress("measuring"), looks=looks, mirror=mirror)
    more: dict[str, Any] = {"groups": [dataclasses.asdict(group) for group in groups(result)]}
    if steady:
        more["robustness"] = dataclasses.asdict(
            robustness(opened, result.faces, progress("showing otherwise"), looks, mirror)
        )
    pictures = ["error_curve.png", "worst.png", "worst.csv"] + ["point_errors.png"] * (spec.scheme != "own")
    names = [] if out is None else [out / name for name in pictures]
    how: dict[str, Any] = {
        "boxes": boxes.value, "split": split.value, "missed": result.missed, "nme_interval": result.interval,
        "given_up": result.given_up, "looks": looks, "mirror": mirror,
    }  # fmt: skip
    with shown_before_kept() as raise_lost:
        if as_json:
            rest = {"model": opened.name, "detector": named, **how, **dataclasses.asdict(result.accuracy), **more}
            by_folder = [dataclasses.asdict(one) for one in folders(result)]
            print_json(rest | {"folders": by_folder, "pictures": [str(name) for name in names]})
        else:
            print_accuracy(opened.name, result)
            print_folders(folders(result))
            print_groups(more)
    if record is not None:
        shown = how | (detector_record(named) if named else {})
        shown |= {"nme_unit": "longer side"} if spec.scheme == "own" else {}  # once it was the root of the box's area
        shown |= {"sources": [{"name": one.name, "sha256": one.sha256} for one in sources]}
        if model.is_file() and (entry := opened.manifest.files[model.name]).kind != "checkpoint":
            shown |= {"precision": entry.precision, "sha256": entry.sha256}
        kept = {record: dataclasses.asdict(result.accuracy) | shown | more}
        bundle = model if model.is_dir() else model.parent
        with told_of_bundle(bundle), alone(bundle):
            manifest = Manifest.read(bundle)  # anew: an export may have been at work meanwhile
            dataclasses.replace(manifest, accuracy=manifest.accuracy | kept).write(bundle)
    if names:
        from kp_export.pictures import error_curve, point_error_map, worst_faces

        error_curve(result, opened.name, names[0])
        worst_faces(result, names[1])
        if names[3:]:
            point_error_map(result, opened.name, names[3])
    raise_lost()
    for name in names if not as_json else ():
        tell(name)


@contextlib.contextmanager
def _alone_in(run: Path) -> Iterator[None]:
    """No other command is at work on a run meanwhile, as far as the system has locks; its folder need not be there."""
    with contextlib.ExitStack() as lock:
        try:
            from kp_export.staging import alone

            with contextlib.suppress(OSError):  # the run says it
                run.absolute().parent.mkdir(parents=True, exist_ok=True)
            lock.enter_context(alone(run))
        except ModuleNotFoundError as error:
            if error.name != "fcntl":  # which Windows lacks
                raise
        except ExportError as error:
            if isinstance(error.__cause__, BlockingIOError):
                raise
            note(f"{run} is not locked, see that no other command trains there ({error.__cause__})")
        yield


def _quiet_training() -> None:
    """Silences what libraries say about themselves; warnings about the user's run stay."""
    import logging
    import warnings

    for name in ("pytorch.utilities.rank_zero", "pytorch.accelerators.cuda", "fabric.utilities.distributed"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    usual = "LeafSpec|AMP with fp16 is not supported on CPU|does not have many workers|exists and is not empty"
    warnings.filterwarnings("ignore", message=f".*({usual}).*")
