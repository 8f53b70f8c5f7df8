"""`kp bench`: the network alone by file and batch size, and the whole way of a photo by stage.

Everything is measured in one run and in turns (`timing` says how and why), and every sample is
kept. The network's input is crops of the photo's own faces, each box shifted a little so that a
batch is not one crop many times over. `docs/bench.md` says what the numbers mean.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kp_runtime.backend import Backend
from kp_runtime.backend_by_name import MADE_BY, kind_of, open_backend
from kp_runtime.bench_results import (
    Bench,
    BenchSettings,
    ColdStart,
    FileRun,
    NetworkCase,
    PhotoRun,
    Setup,
    times_from_turns,
)
from kp_runtime.cold_start import cold_starts
from kp_runtime.detect import Detector
from kp_runtime.device_backend import DeviceBackend
from kp_runtime.errors import BackendError, ImageError, InputError
from kp_runtime.files import sha256_of_file
from kp_runtime.frame import as_frame, image_from_file
from kp_runtime.geometry import matrices_from_boxes
from kp_runtime.machine import load_average, machine_from_system
from kp_runtime.manifest import PRECISIONS, Manifest
from kp_runtime.photos import predict_photo
from kp_runtime.pipeline import Model
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.probes import ask
from kp_runtime.timing import StageTimer, Turns, measure_in_turns

__all__ = ["MOST_FACES", "boxes_in_turn", "run_bench"]

MOST_FACES = 1_000_000
"""In a call: 50 GB of crops of 224 px, and no number that overflows."""
PHOTO, STAGES = "photo", "stages"
SHIFT = 0.02
"""Most that the box of a face that comes again is shifted, in its longer side: 3.4 px of a crop of 224."""

Step = Callable[[str, float], None]


def run_bench(
    bundle: Path,
    photo: Path,
    detector: Detector,
    settings: BenchSettings | None = None,
    *,
    admit: Callable[[Setup], None] = lambda setup: None,
    step: Step = lambda phase, share: None,
) -> Bench:
    """Measures a bundle on a photo.

    Args:
        bundle: a bundle with ONNX files or TensorRT plans.
        photo: with at least one face.
        detector: finds its faces.
        settings: what is measured and for how long.
        admit: shown the setup before anything is measured; may raise to stop the run.
        step: told what is at work, and the share of it that is done.

    Raises:
        InputError: settings that make no sense, or a precision that the bundle lacks.
        BundleError: the bundle can't be used.
        ImageError: the photo can't be read or shows no face.
        BackendError: the engine failed, or more threads than cores.
    """
    settings = settings or BenchSettings()
    _check(settings, bundle)
    before, started = load_average(), datetime.datetime.now(datetime.timezone.utc)
    backends, left_out = _open(bundle, settings)
    model = Model(next(iter(backends.values())))
    gpu = next(filter(None, map(_gpu, backends.values())), None)
    setup, crops = _setup(model, bundle, photo, detector, settings, gpu)
    admit(setup)
    cold = cold_starts(
        [(bundle / name, backend.name) for name, backend in backends.items()],
        crops[0],
        settings.threads,
        partial(step, "cold starts"),
    )
    _warm_up(backends, (*settings.batches, setup.faces), partial(step, "warming up"))
    predict = partial(predict_photo, model, photo, detector=detector)
    network, stages = _measure(model, backends, crops, predict, settings, partial(step, "measuring"))
    files = _files(bundle, backends, cold)
    return Bench(setup, started.isoformat(timespec="seconds"), before, load_average(), files, network, stages, left_out)


def _check(settings: BenchSettings, bundle: Path) -> None:
    if not settings.batches or not all(1 <= batch <= MOST_FACES for batch in settings.batches):
        got = ", ".join(map(str, settings.batches)) or "none"
        raise InputError(f"batch sizes must be 1 to {MOST_FACES}, got {got}")
    if not 0 <= settings.seconds < float("inf") or settings.samples < 1:
        raise InputError(
            f"a case needs seconds from 0 on and samples from 1 on, got {settings.seconds} and {settings.samples}"
        )
    if unknown := [name for name in settings.precisions if name not in PRECISIONS]:
        raise InputError(f"there is no precision {unknown[0]!r:.40}; choose from {', '.join(PRECISIONS)}")
    if bundle.is_file():
        raise InputError(f"bench compares the files of a bundle: give its folder, not {bundle}")


def _open(bundle: Path, settings: BenchSettings) -> tuple[dict[str, Backend], dict[str, str]]:
    """The files that run, by name, the first being the one that the photo's stages use; and why others don't.

    A plan that does not fit this machine is left out. Anything else that does not open is an error, as is a file
    that was asked for.
    """
    wanted, engine = settings.precisions, settings.backend
    kinds = ("onnx", "plan") if engine == "auto" else (kind_of(engine),)
    files = {name: entry for name, entry in Manifest.read(bundle).files.items() if entry.kind in kinds}
    have = sorted({str(entry.precision) for entry in files.values()})
    if missing := [precision for precision in wanted if precision not in have]:
        raise InputError(
            f"the bundle {bundle} has no {' or '.join(MADE_BY[kind][0] for kind in kinds)} of precision {missing[0]}, "
            f"only {', '.join(have) or 'none'}; {MADE_BY[kinds[0]][1]} can add it"
        )
    first = open_backend(bundle, engine, wanted[0] if wanted else "auto", settings.threads)
    opened, left_out = {first.report.file: first}, {}
    for name, entry in files.items():
        if name in opened or (wanted and entry.precision not in wanted):
            continue
        try:
            opened[name] = open_backend(bundle / name, engine, threads=settings.threads)
        except BackendError as error:
            if entry.kind != "plan" or engine != "auto":
                raise
            left_out[name] = str(error)
    return opened, left_out


def _setup(
    model: Model, bundle: Path, photo: Path, detector: Detector, settings: BenchSettings, gpu: str | None
) -> tuple[Setup, NDArray[np.uint8]]:
    """The setup, and the crops of the largest batch."""
    found = predict_photo(model, photo, detector=detector).keypoints
    if not len(found):
        raise ImageError(f"no face was found on {photo}; bench on a photo with one")
    frame = as_frame(image_from_file(photo))
    spec, boxes = model.spec, boxes_in_turn(found.boxes_xyxy, max(settings.batches))
    crops = crops_from_frame(frame, matrices_from_boxes(boxes, spec.size, spec.margin), spec.size)
    name = "none, whole frames" if model.spec.box == "frame" else getattr(detector, "__name__", type(detector).__name__)
    setup = Setup(
        str(bundle), str(photo), sha256_of_file(photo), frame.size_hw, len(found), name, settings,
        machine_from_system(), gpu,
    )  # fmt: skip
    return setup, crops


def _gpu(backend: Backend) -> str | None:
    """Name and kind of the GPU that an engine runs on."""
    if not isinstance(backend, DeviceBackend):
        return None
    devices = ask("driver", seconds=60).facts.get("devices", [])[backend.driver.device_id :]
    return f"{devices[0]['name'] if devices else 'a GPU without a name'} ({backend.driver.arch})"


def boxes_in_turn(boxes_xyxy: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Boxes of so many faces where there are fewer, no crop of which is like another.

    Args:
        boxes_xyxy: `(f, 4)`, at least one.
        n: their number.

    Returns:
        `(n, 4)`: the `f` as they are, then the same in turn, each shifted by up to `SHIFT` of its longer side.
    """
    shift = np.random.default_rng(68).uniform(-SHIFT, SHIFT, (n, 2))
    shift[: len(boxes_xyxy)] = 0
    boxes = boxes_xyxy[np.arange(n) % len(boxes_xyxy)]
    side = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True)
    return np.asarray(boxes + np.tile(shift * side, 2), np.float64)


