"""What finds faces and writes them down: `kp predict`, `filter`, `convert`."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from kp_cli.options import (
    EFFECT_NAMES,
    ELSE_DEFAULT,
    Cores,
    Detector,
    Json,
    Looks,
    Mirror,
    PublicKey,
    Smallest,
    Threads,
    Tuned,
    bundle_or_default,
    check_effect,
    check_file,
    detector_record,
    load_model,
    note_boxes,
    open_detector,
    quiet_opencv,
    stopped_by_signals,
    whole_detector_name,
)
from kp_cli.report import is_terminal, note, print_json, print_times, progress, share_progress, tell
from kp_runtime.errors import InputError, KpError

_IN_A_LINE = 5
"""Most photos that the last line names."""


def predict(
    photos: Annotated[list[Path], typer.Argument(help="Photos, or folders of them, without their subfolders.")],
    model: Annotated[Path | None, typer.Option(help="A bundle, or an ONNX file in one; " + ELSE_DEFAULT)] = None,
    out: Annotated[Path, typer.Option(help="Folder for the drawn photos and the results.")] = Path("out"),
    drawn: Annotated[Path | None, typer.Option(help="File for the drawn photo, when there is one photo.")] = None,
    box: Annotated[
        list[str] | None, typer.Option(metavar="X0,Y0,X1,Y1", help="A face box, instead of detecting. Repeatable.")
    ] = None,
    looks: Looks = 1,
    mirror: Mirror = False,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="json, csv, pts, coco, parquet. Repeatable; json when left out."),
    ] = None,
    detector: Detector = "auto",
    backend: Annotated[
        str, typer.Option(help="tensorrt, ort-tensorrt, ort-cuda or ort-cpu, and nothing else; auto takes the best.")
    ] = "auto",
    threads: Threads = None,
    cores: Cores = None,
    tuned: Tuned = None,
    public_key: PublicKey = None,
    times: Annotated[bool, typer.Option("--times", help="Print how long each stage took.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Very many photos, on Ray: local, auto or HOST:PORT (docs/batches.md)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the keypoints of all faces on photos.

    Draws them and writes them down.

    Example: kp predict photo.jpg --format json --format pts
    """
    if ray is not None:
        if box or drawn or times or tuned or public_key or set(formats or []) - {"parquet"}:
            raise InputError("--ray writes Parquet; leave out --box, --drawn, --times, --tuned, --public-key, --format")
        if cores and ray != "local":
            raise InputError("--cores goes with --ray local: a running cluster chooses its own; leave it out")
        _predict_on_ray(photos, out, model, backend, threads, detector, looks, mirror, ray, as_json)
        return
    quiet_opencv()
    import numpy as np

    from kp_runtime.files import make_folder
    from kp_runtime.frame import import_cv2
    from kp_runtime.photos import (
        FailedPhoto,
        NotDrawnError,
        Photo,
        check_formats,
        predict_photo,
        results_json,
    )
    from kp_runtime.timing import StageTimer

    if box and detector != "auto":
        raise InputError("--box is instead of detecting: leave out --detector")
    if times and as_json:
        raise InputError("--times prints a table: leave out --json")
    paths = _photos(photos)
    if len(paths) > 1 and (box or drawn):
        raise InputError(f"--box and --drawn go with one photo, got {len(paths)}")
    check_file(drawn)
    targets = [drawn or out / f"{path.stem}_keypoints.jpg" for path in paths]
    _check_targets(paths, targets)
    if "pts" in (formats or []):
        _check_labels(paths, out)
    boxes = np.array([_parse_box(text) for text in box]) if box else None
    opened, timer = load_model(model, tuned, backend, threads, public_key), StageTimer()
    check_formats(formats or [], opened.spec.points)
    opened.check_looks(looks, mirror)
    finder = None if boxes is not None else _finder(opened.spec, detector, threads, public_key)
    if finder is not None:
        note_boxes(opened.spec)
    make_folder(out)
    results: list[Photo | FailedPhoto] = []
    undrawn: list[str] = []
    stop = threading.Event()
    import_cv2()  # once: it is no part of the first photo's time
    for path, target in _until_stopped("predicting", list(zip(paths, targets, strict=True)), stop):
        call = StageTimer()
        try:
            results.append(
                predict_photo(
                    opened,
                    path,
                    detector=finder,
                    boxes_xyxy=boxes,
                    drawn=target,
                    timer=call,
                    looks=looks,
                    mirror=mirror,
                )
            )
        except NotDrawnError as error:
            results.append(error.photo)
            undrawn.append(f"{error} (--drawn FILE)")
        except KpError as error:
            results.append(FailedPhoto(path, str(error)))
            continue
        timer.add(call)
    found = [photo for photo in results if isinstance(photo, Photo)]
    failed = [photo.error for photo in results if isinstance(photo, FailedPhoto)]
    written, unwritten = _write(results, out, formats or ["json"]) if found else ([], [])
    if as_json:
        print_json(results_json(results))
    else:
        for photo in found:
            tell(f"{photo.path}: {len(photo.keypoints)} face{'s' * (len(photo.keypoints) != 1)}")
            _note_lost(photo, opened.spec.lost_limit)
        if times:
            print_times(timer.summaries())
        pictures = [photo.drawn for photo in found if photo.drawn]
        for files, kind in ((pictures, "drawn photos"), (written, "files")):
            for line in files if len(files) <= _IN_A_LINE else [f"{len(files)} {kind} in {out}"]:
                tell(line)
    if stop.is_set():
        note(f"stopped after {len(results)} of {len(paths)} photos; what is written is of these")
    if failed:
        failed = [f"{len(failed)} of {len(paths)} photos failed: " + "; ".join(_in_a_line(failed))]
    if undrawn:
        undrawn = _in_a_line(undrawn, f"{len(undrawn)} photos were not drawn: ")
        undrawn += ["the keypoints are kept"] * (not unwritten)
    if failed or undrawn or unwritten:
        raise KpError("; ".join([*failed, *undrawn, *unwritten]))
    if stop.is_set():
        raise typer.Exit(130)  # as a shell reports Ctrl-C


