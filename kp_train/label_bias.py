"""How far a data set's labels lie to one side of what they name.

Labels that a machine made, or that were counted from another corner of the pixel, may sit to one side on every face.
Turned over with the face they would sit to the other side: the network would be taught two answers to one picture,
and learn the mean of both. So a varied face gets its labels varied about where they belong, and moved to their own
side again.

What tells the bias is a network that is looked through from both sides: the mean of what it says of a face and of the
mirrored face knows no side, so what the labels have more of is theirs. That holds for faces that it was not trained
on. Of the others it may know the labels by heart, from both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kp_runtime.spec import ModelSpec
from kp_train.data import Face, FaceDataset
from kp_train.model import KeypointNet

__all__ = ["measured_bias", "with_bias"]

_BATCH = 64
_SURE = 3  # standard errors from zero under which a bias may be chance


@torch.inference_mode()
def measured_bias(net: KeypointNet, faces: Sequence[Face], spec: ModelSpec, order: NDArray[np.intp]) -> float:
    """How far the labels of one source lie to the right, in sides of the plain crop (to the left: under 0).

    Args:
        net: a network that was trained for these points, and not on these faces.
        faces: labelled faces of the source.
        spec: the network's contract.
        order: of a mirrored face's points, as in `MirrorFace`.

    Returns:
        The median over the faces, to four places; 0 where it can't be told from chance, as of fewer than eight.
    """
    if len(faces) < 8:
        return 0.0
    shown, partner = FaceDataset(with_bias(faces, 0.0), spec), torch.from_numpy(order.copy())
    was_training, found = net.training, []
    net.eval()
    for start in range(0, len(shown), _BATCH):
        crops, xy = zip(*(shown[i] for i in range(start, min(start + _BATCH, len(shown)))), strict=True)
        seen = torch.stack(crops)
        plain, mirrored = net(seen)[..., 0], spec.size - 1 - net(seen.flip(-1))[:, partner, 0]
        found.append((torch.stack(xy)[..., 0] - (plain + mirrored) / 2).mean(dim=1) / spec.size)
    net.train(was_training)
    each = torch.cat(found)
    bias = float(each.median())
    return round(bias, 4) if abs(bias) > _SURE * float(each.std()) / len(each) ** 0.5 else 0.0


def with_bias(faces: Sequence[Face], bias: float) -> list[Face]:
    """The same faces, their labels known to lie that far to the right."""
    return [dataclasses.replace(face, bias=bias) for face in faces]
