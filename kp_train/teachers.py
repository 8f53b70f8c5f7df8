"""Trained models that a run learns from: its targets are the mean of a label and of what they say of the same crop.

A label is off by chance, from its grid or from who made it, and so is a model; models of other training err otherwise.
The mean of them all is nearer to what the next label of such a face would be than the label alone (Hinton, Vinyals and
Dean 2015, distillation). So is the mean of what a model says of a face and of its mirror image: where a run mirrors
faces, its teachers look from both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kp_runtime.errors import InputError
from kp_runtime.spec import ModelSpec
from kp_train.checkpoint import CHECKPOINT_NAME, load_checkpoint
from kp_train.label_bias import answers_of_both_sides
from kp_train.model import KeypointNet

__all__ = ["Teachers", "load_teachers", "reduced"]


@dataclass(frozen=True)
class Teachers:
    """Models in evaluation mode, none of whose weights move.

    Attributes:
        nets: the models.
        weights: how much the answers of each count, where the label counts 1.
        records: of each, its name, the sha256 of its checkpoint and its weight.
        licences: of each, what its manifest says.
        size: side of the crops that all sides are reduced from, in pixels.
        order: of a mirrored face's points, as in `MirrorFace`; None looks from one side.
        side: `(2 * points, 2 * points)` float32, see `from_both_sides`.
    """

    nets: tuple[KeypointNet, ...]
    weights: tuple[float, ...]
    records: tuple[dict[str, Any], ...]
    licences: tuple[dict[str, str], ...]
    size: int
    order: NDArray[np.intp] | None = None
    side: Tensor | None = None

    def from_both_sides(self, order: NDArray[np.intp] | None, biases: Sequence[NDArray[np.float64] | None]) -> Teachers:
        """The same models, whose answers are means over a face and its mirror image.

        The labels' side, which that mean does not know, is put back: of half the difference between both answers, the
        part that is a sum of the labels' biases, by least squares. So nothing has to tell whose labels a face has.

        Args:
            order: of a mirrored face's points, as in `MirrorFace`; None looks from one side.
            biases: of each source, see `measured_bias`.
        """
        known = [torch.from_numpy(bias).flatten() for bias in biases if bias is not None]
        columns = torch.stack(known, dim=1) if known else torch.zeros(2 * self.nets[0].points, 0, dtype=torch.float64)
        side = (columns @ torch.linalg.pinv(columns)).float()
        return dataclasses.replace(self, order=order, side=side)

    @torch.no_grad()
    def target(self, crops: Tensor, target: Tensor) -> Tensor:
        """The mean of the labels' target and the models' answers, `(n, 2 * points)` float32.

        Args:
            crops: `(n, 1, size, size)` uint8.
            target: `(n, 2 * points)`, the labels as `KeypointNet.encode` gives them, which is the same for all sizes.
        """
        total = target
        for net, weight in zip(self.nets, self.weights, strict=True):
            total = total + weight * self._answer(net.to(crops.device), reduced(crops, net.size))
        return total / (1 + sum(self.weights))

    def _answer(self, net: KeypointNet, crops: Tensor) -> Tensor:
        if self.order is None or self.side is None:
            return net.raw(crops).float()
        plain, mirrored = answers_of_both_sides(net, crops, self.order)
        bias = ((plain - mirrored) / 2).flatten(1) @ self.side.to(crops.device)
        return net.encode((plain + mirrored) / 2 + bias.reshape(plain.shape))


def reduced(crops: Tensor, size: int) -> Tensor:
    """Uint8 crops `(n, 1, side, side)` as their means, `(n, 1, size, size)` uint8; as they are where they fit."""
    side = crops.shape[-1]
    return crops if side == size else F.avg_pool2d(crops.float(), side // size).round().to(torch.uint8)


def load_teachers(teachers: Sequence[tuple[Path, float]], spec: ModelSpec) -> Teachers:
    """Opens the models that a run of this contract is to learn from.

    Args:
        teachers: their bundles, or checkpoints, and how much each counts, where the label counts 1.
        spec: the run's contract; theirs may differ from it in name and size alone.

    Raises:
        BundleError, IntegrityError: no checkpoint there.
        InputError: a model of another contract, or a size that does not divide the largest.
    """
    loaded = [load_checkpoint(path) for path, _ in teachers]
    weights = tuple(weight for _, weight in teachers)
    for (path, _), (_, manifest) in zip(teachers, loaded, strict=True):
        for what in ("points", "scheme", "box", "margin"):
            if (theirs := getattr(manifest.spec, what)) != (ours := getattr(spec, what)):
                raise InputError(f"{path} can't teach this run: it has {what} {theirs}, the run {ours}")
    sizes = [spec.size, *(net.size for net, _ in loaded)]
    size = max(sizes)
    if odd := [side for side in sizes if size % side]:
        raise InputError(f"crops of {size} pixels can't be reduced to {odd[0]}; take teachers of sizes that divide it")
    return Teachers(
        nets=tuple(net.eval().to(memory_format=torch.channels_last).requires_grad_(False) for net, _ in loaded),
        weights=weights,
        records=tuple(
            {"name": manifest.spec.name, "sha256": manifest.files[CHECKPOINT_NAME].sha256, "weight": weight}
            for (_, manifest), weight in zip(loaded, weights, strict=True)
        ),
        licences=tuple(manifest.licence for _, manifest in loaded),
        size=size,
    )
