"""Trained models that a run learns from: its targets are the mean of a label and of what they say of the same crop.

A label is off by chance, from its grid or from who made it, and so is a model; models of other training err otherwise.
The mean of them all is nearer to what the next label of such a face would be than the label alone (Hinton, Vinyals and
Dean 2015, distillation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kp_runtime.errors import InputError
from kp_runtime.spec import ModelSpec
from kp_train.checkpoint import CHECKPOINT_NAME, load_checkpoint
from kp_train.model import KeypointNet
from kp_train.run_record import ancestry, people_seen

__all__ = ["Teachers", "load_teachers", "reduced"]


@dataclass(frozen=True)
class Teachers:
    """Models in evaluation mode, none of whose weights move.

    Attributes:
        nets: the models.
        records: of each, its name, the sha256 of its checkpoint, and as `runs` whom the runs that led to it saw, as
            `people_seen` gives it.
        licences: of each, what its manifest says.
        size: side of the crops that all sides are reduced from, in pixels.
    """

    nets: tuple[KeypointNet, ...]
    records: tuple[dict[str, Any], ...]
    licences: tuple[dict[str, str], ...]
    size: int

    @torch.no_grad()
    def target(self, crops: Tensor, target: Tensor) -> Tensor:
        """The mean of the labels' target and the models' answers, `(n, 2 * points)` float32.

        Args:
            crops: `(n, 1, size, size)` uint8.
            target: `(n, 2 * points)`, the labels as `KeypointNet.encode` gives them, which is the same for all sizes.
        """
        answers = [net.to(crops.device).raw(reduced(crops, net.size)).float() for net in self.nets]
        return torch.stack([target, *answers]).mean(dim=0)


def reduced(crops: Tensor, size: int) -> Tensor:
    """Uint8 crops `(n, 1, side, side)` as their means, `(n, 1, size, size)` uint8; as they are where they fit."""
    side = crops.shape[-1]
    return crops if side == size else F.avg_pool2d(crops.float(), side // size).round().to(torch.uint8)


def load_teachers(paths: Sequence[Path], spec: ModelSpec) -> Teachers:
    """Opens the models that a run of this contract is to learn from.

    Args:
        paths: their bundles, or checkpoints.
        spec: the run's contract; theirs may differ from it in name and size alone.

    Raises:
        BundleError, IntegrityError: no checkpoint there.
        InputError: a model of another contract, or a size that does not divide the largest.
    """
    loaded = [load_checkpoint(path) for path in paths]
    for path, (_, manifest) in zip(paths, loaded, strict=True):
        for what in ("points", "box", "margin"):
            if (theirs := getattr(manifest.spec, what)) != (ours := getattr(spec, what)):
                raise InputError(f"{path} can't teach this run: it has {what} {theirs}, the run {ours}")
    sizes = [spec.size, *(net.size for net, _ in loaded)]
    size = max(sizes)
    if odd := [side for side in sizes if size % side]:
        raise InputError(f"crops of {size} pixels can't be reduced to {odd[0]}; take teachers of sizes that divide it")
    return Teachers(
        nets=tuple(net.eval().to(memory_format=torch.channels_last).requires_grad_(False) for net, _ in loaded),
        records=tuple(
            {
                "name": manifest.spec.name,
                "sha256": manifest.files[CHECKPOINT_NAME].sha256,
                "runs": people_seen(ancestry(manifest.training)),
            }
            for _, manifest in loaded
        ),
        licences=tuple(manifest.licence for _, manifest in loaded),
        size=size,
    )