def _warm_up(backends: dict[str, Backend], batches: tuple[int, ...], step: Callable[[float], None]) -> None:
    """Lets each engine find everything ready and chosen for each size of batch that is measured."""
    pairs = [(backend, batch) for backend in backends.values() for batch in sorted(set(batches))]
    for i, (backend, batch) in enumerate(pairs):
        backend.warmup(batch)
        step((i + 1) / len(pairs))


def _files(bundle: Path, backends: dict[str, Backend], cold: list[ColdStart]) -> tuple[FileRun, ...]:
    entries = Manifest.read(bundle).files
    files = []
    for (name, backend), start in zip(backends.items(), cold, strict=True):
        entry, report = entries[name], backend.report
        ways = {str(size): {way: round(ms, 4) for way, ms in by.items()} for size, by in backend.batch_times().items()}
        files.append(FileRun(name, entry.sha256, entry.bytes, report.precision, report.backend, report.golden_error_px,
                             ways, start))  # fmt: skip
    return tuple(files)


def _measure(
    model: Model,
    backends: dict[str, Backend],
    crops: NDArray[np.uint8],
    predict: Callable[..., object],
    settings: BenchSettings,
    step: Callable[[float], None],
) -> tuple[tuple[NetworkCase, ...], PhotoRun]:
    staged = StagedCalls(predict)
    batches = dict.fromkeys(settings.batches)
    # by itself: on a GPU a call whose stages are timed waits after each and uses no graph, which no user's does
    cases: dict[str, Callable[[], object]] = {PHOTO: predict, STAGES: staged}
    for name, backend in backends.items():
        cases |= {f"{name} {batch}": partial(backend.infer, crops[:batch]) for batch in batches}
    turns = measure_in_turns(cases, seconds=settings.seconds, samples=settings.samples, step=step)
    network = []
    for name in backends:
        for batch in batches:
            times = times_from_turns(turns[f"{name} {batch}"])
            network.append(NetworkCase(name, batch, times.summary.p50_ms / batch, times))
    stages = {name: times_from_turns(found) for name, found in staged.turns(turns[STAGES]).items()}
    return tuple(network), PhotoRun(model.backend.report.file, times_from_turns(turns[PHOTO]), stages)


class StagedCalls:
    """Calls that take a `timer`, with the stages of each call kept by themselves."""

    def __init__(self, predict: Callable[..., object]) -> None:
        self._predict = predict
        self._calls: list[dict[str, float]] = []

    def __call__(self) -> None:
        timer = StageTimer()
        self._predict(timer=timer)
        self._calls.append(timer.totals())

    def turns(self, whole: Turns) -> dict[str, Turns]:
        """The stages' seconds in the turns of the whole calls, which `measure_in_turns` gave.

        The last calls are those of the turns: before a turn's samples comes one that is no sample.
        """
        at = len(self._calls) - sum(len(turn) + 1 for turn in whole)
        result: dict[str, Turns] = {stage: [] for stage in self._calls[-1]}
        for turn in whole:
            calls = self._calls[at + 1 : at + 1 + len(turn)]
            for stage, turns in result.items():
                turns.append([call[stage] for call in calls])
            at += len(turn) + 1
        return result
