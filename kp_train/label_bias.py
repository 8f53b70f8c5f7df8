"""How far a data set's labels lie to one side of what they name.

Labels that a machine made, or that were counted from another corner of the pixel, may sit to one side on every face,
or be turned a little. Mirrored with the face they would sit to the other side: the network would be taught two answers
to one picture, and learn the mean of both. So a varied face gets its labels varied about where they belong, and moved
to their own side again.

What tells the bias is a network that is looked through from both sides: the mean of what it says of a face and of the
mirrored face knows no side, so what the labels have more of, and do not have mirrored on the face's other half, is
theirs. That holds for faces that it was not trained on. Of the others it may know the labels by heart, from both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kp_runtime.spec import ModelSpec
from kp_train.bar import Bar, no_bar
from kp_train.data import Face, Source, held_out_of
from kp_train.dataset import FaceDataset
from kp_train.metrics import FEWEST_PEOPLE
from kp_train.model import KeypointNet
from kp_train.run_record import recorded_sources

__all__ = ["bias_of", "from_both_sides", "measured_bias", "noted_bias", "source_biases", "with_bias"]

_BATCH = 64
_SURE = 3  # standard errors from zero under which the points' mean may be chance


@torch.inference_mode()
def from_both_sides(
    net: KeypointNet,
    faces: Sequence[Face],
    spec: ModelSpec,
    order: NDArray[np.intp],
    bar: Bar = no_bar,
) -> tuple[Tensor, Tensor]:
    """Looks at faces and at their mirror images, in the plain crops of their labels.

    Args:
        net: the network.
        faces: labelled faces.
        spec: its contract.
        order: of a mirrored face's points, as in `MirrorFace`.
        bar: wraps the loop over batches.

    Returns:
        The labels, and the mean of what the network says of the face and of its mirror image; each `(n, points, 2)`
        float64, in sides of the plain crop.
    """
    shown, partner = FaceDataset(with_bias(faces, None), spec), torch.from_numpy(order.copy())
    was_training, labels, means = net.training, [], []
    net.eval()
    for start in bar(range(0, len(shown), _BATCH)):
        crops, xy = zip(*(shown[i] for i in range(start, min(start + _BATCH, len(shown)))), strict=True)
        seen = torch.stack(crops)
        plain, mirrored = net(seen), net(seen.flip(-1))[:, partner]
        mirrored[..., 0] = spec.size - 1 - mirrored[..., 0]
        labels.append(torch.stack(xy))
        means.append((plain + mirrored) / 2)
    net.train(was_training)
    return torch.cat(labels).double() / spec.size, torch.cat(means).double() / spec.size


def measured_bias(
    net: KeypointNet,
    faces: Sequence[Face],
    spec: ModelSpec,
    order: NDArray[np.intp],
    bar: Bar = no_bar,
) -> NDArray[np.float64] | None:
    """How far the labels of one source lie from what they name, to the right and down, in sides of the plain crop.

    Args:
        net: a network that was trained for these points, and not on these faces.
        faces: labelled faces of the source.
        spec: the network's contract.
        order: of a mirrored face's points, as in `MirrorFace`.
        bar: wraps the loop over batches.

    Returns:
        `(points, 2)` float64 to four places, of each point the median over the faces; None where the points'
        mean can't be told from chance, as of fewer than eight people: what is odd about one of them is so on all of
        the person's frames.
    """
    people = [face.person for face in faces]
    if len(set(people)) < FEWEST_PEOPLE:
        return None
    labels, seen = from_both_sides(net, faces, spec, order, bar)
    return bias_of(labels - seen, people, order)


def bias_of(off: Tensor, people: Sequence[str], order: NDArray[np.intp]) -> NDArray[np.float64] | None:
    """The bias of labels that lie `off` `(n, points, 2)` from what is seen from both sides of people's faces.

    See `measured_bias`.
    """
    _, person = np.unique(people, return_inverse=True)
    sideways = np.bincount(person, off[..., 0].mean(dim=1).numpy()) / np.bincount(person)
    if len(sideways) < FEWEST_PEOPLE or abs(sideways.mean()) <= _SURE * sideways.std(ddof=1) / len(sideways) ** 0.5:
        return None
    bias = np.median(off.numpy(), axis=0)  # torch's is the lower of two middle ones
    return np.asarray((bias - bias[order] * [-1, 1]) / 2).round(4)


def source_biases(
    net: KeypointNet,
    sources: Sequence[Source],
    fraction: float,
    spec: ModelSpec,
    order: NDArray[np.intp] | None,
    records: Sequence[dict[str, Any]] = (),
    bar: Bar = no_bar,
) -> list[NDArray[np.float64] | None]:
    """`measured_bias` of each source, by the held-out `fraction` of its people; None where no face is mirrored.

    Of a source of which nobody is held out it is what the newest of the `records` of runs says that it is.
    """
    if order is None:
        return [None] * len(sources)
    return [
        noted_bias(records, source)
        if source.whole
        else measured_bias(net, held_out_of([source], fraction), spec, order, bar)
        for source in sources
    ]


def noted_bias(records: Sequence[dict[str, Any]], source: Source) -> NDArray[np.float64] | None:
    """The bias of a source's labels as the newest of these runs that knew one recorded it."""
    told = (each for record in records for each in recorded_sources(record) if each.get("sha256") == source.sha256)
    noted = next((each["label_bias"] for each in told if each.get("label_bias")), None)
    return None if noted is None else np.array(noted)


def with_bias(faces: Sequence[Face], bias: NDArray[np.float64] | None) -> list[Face]:
    """The same faces, their labels known to lie that far from what they name."""
    return [dataclasses.replace(face, bias=bias) for face in faces]
