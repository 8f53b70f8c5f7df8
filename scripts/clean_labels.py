"""Moves labels of faces towards what a trained model sees, for the training of another model.

    python scripts/clean_labels.py MODEL DATA … --out cleaned [--share 0.5]

MODEL is a bundle with a checkpoint, DATA as for `kp train`. Each source becomes `cleaned/NAME.csv`, for `kp train
--data`: labels moved by `--share` of the way to the mean of what the model says of the face and of its mirror image,
moved to the labels' own side (`kp_train/label_bias.py`). The share 1 is plain distillation (Hinton et al. 2015). People
whom the model was not trained on keep their labels: they judge, and they tell the bias. The faces where labels and
model differ most are printed: labels that went wrong are among them.
"""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from kp_cli.report import one_line_errors
from kp_runtime.errors import InputError
from kp_runtime.files import make_folder
from kp_runtime.geometry import boxes_from_points
from kp_runtime.interchange import faces_to_file
from kp_runtime.labelled_face import LabelledFace
from kp_runtime.spec import ModelSpec
from kp_train.augment import mirror_from_pairs
from kp_train.checkpoint import load_checkpoint
from kp_train.data import Source, is_held_out, read_source
from kp_train.label_bias import bias_of, from_both_sides, noted_bias
from kp_train.metrics import nme_unit
from kp_train.model import KeypointNet
from kp_train.refit import training_config
from kp_train.run_record import ancestry, learned_whole, unseen_fraction

FARTHEST = 10


@dataclass(frozen=True)
class Cleaned:
    """The labels of one source, cleaned.

    Attributes:
        xy: `(n, points, 2)` float64, pixels of the images.
        off: how far each face's labels were from what the model sees, `(n,)` float64, mean over the points, a fraction
            of the unit of its NME.
        kept: whose labels were kept, because the person was held out, `(n,)` bool.
    """

    xy: NDArray[np.float64]
    off: NDArray[np.float64]
    kept: NDArray[np.bool_]


def cleaned(
    net: KeypointNet,
    spec: ModelSpec,
    source: Source,
    fraction: float,
    order: NDArray[np.intp],
    share: float,
    noted: NDArray[np.float64] | None = None,
) -> Cleaned:
    """Moves a source's labels.

    Args:
        net: the trained network, of face crops.
        spec: its contract.
        source: labelled faces.
        fraction: of the people who were held out when it was trained.
        order: of a mirrored face's points, as in `kp_train.augment.MirrorFace`.
        share: how much of the way: 0.5 to the mean of labels and network, 1 to the network's.
        noted: the labels' bias where the source is whole, so that nobody is held out who could tell it.
    """
    people = np.array([face.person for face in source.faces])
    kept = np.array([not source.whole and is_held_out(person, fraction) for person in people])
    labels, seen = from_both_sides(net, source.faces, spec, order, lambda batches: track(batches, source.path.stem))
    bias = noted if source.whole else bias_of((labels - seen)[kept], people[kept].tolist(), order)
    change = (seen - labels).numpy() + (0 if bias is None else bias)
    xy = np.stack([face.xy for face in source.faces]).astype(np.float64)
    boxes = np.stack([boxes_from_points(points) for points in xy])
    change *= spec.margin * (boxes[:, 2:] - boxes[:, :2]).max(axis=1)[:, None, None]  # sides of the crop to pixels
    off = np.linalg.norm(change, axis=-1).mean(axis=1) / nme_unit(xy)
    xy[~kept] += share * change[~kept]
    return Cleaned(xy, off, kept)


def main() -> None:
    """Cleans the sources and says where labels and model differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", nargs="+", type=Path, help="as kp train --data takes them, without weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.5, help="of the way to the model's points (%(default)s)")
    args = parser.parse_args()
    if not 0 < args.share <= 1:
        raise InputError(f"--share must be over 0 and at most 1, got {args.share:g}")
    net, manifest = load_checkpoint(args.model)
    spec, fraction = manifest.spec, unseen_fraction(manifest)
    order = mirror_from_pairs(training_config(manifest).get("pairs", ""), spec.points)
    if spec.box != "keypoints" or order is None:
        raise InputError(f"{args.model} can't clean labels: that takes a model of face crops whose pairs are known")
    sources = [read_source(path, points=spec.points) for path in args.data]
    places = [path.resolve() for path in args.data]
    files = [args.out / f"{place.stem if place.is_file() else place.name}.csv" for place in places]
    if there := [file for file in files if file.exists() or files.count(file) > 1]:
        raise InputError(f"{there[0]} is already there or would be written twice; name another folder with --out")
    make_folder(args.out)
    runs = ancestry(manifest.training)
    for source, file in zip(learned_whole(sources, runs), files, strict=True):
        done = cleaned(net, spec, source, fraction, order, args.share, noted_bias(runs, source))
        places = [face.image.parent.resolve() / face.image.name for face in source.faces]  # a link's name is the person
        names = [os.path.relpath(place, file.parent.resolve()) for place in places]
        faces_to_file([LabelledFace(name, xy) for name, xy in zip(names, done.xy, strict=True)], file)
        print(f"{file}: {_told('moved', done.off[~done.kept])}, {_told('kept', done.off[done.kept])}")
        for i in np.argsort(-done.off)[:FARTHEST]:
            print(f"  {done.off[i]:7.2%}  {source.faces[i].image}{' (held out)' if done.kept[i] else ''}")
    if manifest.licence:
        print(f"what is trained on these labels learns from {args.model} and stays under its licence:")
        print(" ".join(f"--licence {shlex.quote(f'{what}={terms}')}" for what, terms in manifest.licence.items()))


def _told(what: str, off: NDArray[np.float64]) -> str:
    return f"{len(off)} faces' labels {what}" + (f", NME {off.mean():.2%}" if len(off) else "")


if __name__ == "__main__":
    with one_line_errors("clean_labels"):
        main()
