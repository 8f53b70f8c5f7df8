"""Options and helpers that several commands have in common."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from kp_cli.report import note, stands_nowhere
from kp_runtime.errors import InputError


def stay_on(context: typer.Context, cores: str | None) -> str | None:
    """Keeps this thread, and what it starts, on the cores until the command is over; their numbers in order."""
    if cores is None:
        return None
    from kp_runtime.cores import cores_from_text, on_cores

    chosen = cores_from_text(cores)
    context.with_resource(on_cores(chosen))
    return ",".join(map(str, sorted(chosen)))


DEFAULT_BUNDLE = Path("engines/resnet18-68")
CHECKOUT_DETECTOR = Path(__file__).parents[1] / "engines" / "face-detector"
ELSE_DEFAULT = "the default model when left out: KP_MODEL, the model wheel, the checkout's own."
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the engine; its own choice (all cores) when left out.")]
Cores = Annotated[str | None, typer.Option(
    metavar="LIST", callback=stay_on, help="Cores that the command runs on, such as 0,2-3 (Linux); all when left out."
)]  # fmt: skip
Tuned = Annotated[Path | None, typer.Option(
    metavar="FILE", help="Settings of kp tune: model file, engine and threads; --model may then be left out."
)]  # fmt: skip
PublicKey = Annotated[Path | None, typer.Option(
    help="Refuse a bundle, the detector's too, that this PEM file's key did not sign."
)]  # fmt: skip
Looks = Annotated[
    int, typer.Option(help="Times that a face is looked at, each time in the box of the points found before.")
]
Mirror = Annotated[
    bool,
    typer.Option("--mirror", help="Each look is at the face and at its mirror image; the mean counts. Twice the work."),
]
EFFECT_NAMES = "sunglasses, hat, moustache, mesh, blur, or a .toml file of your own (docs/filters.md)."
Detector = Annotated[str, typer.Option(
    metavar="NAME",
    help="own, own=BUNDLE (of kp train-detector), haar, yunet=FILE; auto: what KP_DETECTOR says, else own, else haar.",
)]  # fmt: skip
Smallest = Annotated[float | None, typer.Option(
    min=0.02, max=1.0,
    help="Smallest face, a share of the shorter side; else 0.05, of a video without blur 0.1. YuNet has its own.",
)]  # fmt: skip
Data = Annotated[list[str], typer.Option(
    "--data", metavar="PATH[=WEIGHT]",
    help="A CSV of 68 points beside its photos, or a folder of photos with .pts files. Repeatable.",
)]  # fmt: skip

Licence = Annotated[list[str] | None, typer.Option(
    "--licence", metavar="WHAT=TERMS",
    help="Terms that stay with the bundle, of data, weights or code, as data='for research alone'. Repeatable.",
)]  # fmt: skip


def licence_from_texts(texts: list[str] | None) -> dict[str, str]:
    """The terms by what they are of, as a manifest has them.

    Raises:
        InputError: not `WHAT=TERMS`, or two of one.
    """
    licence: dict[str, str] = {}
    for text in texts or []:
        what, _, terms = text.partition("=")
        if what not in ("data", "weights", "code") or not terms.strip() or what in licence:
            raise InputError(f"--licence takes data=TERMS, weights=TERMS and code=TERMS, each once; got {text!r}")
        licence[what] = terms.strip()
    return licence


def note_boxes(spec: Any) -> None:
    """Says so where a detector's boxes need not be those that a model was trained with."""
    from kp_runtime.detect import box_advice

    if advice := box_advice(spec):
        note(advice)


@contextlib.contextmanager
def told_of_bundle(written: Path, source: Path | None = None) -> Iterator[None]:
    """Says what is not to be seen of a bundle that a command writes.

    That it has no longer the signature that it, or its source, had; and that the shell stands in its old folder.
    """
    from kp_runtime.signing import is_signed

    whole = written.resolve()
    before, stood = is_signed(whole) or (source is not None and is_signed(source)), not stands_nowhere()
    yield
    if before and not is_signed(whole):
        sign = f"kp sign {shlex.quote(str(written))} --key PRIVATE.pem"
        note(f"{written} has a new manifest and no signature of it; sign it: {sign}")
    if stood and stands_nowhere():
        note(f"this shell stands in the folder that was replaced; go to the new one: cd {shlex.quote(str(whole))}")


