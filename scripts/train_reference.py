"""Trains successors of the models in engines/ on a GPU, with a table of the runs that led to them.

    python scripts/train_reference.py --data training_frames_keypoints.csv --data photos_68 --out runs/reference

Two parts: `ideas` (one change each against the base, at 112 px) and `final` (both models, three seeds each; then each
taught by the 224 px models of all seeds; and each of these with its last layer solved anew, as `kp refit`). After each
run the Markdown table of all of them is written, by NME on the held-out people alone. Each run is a folder; one that is
finished is kept, one that was cut off is resumed, so the same command goes on after a kill; other settings or data need
another --out. The test rows are not read here: `kp eval` measures the chosen models on them at the end.

Made for a CUDA GPU (`--precision bf16-mixed --workers 14`); it runs on a CPU too, for days.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kp_cli.options import detector_record, open_detector, whole_detector_name
from kp_cli.report import one_line_errors
from kp_export.evaluate import evaluate, open_model
from kp_runtime.errors import InputError
from kp_runtime.files import write_file
from kp_runtime.manifest import MANIFEST_NAME
from kp_train.checkpoint import has_begun
from kp_train.config import TrainConfig, recipe
from kp_train.data import Source, held_out_of, parse_source
from kp_train.refit import NothingGainedError, refit
from kp_train.run_record import stored_record
from kp_train.train import train

VAL_FRACTION = 0.1
FIRST, LITE, FULL = "resnet18-68-first", "resnet18-68-lite", "resnet18-68"
TAUGHT = {model: f"{model}-taught" for model in (LITE, FULL)}
FINAL = (LITE, FULL, *TAUGHT.values())
"""What is refitted, and has a line with its spread over the seeds."""


@dataclass(frozen=True)
class Run:
    """One run: what it changes, a factor of the second source's weight, where it begins, who teaches it."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    photos: float = 1.0
    init: str | None = None
    teachers: tuple[str, ...] = ()


def ideas(epochs: int) -> list[Run]:
    """One change each; the base is the default recipe at 112 px."""
    base = {"size": 112, "epochs": epochs}
    changes: dict[str, dict[str, Any]] = {
        "base": {},
        "augment-varied": {"augment": "varied"},
        "augment-bent": {"augment": "bent"},
        "augment-light": {"augment": "light"},
        "augment-none": {"augment": "none"},
        "beta-0.02": {"beta": 0.02},
        "beta-0.2": {"beta": 0.2},
        "beta-1": {"beta": 1.0},
        "ema-off": {"ema": 0.0},
        "decay-0.1": {"weight_decay": 0.1},
        "lr-5e-3": {"lr": 5e-3},
        "lr-1e-3": {"lr": 1e-3},
        "batch-32": {"batch_size": 32},
    }
    runs = [Run(f"idea-{name}", base | change) for name, change in changes.items()]
    return [*runs, Run("idea-photos-0.5", base, photos=0.5), Run("idea-photos-2", base, photos=2.0)]


