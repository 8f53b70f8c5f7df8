"""The record of a run: who is held out, what it began with, and whether one that goes on began likewise.

It stands in `run.json` from the first step on and becomes `training` of the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kp_runtime.errors import DataError, KpError
from kp_runtime.files import git_revision
from kp_runtime.manifest import MANIFEST_NAME, Manifest
from kp_train.config import DetectorConfig, TrainConfig
from kp_train.data import Face, Source, held_out_fraction, held_out_of, is_held_out, recorded_fraction

__all__ = [
    "ancestry",
    "check_known",
    "check_licence",
    "learned_whole",
    "least_held_out",
    "may_have_seen",
    "people_seen",
    "recorded_sources",
    "run_record",
    "sha256_of_names",
    "split_by_person",
    "stored_record",
    "unseen_fraction",
]


_NAMES = "a person is a file's name up to its last underscore: name the files so that each differs, as anna_001.jpg"


def split_by_person(
    sources: Sequence[Source], config: TrainConfig | DetectorConfig
) -> tuple[list[list[Face]], list[Face]]:
    """Each source's faces to train on, and all held-out ones together, by person.

    Raises:
        DataError: a source gives no face to train on, or all together give none to validate on, or a held-out person is
            in a source that is learned whole.
    """
    training = [[f for f in s.faces if s.whole or not is_held_out(f.person, config.val_fraction)] for s in sources]
    for source, part in zip(sources, training, strict=True):
        if not part:
            raise DataError(
                f"{source.path} gives no face to train on: its {_whose(source.faces)} are held out; {_NAMES}, or leave "
                "the source out"
            )
    held_out = held_out_of(sources, config.val_fraction)
    learned = {face.person: source.path for source in sources if source.whole for face in source.faces}
    if twice := sorted({face.person for face in held_out} & learned.keys()):
        raise DataError(
            f"{len(twice)} people who are held out are in {learned[twice[0]]} too, which is learned whole, as "
            f"{twice[0]}; give --whole with every source that has them, or leave it out; {_NAMES}"
        )
    if all(source.whole for source in sources):
        raise DataError("every source is learned whole and nobody is left to validate on; leave --whole out for one")
    if not held_out:
        raise DataError(
            f"{_whose([face for source in sources for face in source.faces])} give none to validate on at val_fraction "
            f"{config.val_fraction:g}; {_NAMES}, or add faces of more people"
        )
    return training, held_out


def _whose(faces: Sequence[Face]) -> str:
    """How many faces of how many people, and who these are."""
    people = sorted({face.person for face in faces})
    named = f"{', '.join(people[:3])}{' …' if people[3:] else ''}"
    return f"{len(faces)} faces of {len(people)} {'person' if len(people) == 1 else 'people'} ({named})"


def run_record(
    sources: Sequence[Source],
    training: list[list[Face]],
    held_out: list[Face],
    config: TrainConfig | DetectorConfig,
    start: dict[str, Any],
) -> dict[str, Any]:
    """What the manifest keeps of a run: enough to say what made these weights."""
    return {
        "config": dataclasses.asdict(config),
        "start": start,
        "sources": [
            {
                "name": source.name,
                "sha256": source.sha256,
                "weight": source.weight,
                "faces": len(source.faces),
                "trained_on": len(part),
                "whole": source.whole,
            }
            for source, part in zip(sources, training, strict=True)
        ],
        "held_out": {
            "faces": len(held_out),
            "rule": "person = stem up to the last underscore; first 32 bits of its sha256 / 2^32 < val_fraction",
            "val_fraction": config.val_fraction,
            "sha256": sha256_of_names(face.image.name for face in held_out),
        },
        **_made_by(),
    }


def stored_record(
    run: Path, sources: Sequence[Source], config: TrainConfig | DetectorConfig, free: Sequence[str] = ()
) -> dict[str, Any]:
    """The record that a run began with; a resumed one must have its settings, but for the `free` ones, and its data.

    A setting that is None now is left to the record.

    Where it goes on by another revision or other versions than it began with, `resumed_by` says which.

    Raises:
        KpError: it can't be read, or something differs.
    """
    try:
        stored: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
        check_known(run, stored["config"], type(config))
        before = dataclasses.asdict(type(config)()) | stored["config"]  # a setting that the run's release did not have
        data = [(s["sha256"], s["weight"], s.get("whole", False)) for s in stored["sources"]]
        named = stored.get("held_out", {}).get("sha256")  # of a folder the hash above knows no names
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KpError(f"{run / 'run.json'} can't be read ({error}); begin a new run with another --out") from error
    wanted = dataclasses.asdict(config)
    given = [key for key in wanted if wanted[key] is not None and key not in free]
    differ = [key for key in given if before.get(key) != wanted[key]]
    if changed := [f"{key} {before.get(key)} -> {wanted[key]}" for key in differ]:
        more = isinstance(config, TrainConfig) and (run / MANIFEST_NAME).exists()  # finished, so it has weights
        how = f", or begin another at its weights: --init {run} --out OTHER" if more else ""
        raise KpError(f"the run in {run} began with other settings ({', '.join(changed)}); give the same ones{how}")
    names = sha256_of_names(face.image.name for face in held_out_of(sources, config.val_fraction))
    if data != [(s.sha256, s.weight, s.whole) for s in sources] or named not in (None, names):
        how = "give the same --data in the same order, and --whole with the same of them"
        raise KpError(f"the run in {run} began with other data or weights; {how}")
    made_by = _made_by()
    return stored if made_by.items() <= stored.items() else stored | {"resumed_by": made_by}


def check_known(run: Path, began: dict[str, Any], kind: type[TrainConfig | DetectorConfig]) -> None:
    """Refuses a run with settings that this release does not have, and so could not go on by.

    Raises:
        KpError: it has one.
    """
    if newer := sorted(began.keys() - {field.name for field in dataclasses.fields(kind)}):
        raise KpError(f"the run in {run} was begun by a newer kp (its setting {newer[0]!r:.80}); go on with that one")


def check_licence(run: Path, record: dict[str, Any], licence: Mapping[str, str]) -> None:
    """Refuses to go on with a run under other terms than it began with; none leave them to its record.

    Raises:
        KpError: these are others.
    """
    if licence and licence != (began := record["start"].get("licence", {})):
        raise KpError(f"the run in {run} began with the licence {began or 'of nothing'}; leave --licence out")


def ancestry(training: dict[str, Any]) -> list[dict[str, Any]]:
    """A model's record and those of what it began at and of its teachers, the newest first and none within another.

    So a manifest does not get deeper with each `--init`; a release that nested them is read too. Of a teacher's runs
    there is what `people_seen` leaves of them.
    """
    own, older = dict(training), []
    if isinstance(start := training.get("start"), dict):
        own["start"] = {key: value for key, value in start.items() if key not in ("training", "before")}
        older += [start.get("training"), *_listed(start.get("before"))]
    if teachers := [each for each in _listed(training.get("teachers")) if isinstance(each, dict)]:
        own["teachers"] = [{key: value for key, value in each.items() if key != "runs"} for each in teachers]
        older += [run for each in teachers for run in _listed(each.get("runs"))]
    return [own, *(entry for record in older if isinstance(record, dict) for entry in ancestry(record))]


def people_seen(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What these runs' records say of whom they saw and held out, and nothing else; no two alike."""
    kept: list[dict[str, Any]] = []
    for record in records:
        sources = [{"sha256": each["sha256"], "whole": each.get("whole", False)} for each in recorded_sources(record)]
        seen = {"sources": sources, "held_out": {"val_fraction": recorded_fraction(record)}}
        if seen not in kept:
            kept.append(seen)
    return kept