def bundle_or_default(named: Path | None) -> Path:
    """The bundle that was named, else the default one; last, in a checkout, the checkout's own."""
    from kp_runtime.default_model import default_bundle

    return named or default_bundle(checkout=Path(__file__).parents[1] / DEFAULT_BUNDLE)


def folder_or_default(named: Path | None) -> Path:
    """The folder of `bundle_or_default`, which may be a model file of it."""
    from kp_runtime.manifest import folder_of

    return folder_of(bundle_or_default(named))


@contextlib.contextmanager
def warnings_told() -> Iterator[None]:
    """Turns warnings into lines on stderr."""
    import warnings

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    for warning in told:
        note(str(warning.message))


def load_model(
    model: Path | None, tuned: Path | None, backend: str, threads: int | None, public_key: Path | None
) -> Any:
    """Opens a model as the options say; that its plan or its settings are of another machine is a line on stderr."""
    from kp_runtime.pipeline import load

    if tuned is None:
        bundle = bundle_or_default(model)
        opened = load(bundle, backend, threads, public_key=public_key)
        _note_plan(bundle, opened.backend.report)
        return opened
    with warnings_told():
        return load(model, backend, threads, public_key=public_key, tuned=tuned)


def _note_plan(bundle: Path, report: Any) -> None:
    """Says so where a bundle has a plan and none that runs here."""
    from kp_runtime.manifest import Manifest, folder_of

    reasons = [text for text in report.rejected if text.startswith("tensorrt: ")]
    if reasons and any(entry.kind == "plan" for entry in Manifest.read(folder_of(bundle)).files.values()):
        note(f"{report.backend} runs {report.file} in place of the bundle's plan; {reasons[0]}")


def whole_detector_name(name: str, public_key: Path | None = None, smallest: float | None = None) -> str:
    """A `--detector` with the file that it means; that `auto` takes Haar is a line on stderr.

    YuNet takes no `smallest`.
    """
    from kp_runtime.detector_by_name import detector_name

    with warnings_told():
        whole = detector_name(name, checkout=CHECKOUT_DETECTOR, public_key=public_key)
    if smallest is not None and whole.startswith("yunet="):
        raise InputError("YuNet has a smallest face of its own: leave out --smallest")
    return whole


def detector_record(whole: str) -> dict[str, str]:
    """What a record says of a detector, by its whole name: its kind and, where it has a file, that one's sha256."""
    from kp_runtime.files import sha256_of_file

    kind, is_file, file = whole.partition("=")
    path = Path(file) / "manifest.json" if kind == "own" else Path(file)
    return {"detector": kind} | ({"detector_sha256": sha256_of_file(path)} if is_file else {})


def open_detector(
    name: str, *, smallest: float = 0.05, threads: int | None = None, public_key: Path | None = None
) -> Any:
    """Opens the face detector of a `--detector`; the rest as `kp_runtime.load_detector`."""
    from kp_runtime.detector_by_name import load_detector

    named = whole_detector_name(name, public_key)
    return load_detector(named, smallest=smallest, threads=threads, public_key=public_key)


def check_file(out: Path | None) -> None:
    """Refuses a folder where a file is to be written, before there is anything to lose."""
    if out is not None and (not out.name or out.is_dir()):
        raise InputError(f"{out} is a folder; name a file in it")


def check_effect(effect: str | None, spec: Any) -> None:
    """Refuses an `--effect` for a model without the 68 points that it hangs on."""
    if effect and spec.scheme == "own":
        raise InputError(f"effects hang on the 68 points of a face; this model has {spec.points} of its own")


@contextlib.contextmanager
def stopped_by_signals(stop: threading.Event, said: str = "") -> Iterator[threading.Event]:
    """Sets `stop`, and what it gives, at the first Ctrl-C, SIGTERM or closed terminal, and says so.

    The second one does what it always does.
    """
    signalled = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        before[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)

    def handle(number: int, _: Any) -> None:
        signalled.set()
        stop.set()
        signal.signal(number, before[signal.Signals(number)])
        if said:
            with contextlib.suppress(RuntimeError):  # in the midst of another line
                note(said)

    for number in before:
        signal.signal(number, handle)
    try:
        yield signalled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def quiet_opencv() -> None:
    """Silences what OpenCV and FFmpeg print by themselves; what matters of it becomes an error of ours."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