def _photos(named: list[Path]) -> list[Path]:
    """The photos of the command line; says which pictures of a folder are left out."""
    from kp_runtime.photos import photos_from_paths, unread_pictures

    photos = photos_from_paths(named)
    for line in unread_pictures(named):
        note(line)
    return photos


def _check_detector(spec: Any, detector: str) -> None:
    """Refuses a `--detector` for a model that takes no boxes."""
    if spec.box == "frame" and detector != "auto":
        raise InputError("this model sees whole frames, not face boxes: leave out --detector")


def _finder(
    spec: Any, detector: str, threads: int | None, public_key: Path | None, smallest: float | None = None
) -> Any:
    """The detector; None where the model takes no boxes."""
    _check_detector(spec, detector)
    if spec.box == "frame":
        return None
    named = whole_detector_name(detector, public_key, smallest)
    return open_detector(named, smallest=smallest or 0.05, threads=threads, public_key=public_key)


def _until_stopped(text: str, photos: list[tuple[Path, Path]], stop: threading.Event) -> Iterator[tuple[Path, Path]]:
    """Photos and where they are drawn, with a progress bar, until a signal sets `stop`."""
    with stopped_by_signals(stop, "stopping after this photo; once more stops at once"):
        for photo in progress(text)(photos):
            if stop.is_set():
                return
            yield photo


def _write(photos: list[Any], out: Path, formats: list[str]) -> tuple[list[Path], list[str]]:
    """Writes the formats, and JSON where one of them can't be; the files, and what is told in the end of the others."""
    from kp_runtime.photos import write_results

    written, unwritten = [], []
    for name in sorted(set(formats), key=lambda name: (name == "json", name)):
        try:
            written += write_results(photos, out, name)
        except KpError as error:
            unwritten.append(str(error))
    if unwritten and "json" not in formats:  # such as where two .pts files would have one name
        kept, failed = _write(photos, out, ["json"])
        return written + kept, [*unwritten, *failed, *(f"all keypoints are in {path}" for path in kept)]
    return written, unwritten


def _in_a_line(faults: list[str], many: str = "") -> list[str]:
    """What the last line says of photos that failed: all, or of too many that each has got a line before it."""
    if len(faults) <= _IN_A_LINE:
        return faults
    tell(*faults, err=True)
    return [f"{many}each is told in a line above"]


def _note_lost(photo: Any, limit: float | None) -> None:
    """Says which boxes of a `Photo` hold no face, where the model tells."""
    from kp_runtime.photos import faces_seen

    for i in (~faces_seen(photo.keypoints, limit)).nonzero()[0]:
        score = photo.keypoints.lost_score[i]
        place = ",".join(f"{value:.0f}" for value in photo.keypoints.boxes_xyxy[i])
        note(f"{photo.path}: box {place} seems to hold no face (lost score {score:.2f}, a face has up to {limit:g})")


