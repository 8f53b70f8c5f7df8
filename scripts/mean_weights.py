"""Averages the weights of models that were trained on from one start, into a model that is often better than each.

    python scripts/mean_weights.py RUN RUN … --out MEAN

Each RUN is a bundle with a checkpoint. Runs with other augmentation, rate or seed err otherwise, and as long as they
began at the same weights their mean answers much like the mean of their answers (Wortsman et al. 2022, model soups), at
the cost of one. `kp refit MEAN` comes next: it fits the last layer to the new features.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kp_cli.report import one_line_errors
from kp_runtime.errors import InputError
from kp_runtime.manifest import Manifest
from kp_train.checkpoint import CHECKPOINT_NAME, check_no_bundle, load_checkpoint, save_checkpoint
from kp_train.data import held_out_fraction
from kp_train.model import KeypointNet
from kp_train.run_record import ancestry, least_held_out, recorded_sources

STARTS = ("checkpoint_sha256", "start_sha256")
"""What a record calls the checkpoint that something began at."""


def mean_of(runs: Sequence[Path]) -> tuple[KeypointNet, Manifest]:
    """The mean of the weights, batch norm's statistics among them.

    Args:
        runs: bundles with a checkpoint, two or more.

    Returns:
        The network, and the manifest of the run that learned most sources whole, of the first of these, with a record
        of the others (`training["mean_of"]`). Lost scores are left out: `kp refit` solves one for the mean.

    Raises:
        BundleError, IntegrityError: no checkpoint there.
        DataError: a manifest does not say who was held out.
        InputError: the runs differ in contract, network, held-out people or licence, or have no start in common.
    """
    loaded = [load_checkpoint(run) for run in runs]
    at = max(range(len(runs)), key=lambda i: len(_whole(loaded[i][1])))
    first, manifest = loaded[at]
    net = KeypointNet(first.size, first.reduce, first.points)
    spec = replace(manifest.spec, lost_limit=None)
    for run, (other, theirs) in zip(runs, loaded, strict=True):
        differ = {
            "contract": replace(theirs.spec, lost_limit=None) != spec,
            "reduce": other.reduce != net.reduce,
            "held-out people": _held_out(theirs) != _held_out(manifest) or not _whole(theirs) <= _whole(manifest),
            "licence": theirs.licence != manifest.licence,
        }
        if odd := [what for what, is_so in differ.items() if is_so]:
            raise InputError(f"{run} and {runs[at]} differ ({', '.join(odd)}); take runs of one model")
        if not set(_lineage(theirs)) & set(_lineage(manifest)):
            raise InputError(f"{run} and {runs[at]} did not begin at the same weights: their mean would be of no use")
    states = [other.state_dict() for other, _ in loaded]
    mean = {name: torch.stack([s[name].double() for s in states]).mean(dim=0).to(value.dtype)
            for name, value in net.state_dict().items()}  # fmt: skip
    net.load_state_dict(mean)
    training = {key: value for key, value in manifest.training.items() if key not in ("refit", "lost_score")}
    record = {"mean_of": [_told(theirs) for _, theirs in loaded]}
    return net, Manifest(spec, training=training | record, licence=manifest.licence)


def _held_out(manifest: Manifest) -> tuple[float, float]:
    """The shares of people whom its last run held out, and whom all runs before it did, too."""
    return held_out_fraction(manifest), least_held_out(ancestry(manifest.training))


def _whole(manifest: Manifest) -> set[Any]:
    """The sha256 of the sources of which a run that led to it held out nobody."""
    sources = (each for record in ancestry(manifest.training) for each in recorded_sources(record))
    return {each.get("sha256") for each in sources if each.get("whole")}


def _lineage(manifest: Manifest) -> Iterator[str]:
    """The checkpoint's own hash, and those of what it began at, back to the first one."""
    yield manifest.files[CHECKPOINT_NAME].sha256
    records: list[Any] = [manifest.training]
    while records:
        record = records.pop()
        if isinstance(record, dict):
            yield from (record[key] for key in STARTS if isinstance(record.get(key), str))
            records += record.values()
        elif isinstance(record, list):
            records += record


def _told(manifest: Manifest) -> dict[str, Any]:
    """A run's record without the record of what it began at, which the mean has from the first."""
    training = manifest.training
    start = {key: value for key, value in training.get("start", {}).items() if key not in ("training", "before")}
    return {"sha256": manifest.files[CHECKPOINT_NAME].sha256, **training, "start": start}


def main() -> None:
    """Writes the mean as a run of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if len(args.runs) < 2:
        raise InputError("a mean takes two runs or more")
    check_no_bundle(args.out)
    save_checkpoint(args.out, *mean_of(args.runs))
    print(f"mean of {len(args.runs)} runs: {args.out}\nnext: kp refit {args.out} --data DATA --out {args.out}-refitted")


if __name__ == "__main__":
    with one_line_errors("mean_weights"):
        main()