def final(epochs: int, taught_epochs: int, seeds: list[int], changes: dict[str, Any], photos: float) -> list[Run]:
    """Both models for each seed, and what all of them teach.

    A short run first, which is there to measure the labels' bias; the small model begins at its weights, and the large
    one at the small one's. Large models of other seeds err otherwise, so that the mean of their answers and the label
    is a better target than either; both models go on with that.
    """
    runs = []
    for seed in seeds:
        first, lite, full = (f"{model}-{seed}" for model in (FIRST, LITE, FULL))
        runs.append(Run(first, {"size": 112, "epochs": max(1, epochs // 5), "seed": seed} | changes, photos))
        runs.append(Run(lite, {"size": 112, "epochs": epochs, "seed": seed} | changes, photos, first))
        runs.append(Run(full, {"size": 224, "epochs": epochs, "seed": seed} | changes, photos, lite))
    teachers = tuple(f"{FULL}-{seed}" for seed in seeds)
    for seed in seeds:
        for model, size in ((LITE, 112), (FULL, 224)):
            taught = {"size": size, "epochs": taught_epochs, "seed": seed} | changes
            runs.append(Run(f"{TAUGHT[model]}-{seed}", taught, photos, f"{model}-{seed}", teachers))
    return runs


def finish(run: Run, sources: list[Source], out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains a run, or goes on with it, and measures it on the held-out people of each source."""
    folder = out / run.name
    data, config = weighted(sources, run.photos), config_of(run, args.precision)
    if (folder / MANIFEST_NAME).is_file():  # written last
        stored_record(folder, data, config)  # of other settings or data it can't stand in this table
    else:
        print(f"== {run.name}: {run.changes}", flush=True)
        train(
            data, config, folder,
            name=kind_of(run.name).removesuffix("-taught"), weights="none",
            init=None if run.init is None else out / run.init, teachers=[out / name for name in run.teachers],
            resume=has_begun(folder),
            devices="1", accelerator=args.accelerator, workers=args.workers, picture_every=50, progress=False,
        )  # fmt: skip
    return measure(run, sources, folder)


def finish_refit(run: Run, sources: list[Source], out: Path) -> dict[str, Any] | None:
    """Solves the last layer of a finished run anew and measures that too; None where no last layer is better."""
    kind, _, seed = run.name.rpartition("-")
    refitted = replace(run, name=f"{kind}-refitted-{seed}")
    folder = out / refitted.name
    if not (folder / MANIFEST_NAME).is_file():  # written last
        print(f"== {refitted.name}", flush=True)
        try:
            detector = whole_detector_name("auto")
            made = detector_record(detector)
            refit(out / run.name, weighted(sources, run.photos), folder, open_detector(detector), made=made)
        except NothingGainedError as error:
            print(f"not refitted: {error}", flush=True)
            return None
    return measure(refitted, sources, folder)


def kind_of(run: str) -> str:
    """A run's name without its seed."""
    return run.rpartition("-")[0]


def measure(run: Run, sources: list[Source], folder: Path) -> dict[str, Any]:
    """NME of a run on the held-out people of each source, once."""
    measured = folder / "held_out.json"
    if not measured.is_file():
        model = open_model(folder)
        told = {"changes": run.changes, "photos": run.photos, "init": run.init, "teachers": run.teachers}
        result: dict[str, Any] = {"run": run.name} | told
        for source in sources:
            faces = held_out_of([source], VAL_FRACTION)
            if faces:
                result[source.path.name] = evaluate(model, faces).accuracy.nme
        write_file(measured, json.dumps(result, indent=2) + "\n")
    return json.loads(measured.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def config_of(run: Run, precision: str) -> TrainConfig:
    """A run's settings.

    Raises:
        InputError: a change names no setting, or one of this script's own, or its value is none.
    """
    try:
        return recipe("default", precision=precision, val_fraction=VAL_FRACTION, **run.changes)
    except TypeError as error:
        raise InputError(f"the changes of {run.name} are no settings of kp train: {error}") from error


def weighted(sources: list[Source], photos: float) -> list[Source]:
    """The sources, those behind the first drawn `photos` times as often as they were to be."""
    return [replace(source, weight=source.weight * (photos if i else 1)) for i, source in enumerate(sources)]


def table(results: list[dict[str, Any]], names: list[str]) -> str:
    """All runs as a Markdown table, and the spread over the seeds of each final model."""
    lines = [f"| run | change | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for result in results:
        changes = result["changes"] | ({} if result["photos"] == 1 else {"photos": result["photos"]})
        text = ", ".join(f"{key} {value}" for key, value in changes.items())
        lines.append(
            f"| {result['run']} | {text} | " + " | ".join(f"{result.get(n, np.nan):.2%}" for n in names) + " |"
        )
    for model in [name + kind for name in FINAL for kind in ("", "-refitted")]:
        seeds = [r for r in results if kind_of(r["run"]) == model]
        if len(seeds) > 1:
            spread = [[r.get(name, np.nan) for r in seeds] for name in names]
            cells = " | ".join(f"{np.mean(v):.2%} ± {np.std(v, ddof=1):.2%}" for v in spread)
            lines.append(f"| {model}, {len(seeds)} seeds | mean ± standard deviation | {cells} |")
    return "\n".join(lines) + "\n"


def change_from_text(text: str) -> tuple[str, Any]:
    """A setting and its value, of `NAME=JSON`.

    Raises:
        InputError: no JSON behind the name.
    """
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise InputError(f"--change takes NAME=JSON, such as beta=0.02 or 'augment=\"light\"', got {text!r}") from error


def main() -> None:
    """Runs the parts that were asked for, and prints the table of what is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, help="as for kp train; the first is the video frames")
    parser.add_argument("--out", type=Path, default=Path("runs/reference"))
    parser.add_argument("--part", choices=("ideas", "final", "all"), default="all")
    parser.add_argument("--idea-epochs", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=250, help="of each final run")
    parser.add_argument("--taught-epochs", type=int, default=80, help="of each run that is taught")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--change", action="append", default=[], help="NAME=JSON: a setting of the final runs")
    parser.add_argument("--photos", type=float, default=1.0, help="times the second source's weight, in the final runs")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    sources = [parse_source(text) for text in args.data]
    if len({source.path.name for source in sources}) < len(sources):
        raise InputError("two data sets have one name, by which the table tells them apart; rename one")
    changes = dict(map(change_from_text, args.change))
    runs = ideas(args.idea_epochs) if args.part != "final" else []
    if args.part != "ideas":
        runs += final(args.epochs, args.taught_epochs, args.seeds, changes, args.photos)
    for run in runs:
        config_of(run, args.precision)  # what is wrong is said now, not after days
    results = []
    for run in runs:
        results.append(finish(run, sources, args.out, args))
        if kind_of(run.name) in FINAL and (refitted := finish_refit(run, sources, args.out)):
            results.append(refitted)
        text = table(results, [source.path.name for source in sources])
        write_file(args.out / "runs.md", text)
    print(text)


if __name__ == "__main__":
    with one_line_errors("train_reference"):
        main()