def _check_labels(photos: list[Path], out: Path) -> None:
    """Refuses to write `.pts` files where the photos have theirs, of an earlier run too: these may be labels."""
    beside = {folder for path in photos for folder in (path.parent.resolve(), path.resolve().parent)}  # of links too
    labels = sorted(out.glob("*.pts"))
    if labels and out.resolve() in beside:
        raise InputError(f"{labels[0]} and its like lie beside the photos and may be labels; name another --out")
    stems = {path.stem for path in photos}
    if there := [file for file in labels if {file.stem, re.sub(r"_[0-9]+$", "", file.stem)} & stems]:
        raise InputError(f"{there[0]} is there already and may be a label made by hand; name another --out")


def _check_targets(photos: list[Path], drawn: list[Path]) -> None:
    """Refuses pictures that would replace each other, or one of the photos."""
    first: dict[Path, Path] = {}
    for photo, target in zip(photos, drawn, strict=True):
        if (other := first.setdefault(target, photo)) is photo:
            continue
        if other.resolve() == photo.resolve():
            raise InputError(f"{photo} is named twice; name it once")
        raise InputError(
            f"{other} and {photo} would both be drawn as {target}; rename one, or take each in a run with its own --out"
        )
    if replaced := {path.resolve() for path in drawn} & {path.resolve() for path in photos}:
        raise InputError(f"the drawn picture would replace the photo {min(replaced)}; name another place")