def least_held_out(records: Sequence[dict[str, Any]]) -> float:
    """The share of people whom none of these runs of a model's `ancestry` saw; 0 where one does not say."""
    return min(recorded_fraction(record) or 0.0 for record in records)


def recorded_sources(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run's record says of each source that it read, those without a hash left out."""
    every = [each for each in _listed(record.get("sources")) if isinstance(each, dict)]
    return [each for each in every if isinstance(each.get("sha256"), str)]


def learned_whole(sources: Sequence[Source], records: Sequence[dict[str, Any]]) -> list[Source]:
    """The sources, those as `whole` of which one of these runs may have seen people that the rule holds out.

    That is a source that a run learned whole, and one that it did not read at all: its people may be the same.
    """
    seen = [{each.get("sha256"): each.get("whole", False) for each in recorded_sources(record)} for record in records]
    of_whole = [run for run in seen if any(run.values())]
    return [dataclasses.replace(s, whole=any(run.get(s.sha256, True) for run in of_whole)) for s in sources]


def may_have_seen(records: Sequence[dict[str, Any]], sources: Sequence[Source], fraction: float) -> bool:
    """Whether one of these runs may have seen people whom another one holds out: that `fraction` of these sources'."""
    known = learned_whole(sources, records)
    return least_held_out(records) < fraction or any(
        one.whole and not source.whole for one, source in zip(known, sources, strict=True)
    )


def unseen_fraction(manifest: Manifest) -> float:
    """The share of people to judge a model by: whom no run that led to it saw.

    Where a run before the last one does not say, whom the last one held out has to do.

    Raises:
        DataError: the last one does not say either.
    """
    return least_held_out(ancestry(manifest.training)) or held_out_fraction(manifest)


def _listed(value: Any) -> list[Any]:
    """What a record has in a list, which may be anything in a file that was changed by hand."""
    return value if isinstance(value, list) else []


def sha256_of_names(names: Iterable[str]) -> str:
    """One hash of the names of photos, in whatever order: whether they are the same, without saying whose they are."""
    return hashlib.sha256("\n".join(sorted(names)).encode(errors="replace")).hexdigest()


def _made_by() -> dict[str, Any]:
    """What code trains here."""
    import lightning as L  # the rest of a record is read without these
    import torch
    import torchvision

    return {
        "git_revision": git_revision(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "lightning": L.__version__,
        },
    }
