"""`kp tune`: the fastest way to run a model here that keeps its accuracy, and the table of what was tried.

What is timed is `model(image, boxes)`: crops, network and the way back, of as many faces as the user
has in a call; not the detector. All candidates are timed shortly and in turns; the best of them, by
median and by 95th percentile, once more at length, and only that second time decides.
`docs/tune.md` says what the numbers mean.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kp_runtime.backend import Backend
from kp_runtime.backend_by_name import BACKENDS, ORDER, kind_of, open_backend
from kp_runtime.bench import MOST_FACES, boxes_in_turn
from kp_runtime.bench_results import times_from_turns
from kp_runtime.cores import default_threads, usable_cores
from kp_runtime.cuda_driver import has_driver
from kp_runtime.detect import Detector
from kp_runtime.errors import BackendError, ImageError, InputError
from kp_runtime.files import sha256_of_file
from kp_runtime.frame import image_from_file
from kp_runtime.machine import load_average, machine_from_system
from kp_runtime.manifest import PRECISIONS, FileEntry, Manifest
from kp_runtime.photos import predict_photo
from kp_runtime.pipeline import Model
from kp_runtime.recorded_rise import Rise, recorded_rise
from kp_runtime.timing import FEW_TURNS, measure_in_turns, ratio_of_medians
from kp_runtime.tune_results import Trial, TuneSettings, Tuning
from kp_runtime.tuned import Tuned, tuned_conditions

__all__ = ["beside", "run_tune"]

FINALISTS = 4
"""How many go on for their median, and how many for their 95th percentile."""

SCREENING_S = 0.3

Step = Callable[[str, float], None]
RiseOf = Callable[[Path, Backend], Rise]


@dataclass(eq=False)
class _Candidate:
    """An open engine and what is known of it so far."""

    bundle: Path
    entry: FileEntry
    model: Model
    threads: int | None
    rise: Rise = dataclasses.field(default_factory=lambda: Rise(None, ""))
    turns: list[list[float]] = dataclasses.field(default_factory=list)
    final: list[list[float]] = dataclasses.field(default_factory=list)

    @property
    def backend(self) -> Backend:
        return self.model.backend

    def keeps(self, settings: TuneSettings) -> bool:
        """Whether it may be chosen as far as accuracy goes."""
        return settings.allow_unknown if self.rise.points is None else self.rise.points <= settings.max_rise


def beside(bundle: Path) -> Path | None:
    """The smaller model that lies beside a bundle by the name `<bundle>-lite`; None where there is none."""
    found = bundle.resolve().with_name(bundle.resolve().name + "-lite")
    near = bundle.parent / found.name
    near = near if near.resolve() == found else found  # a link's neighbours are others
    return near if (found / "manifest.json").exists() else None


def run_tune(
    bundles: Sequence[Path],
    photo: Path,
    detector: Detector,
    settings: TuneSettings | None = None,
    *,
    rise_of: RiseOf | None = None,
    step: Step = lambda phase, share: None,
) -> Tuning:
    """Tries what can run the bundles here.

    Args:
        bundles: folders; the accuracy of the first one's fp32 is the measure for all.
        photo: with at least one face.
        detector: finds its faces.
        settings: what is tried and wanted.
        rise_of: what a file on an engine costs in accuracy; what the bundles record when None.
        step: told what is at work, and the share of it that is done.

    Raises:
        InputError: settings that make no sense, or bundles whose models are of different kinds.
        ImageError: the photo can't be read or shows no face.
        BackendError: nothing runs here, or what ran failed later.
    """
    settings = settings or TuneSettings()
    _check(settings, bundles)
    before, started = load_average(), datetime.datetime.now(datetime.timezone.utc)
    candidates, left_out = _open(bundles, settings, partial(step, "opening"))
    image = image_from_file(photo)
    boxes = _boxes(candidates[0].model, photo, detector, settings.faces)
    _find_rises(candidates, rise_of or _recorded(bundles[0]), partial(step, "accuracy"))
    measure = partial(_measure, image=image, boxes=boxes)
    measure(candidates, "turns", seconds=SCREENING_S, samples=10, step=partial(step, "a first look"))
    default = _default(candidates, bundles[0])
    finalists = _finalists(candidates, settings, default)
    measure(finalists, "final", seconds=settings.seconds, samples=settings.samples, step=partial(step, "measuring"))
    fastest, chosen = _choose(finalists, settings)
    ranked = sorted(candidates, key=lambda c: _percentile(c.final or c.turns, 50))
    result = Tuning(
        settings,
        tuple(map(str, bundles)),
        str(photo),
        sha256_of_file(photo),
        (image.shape[0], image.shape[1]),
        machine_from_system(),
        started.isoformat(timespec="seconds"),
        before,
        load_average(),
        tuple(_trial(c, settings, chosen) for c in ranked),
        left_out,
        None if fastest is None else ranked.index(fastest),
        None if chosen is None else ranked.index(chosen),
        None if chosen is None or default is None else ratio_of_medians(chosen.final, default.final),
        None if chosen is None else _tuned(chosen, settings.faces),
    )
    for candidate in candidates:
        candidate.model.close()
    return result


def _check(settings: TuneSettings, bundles: Sequence[Path]) -> None:
    if not 1 <= settings.faces <= MOST_FACES:
        raise InputError(f"a call has 1 to {MOST_FACES} faces, got {settings.faces}")
    if not 0 <= settings.seconds < float("inf") or settings.samples < 1:
        raise InputError(
            f"a case needs seconds from 0 on and samples from 1 on, got {settings.seconds} and {settings.samples}"
        )
    if not np.isfinite(settings.max_rise):
        raise InputError(f"the NME may rise by a number of percentage points, got {settings.max_rise}")
    if settings.budget_ms is not None and not 0 < settings.budget_ms < float("inf"):
        raise InputError(f"a budget is over 0 ms, got {settings.budget_ms}")
    for names, known, what in (
        (settings.backends, BACKENDS, "backend"),
        (settings.precisions, PRECISIONS, "precision"),
    ):
        if wrong := [name for name in names if name not in known]:
            raise InputError(f"there is no {what} {wrong[0]!r:.40}; choose from {', '.join(known)}")
    if wrong_threads := [n for n in settings.threads if not 1 <= n <= usable_cores()]:
        raise InputError(
            f"threads must be 1 to {usable_cores()}, the cores that this process may use; got {wrong_threads[0]}"
        )
    manifests = [Manifest.read(bundle) for bundle in bundles]
    runnable = [e for m in manifests for e in m.files.values() if e.kind in ("onnx", "plan")]
    have = sorted({str(entry.precision) for entry in runnable})
    if missing := [precision for precision in settings.precisions if precision not in have]:
        raise InputError(
            f"no bundle has a model file of precision {missing[0]}, only {', '.join(have) or 'none'}; "
            "kp export can add it"
        )
    specs = [manifest.spec for manifest in manifests]
    for bundle, spec in zip(bundles, specs, strict=True):
        if (spec.points, spec.box) != (specs[0].points, specs[0].box):
            raise InputError(
                f"{bundle} is no smaller model of the same kind as {bundles[0]}: its points or boxes are others"
            )


def _open(
    bundles: Sequence[Path], settings: TuneSettings, step: Callable[[float], None]
) -> tuple[list[_Candidate], dict[str, str]]:
    """Every file on every engine that runs it, with each number of threads, ready; and what does not run."""
    on_gpu = [] if has_driver() else [name for name in settings.backends if name != "ort-cpu"]
    left_out = dict.fromkeys(on_gpu, "this machine has no NVIDIA driver")
    asked = []
    for bundle in bundles:
        for name, entry in Manifest.read(bundle).files.items():
            if entry.kind not in ("onnx", "plan") or (
                settings.precisions and entry.precision not in settings.precisions
            ):
                continue
            engines = [e for e in settings.backends if e not in left_out and _runs(e, entry)]
            asked += [(bundle, name, entry, engine, n) for engine in engines for n in _threads(engine, settings)]
    candidates: list[_Candidate] = []
    for i, (bundle, name, entry, engine, threads) in enumerate(asked):
        try:
            model = Model(open_backend(bundle / name, engine, threads=threads))
            model.warmup(settings.faces)
            candidates.append(_Candidate(bundle, entry, model, threads))
        except BackendError as error:
            left_out[f"{bundle / name}, {_ran(engine, threads)}"] = str(error)
        step((i + 1) / len(asked))
    if not candidates:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise BackendError(f"nothing of {', '.join(map(str, bundles))} runs here{': ' * bool(reasons)}{reasons}")
    return candidates, left_out


def _runs(engine: str, entry: FileEntry) -> bool:
    return entry.kind == kind_of(engine) and (engine in ("tensorrt", "ort-cpu") or entry.precision in ORDER[engine])


def _threads(engine: str, settings: TuneSettings) -> list[int | None]:
    if engine != "ort-cpu":
        return [None]
    doubled = [1 << i for i in range(default_threads().bit_length())]
    return [*sorted({*settings.threads} or {*doubled, default_threads()})]


def _ran(engine: str, threads: int | None) -> str:
    return engine if threads is None else f"{engine} with {threads} thread{'s' * (threads != 1)}"


def _boxes(model: Model, photo: Path, detector: Detector, n: int) -> NDArray[np.float64]:
    found = predict_photo(model, photo, detector=detector).keypoints.boxes_xyxy
    if not len(found):
        raise ImageError(f"no face was found on {photo}; tune on a photo with one: --photo")
    return boxes_in_turn(found, n)


def _recorded(first: Path) -> RiseOf:
    return lambda bundle, backend: recorded_rise(first, bundle, backend.report.file)


def _find_rises(candidates: list[_Candidate], rise_of: RiseOf, step: Callable[[float], None]) -> None:
    """Asks once for each file and engine; the number of threads moves no keypoint but in its last bits."""
    known: dict[tuple[Path, str, str], Rise] = {}
    for i, candidate in enumerate(candidates):
        key = candidate.bundle, candidate.backend.report.file, candidate.backend.name
        if key not in known:
            known[key] = rise_of(candidate.bundle, candidate.backend)
        candidate.rise = known[key]
        step((i + 1) / len(candidates))


def _measure(
    candidates: Sequence[_Candidate],
    field: str,
    *,
    image: NDArray[np.uint8],
    boxes: NDArray[np.float64],
    seconds: float,
    samples: int,
    step: Callable[[float], None],
) -> None:
    """Times the candidates in turns; the samples go into the named field of each."""
    cases = {str(i): partial(candidate.model, image, boxes) for i, candidate in enumerate(candidates)}
    for name, turns in measure_in_turns(cases, seconds=seconds, samples=samples, step=step).items():
        setattr(candidates[int(name)], field, turns)


def _default(candidates: Sequence[_Candidate], first: Path) -> _Candidate | None:
    """The candidate that `load(first)` opens by itself, where it is among them."""
    try:
        report = open_backend(first, golden=False).report
    except BackendError:
        return None
    wanted = first, report.file, report.backend, default_threads() if report.backend == "ort-cpu" else None
    its = ((c, (c.bundle, c.backend.report.file, c.backend.report.backend, c.threads)) for c in candidates)
    return next((candidate for candidate, found in its if found == wanted), None)


def _finalists(
    candidates: Sequence[_Candidate], settings: TuneSettings, default: _Candidate | None
) -> list[_Candidate]:
    """Those that keep the accuracy and were among the fastest at the first look; and the default."""
    keep = [c for c in candidates if c.keeps(settings)]
    if not keep:
        return []
    best = [sorted(keep, key=lambda c: _percentile(c.turns, q))[:FINALISTS] for q in (50, 95)]
    return list(dict.fromkeys([*([] if default is None else [default]), *best[0], *best[1]]))


def _choose(finalists: Sequence[_Candidate], settings: TuneSettings) -> tuple[_Candidate | None, _Candidate | None]:
    """The fastest that keeps the accuracy, and the fastest of those that fit the budget too."""
    keep = [c for c in finalists if c.keeps(settings)]
    fit = [c for c in keep if settings.budget_ms is None or _percentile(c.final, 95) * 1e3 <= settings.budget_ms]
    return _fastest(keep), _fastest(fit)


def _fastest(candidates: Sequence[_Candidate]) -> _Candidate | None:
    """The shortest median; of those that can't be told from it, the most accurate, then the one of fewest threads."""
    if not candidates:
        return None
    first = min(candidates, key=lambda c: _percentile(c.final, 50))
    alike = [c for c in candidates if c is first or ratio_of_medians(c.final, first.final).low <= 1]

    def order(candidate: _Candidate) -> tuple[float, int, float]:
        points = candidate.rise.points
        return (
            float("inf") if points is None else max(points, 0.0),
            candidate.threads or 0,
            _percentile(candidate.final, 50),
        )

    return min(alike, key=order)