def _predict_on_ray(
    photos: list[Path], out: Path, model: Path | None, backend: str, threads: int | None, detector: str, looks: int,
    mirror: bool, address: str, as_json: bool,
) -> None:  # fmt: skip
    """`kp predict --ray`."""
    from functools import partial

    from kp_runtime.detector_by_name import load_detector
    from kp_runtime.files import sha256_of_file
    from kp_runtime.manifest import MANIFEST_NAME, Manifest, folder_of
    from kp_runtime.pipeline import load
    from kp_runtime.ray_batches import Tools, predict_batches

    paths, threads = _photos(photos), 1 if threads is None else threads
    bundle = bundle_or_default(model).resolve()
    folder = folder_of(bundle)
    spec = Manifest.read(folder).spec
    _check_detector(spec, detector)
    note_boxes(spec)
    kind, is_file, file = whole_detector_name(detector).partition("=")
    detector = f"{kind}={Path(file).resolve()}" if is_file else kind
    gpus = 0 if backend in ("auto", "ort-cpu") else 1
    backend = "ort-cpu" if backend == "auto" else backend
    load_detector(detector, threads=threads)  # what is wrong with it is said here, before Ray is started
    if not gpus:
        load(bundle, backend, threads).check_looks(looks, mirror)  # likewise
    settings = detector_record(detector) | {
        "model": bundle.name, "manifest_sha256": sha256_of_file(folder / MANIFEST_NAME), "backend": backend,
        "detector": detector, "looks": looks, "mirror": mirror,
    }  # fmt: skip
    tools = Tools(
        partial(load, bundle, backend, threads), partial(load_detector, detector, threads=threads), threads, gpus,
        looks, mirror,
    )  # fmt: skip
    with share_progress() as bar:
        tenths = {0}

        def step(done: int, count: int) -> None:
            bar("predicting", done / count)
            if not is_terminal(sys.stderr) and done * 10 // count not in tenths:
                tenths.add(done * 10 // count)
                note(f"{done} of {count} photos")

        with contextlib.redirect_stdout(sys.stderr):  # Ray prints warnings on stdout, which is for the result
            result = predict_batches(paths, out, tools, settings, address=address, step=step)
    if as_json:
        print_json(dataclasses.asdict(result) | {"path": str(result.path)})
    else:
        if result.before:
            note(f"{result.before} photos were done before")
        tell(f"{result.done} of {result.photos} photos, {result.faces} faces: {result.path}")
    if result.stopped:
        note("stopped; the same command goes on with what is left")
        raise typer.Exit(130)  # as a shell reports Ctrl-C
    if result.failed:
        rest = f"; the others stand in {out / 'photos'}, column error" if len(result.failed) > _IN_A_LINE else ""
        named = "; ".join(result.failed[:_IN_A_LINE])
        raise KpError(f"{len(result.failed)} of {result.photos} photos failed: {named}{rest}")


def put_effect(
    photos: Annotated[list[Path], typer.Argument(help="Photos, or folders of them, without their subfolders.")],
    effect: Annotated[str, typer.Option(metavar="NAME", help=EFFECT_NAMES)],
    out: Annotated[Path, typer.Option(help="Folder for the new pictures.")] = Path("out"),
    model: Annotated[Path | None, typer.Option(help="A bundle, or an ONNX file in one; " + ELSE_DEFAULT)] = None,
    looks: Looks = 1,
    mirror: Mirror = False,
    smallest: Smallest = None,
    detector: Detector = "auto",
    threads: Threads = None,
    tuned: Tuned = None,
    public_key: PublicKey = None,
    as_json: Json = False,
) -> None:
    """Put pictures on all faces of photos, or hide the faces.

    Sunglasses, a hat, a moustache or a mesh over the face. Writes copies; the photos stay.

    Example: kp filter photo.jpg --effect sunglasses
    """
    quiet_opencv()
    from kp_runtime.effect_pictures import open_effect
    from kp_runtime.files import make_folder
    from kp_runtime.photos import FailedPhoto, Photo, faces_seen, predict_photo

    put = open_effect(effect)
    paths = _photos(photos)
    targets = [out / f"{path.stem}_{Path(effect).stem}.jpg" for path in paths]
    _check_targets(paths, targets)
    opened = load_model(model, tuned, "auto", threads, public_key)
    check_effect(effect, opened.spec)
    opened.check_looks(looks, mirror)
    finder = _finder(opened.spec, detector, threads, public_key, smallest)
    make_folder(out)
    hide = effect == "blur"  # then a face too many is better than one that is seen
    limit = None if hide else opened.spec.lost_limit
    results: list[Photo | FailedPhoto] = []
    stop = threading.Event()
    for path, target in _until_stopped("drawing", list(zip(paths, targets, strict=True)), stop):
        try:
            results.append(
                predict_photo(
                    opened, path, detector=finder, drawn=target, draw=put, draw_lost=hide, looks=looks, mirror=mirror
                )
            )
        except KpError as error:
            results.append(FailedPhoto(path, str(error)))
    found = [photo for photo in results if isinstance(photo, Photo)]
    failed = [photo.error for photo in results if isinstance(photo, FailedPhoto)]

    def count(photo: Photo) -> int:
        return int(faces_seen(photo.keypoints, limit).sum())

    if as_json:
        print_json(
            [
                {"image": p.path, "faces": count(p), "drawn": p.drawn}
                if isinstance(p, Photo)
                else {"image": p.path, "error": p.error}
                for p in results
            ]
        )
    for photo in found:
        if not as_json:
            tell(f"{photo.path}: {count(photo)} face{'s' * (count(photo) != 1)}: {photo.drawn}")
        _note_lost(photo, limit)
        if not count(photo):
            note(f"{photo.path}: no face was found, so {photo.drawn} shows the photo as it is")
    if found and hide:
        note("faces that were not found are not hidden: look at the results")
    if stop.is_set():
        note(f"stopped after {len(results)} of {len(paths)} photos")
    if failed:
        raise KpError(f"{len(failed)} of {len(paths)} photos failed: " + "; ".join(_in_a_line(failed)))
    if stop.is_set():
        raise typer.Exit(130)  # as a shell reports Ctrl-C


def convert(
    source: Annotated[
        Path, typer.Argument(help="A .csv, .parquet, COCO .json or .pts file, or a folder of .pts files.")
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
    """Convert labelled faces: .pts, COCO, CSV, Parquet.

    Example: kp convert faces.csv faces.coco.json --images photos
    """
    from kp_runtime.interchange import check_format, faces_from_file, faces_to_file, format_of, with_sizes

    write_as = write_as or format_of(out)
    check_format(write_as)
    if images is not None and write_as != "coco":
        raise InputError("--images is for COCO, which has the images' sizes: leave it out")
    faces = faces_from_file(source, read_as)
    if images is not None:
        faces = with_sizes(faces, images)
    bare = sum(not Path(face.image).suffix for face in faces)
    if bare and write_as != "pts" and (read_as or format_of(source)) == "pts":
        note(f"no photo lies beside {bare} of the .pts files, so the names of their images have no suffix")
    written = faces_to_file(faces, out, write_as, as_labels=True)
    if as_json:
        print_json({"faces": len(faces), "written": [str(path) for path in written]})
        return
    where = str(written[0]) if len(written) == 1 else f"{len(written)} files in {out}"
    tell(f"{len(faces)} face{'s' * (len(faces) != 1)} of {source} -> {where}")


def _parse_box(text: str) -> list[float]:
    try:
        box = [float(word) for word in text.split(",")]
    except ValueError:
        box = []
    if len(box) != 4:
        raise InputError(f"a box is X0,Y0,X1,Y1 in pixels, such as 120,80,260,240; got {text!r}")
    return box
