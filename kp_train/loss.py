"""The training loss, in units of the training target (50 px of a 224 px crop)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["keypoint_loss"]


def keypoint_loss(raw: Tensor, target: Tensor, beta: float) -> Tensor:
    """SmoothL1 (Girshick 2015), its quadratic part `beta` wide, divided so that far from zero
    it grows like the plain distance whatever `beta`; the mean over `(n, 136)`.

    `beta=1` is the original project's loss.
    """
    return F.smooth_l1_loss(raw.float(), target, beta=beta)