def _percentile(turns: Sequence[Sequence[float]], percent: float) -> float:
    return float(np.percentile([second for turn in turns for second in turn], percent))


def _trial(candidate: _Candidate, settings: TuneSettings, chosen: _Candidate | None) -> Trial:
    report = candidate.backend.report
    ways = _ways(candidate.backend, settings.faces)
    return Trial(
        str(candidate.bundle),
        report.file,
        report.precision,
        report.backend,
        candidate.threads,
        next(iter(ways), None),
        ways,
        candidate.rise,
        times_from_turns(candidate.turns),
        times_from_turns(candidate.final) if candidate.final else None,
        "chosen" if candidate is chosen else _against(candidate, settings, chosen),
    )


def _against(candidate: _Candidate, settings: TuneSettings, chosen: _Candidate | None) -> str:
    """Why a candidate was not chosen."""
    if candidate.rise.points is None and not settings.allow_unknown:
        return "rise not known"
    if not candidate.keeps(settings):
        return f"rise over {settings.max_rise:g}"
    if not candidate.final:
        return "slower at a first look"
    if settings.budget_ms is not None and _percentile(candidate.final, 95) * 1e3 > settings.budget_ms:
        return f"p95 over {settings.budget_ms:g} ms"
    assert chosen is not None  # it fits itself
    if ratio_of_medians(candidate.final, chosen.final).low <= 1:
        return "as fast, but less accurate or of more threads"
    return "longer median" if len(candidate.final) < FEW_TURNS else "slower"


def _ways(backend: Backend, faces: int) -> dict[str, float]:
    """Ways that were tried for so many faces, fastest first, with ms a face."""
    sizes = [size for size in backend.batch_times() if size >= faces]
    return backend.batch_times()[min(sizes)] if sizes and faces > 1 else {}


def _tuned(candidate: _Candidate, faces: int) -> Tuned:
    backend = candidate.backend
    return Tuned(
        str(candidate.bundle),
        backend.report.file,
        candidate.entry.sha256,
        backend.name,
        candidate.threads,
        faces,
        next(iter(_ways(backend, faces)), None),
        tuned_conditions(backend),
    )
