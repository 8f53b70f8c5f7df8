"""The face detector's network and its loss: one class, no anchors.

Every cell of an 8 px grid says how sure it is of a face around it, and how far the face's box reaches to its four
sides (as FCOS, Tian et al. 2019). The score is trained towards the overlap that the cell's own box has with the true
one (generalised focal loss, Li et al. 2020, eq. 3), so that of many boxes the best placed has the highest.

Cell `(row, column)` lies at pixel `(8 column, 8 row)`: images of any size go in without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

__all__ = ["LEAST_PX", "MOST_PX", "STRIDE", "ConvLayer", "DetectorNet", "detector_loss"]

STRIDE = 8
LEAST_PX, MOST_PX = 22.0, 72.0
"""Longer sides of the boxes that the network is to find; the run-time shows it an image at several sizes."""

_UNIT_PX = 16.0
_INNER, _OUTER = 0.2, 0.4
"""Cells so near to the centre, in sides of the box, are of the face; up to the outer one they are left alone."""
_DOUBT = 0.6
"""Far from the labelled face of a photo, what scores higher may be another face and is left alone."""


class DetectorNet(nn.Module):
    """Nine convolutions, 123 thousand parameters; a cell sees 95 x 95 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvLayer(1, 16, stride=2),
            ConvLayer(16, 32, stride=2),
            ConvLayer(32, 48, stride=2),
            *[ConvLayer(48, 48) for _ in range(5)],
        )
        self.head = nn.Conv2d(48, 5, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        # no cell begins with a face, and each box with 32 px
        self.head.bias = nn.Parameter(torch.tensor([-4.0, 0.0, 0.0, 0.0, 0.0]))

    def forward(self, images: Tensor) -> Tensor:
        """Images `(n, 1, h, w)` uint8 to cells `(n, 5, rows, columns)` float32.

        A cell is its score, 0 to 1, and the distances to the box's left, top, right and lower side in pixels.
        """
        raw = self.raw(images)
        return torch.cat([raw[:, :1].sigmoid(), self.distances(raw)], dim=1)

    def raw(self, images: Tensor) -> Tensor:
        """The head's numbers, `(n, 5, rows, columns)`."""
        x = (images.to(self.head.weight.dtype) - 127.5) / 64
        raw: Tensor = self.head(self.body(x))
        return raw

    @staticmethod
    def distances(raw: Tensor) -> Tensor:
        """Distances in pixels, `(n, 4, rows, columns)`, of the head's numbers."""
        return raw[:, 1:].clamp(-4, 3).exp() * _UNIT_PX


class ConvLayer(nn.Module):
    """A 3 x 3 convolution with batch norm and ReLU; around it, where sizes allow, the input is added."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Features `(n, channels, h, w)` to features; their sides halved, rounded up, where the stride is 2."""
        y = self.norm(self.conv(x))
        return F.relu(x + y if self.adds else y)


def _cell_centres(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The cells' places in pixels: x `(1, columns)` and y `(rows, 1)`."""
    return torch.arange(columns)[None] * float(STRIDE), torch.arange(rows)[:, None] * float(STRIDE)


def detector_loss(raw: Tensor, boxes_xyxy: Tensor, clean: Tensor, doubt: bool) -> Tensor:
    """The loss of a batch: quality focal loss of the scores, and generalised IoU of the boxes.

    Args:
        raw: `(n, 5, rows, columns)`, the head's numbers.
        boxes_xyxy: `(n, 4)`, pixels of the image; NaN where it holds no labelled face.
        clean: `(n,)` bool, whether the image holds no other face.
        doubt: leave those cells alone that may be another face's, once the network knows what a face is.
    """
    xs, ys = _cell_centres(*raw.shape[2:])
    x0, y0, x1, y1 = (side[:, None, None] for side in boxes_xyxy.unbind(1))
    width, height = x1 - x0, y1 - y0
    longer = torch.maximum(width, height)
    across, down = ((2 * xs - x0 - x1) / 2).abs(), ((2 * ys - y0 - y1) / 2).abs()

    def within(share: float) -> Tensor:
        # at least one cell is nearer than half a stride; nothing is near a box of NaN
        least = STRIDE / 2 + 0.01
        return (across <= (share * width).clamp(min=least)) & (down <= (share * height).clamp(min=least))

    face = within(_INNER) & (longer >= LEAST_PX) & (longer <= MOST_PX)
    alone = within(_OUTER) & ~face & (longer < 1.3 * MOST_PX)
    scores = raw[:, 0].sigmoid()
    if doubt:
        alone |= (scores > _DOUBT) & ~within(1.5) & ~clean[:, None, None]

    left, top, right, low = DetectorNet.distances(raw).unbind(1)
    found = torch.stack([xs - left, ys - top, xs + right, ys + low], dim=-1)[face]
    image = face.nonzero()[:, 0]
    misfit = generalized_box_iou_loss(found, boxes_xyxy[image])
    target = torch.zeros_like(scores)
    target[face] = (1 - misfit.detach()).clamp(0, 1)
    focal = (target - scores.detach()).abs() ** 2
    error = F.binary_cross_entropy_with_logits(raw[:, 0], target, reduction="none")
    faces = face.flatten(1).sum(dim=1)
    # each face counts once in the boxes' loss, however many cells it has
    placed = (misfit / faces[image]).sum()
    count = (faces > 0).sum().clamp(min=1)
    loss: Tensor = ((focal * error)[~alone].sum() + 2 * placed) / count
    return loss
