"""The network: torchvision's ResNet-18 with one grey channel in and two numbers a point out, 136 for the 68.

`KeypointNet` maps uint8 crops to keypoints in pixels of the crop; normalising (÷ 255) and
decoding are part of it, so an exported file has both inside. The head's numbers are the
original project's training target, (pixel − 100) / 50 of a 224 px crop, whatever the crop's
size: the same head serves 112 and 224.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import ResNet18_Weights, resnet18

from kp_runtime.errors import KpError
from kp_runtime.files import sha256_of_file
from kp_runtime.labelled_face import as_text
from kp_runtime.scheme68 import POINTS

__all__ = ["KeypointNet", "load_backbone_weights"]

log = logging.getLogger(__name__)

OFFSET, UNIT, REFERENCE_SIZE = 100.0, 50.0, 224
_GREY_STD = 0.226  # mean of the three channels' deviations that ImageNet networks divide by


class KeypointNet(nn.Module):
    """ResNet-18 (He et al. 2016) from uint8 crops to keypoints.

    Args:
        size: side of the crops in pixels.
        reduce: the backbone sees means of `reduce` x `reduce` pixels: 2 makes a 224 px crop cost
            what a 112 px one does.
        points: how many it finds.
        scores: whether it also says if a face is lost, by a second linear layer on what the last one reads.
    """

    def __init__(
        self, size: int = REFERENCE_SIZE, reduce: int = 1, points: int = POINTS, *, scores: bool = False
    ) -> None:
        super().__init__()
        self.size, self.reduce, self.points = size, reduce, points
        self.backbone = resnet18(num_classes=2 * points, zero_init_residual=True)
        self.backbone.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.scores = scores
        if scores:
            self.backbone.lost_score = nn.Linear(self.backbone.fc.in_features, 1)

    def forward(self, crops: Tensor) -> Tensor:
        """Crops `(n, 1, size, size)` uint8 to keypoints `(n, points, 2)` float32, pixels of the crop."""
        return self.decode(self.raw(crops))

    def outputs(self, crops: Tensor) -> tuple[Tensor, ...]:
        """Keypoints as of `forward`, and the lost scores `(n, 1)` where it has them: see `ModelSpec.outputs`."""
        features = self.features(crops)
        keypoints = self.decode(self.backbone.fc(features))
        return (keypoints, self.backbone.lost_score(features)) if self.scores else (keypoints,)

    def raw(self, crops: Tensor) -> Tensor:
        """The head's numbers, `(n, 2 * points)`, in units of the training target."""
        raw: Tensor = self.backbone.fc(self.features(crops))
        return raw

    def features(self, crops: Tensor) -> Tensor:
        """What the last layer reads: torchvision's network up to there, `(n, 512)`."""
        net, x = self.backbone, self.normalise(crops, self.backbone.conv1.weight.dtype)
        x = net.maxpool(net.relu(net.bn1(net.conv1(x.contiguous(memory_format=torch.channels_last)))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        return net.avgpool(x).flatten(1)  # type: ignore[no-any-return]

    def normalise(self, crops: Tensor, dtype: torch.dtype) -> Tensor:
        """Grey levels 0 to 255 to what the backbone sees, 0 to 1."""
        x = crops.to(dtype) / 255
        return x if self.reduce == 1 else F.avg_pool2d(x, self.reduce)

    def decode(self, raw: Tensor) -> Tensor:
        """Head numbers `(n, 2 * points)` to pixels of the crop `(n, points, 2)`."""
        scale = self.size / REFERENCE_SIZE
        return (raw * (UNIT * scale) + ((OFFSET + 0.5) * scale - 0.5)).reshape(-1, self.points, 2)

    def encode(self, xy_crop: Tensor) -> Tensor:
        """Pixels of the crop `(n, points, 2)` to the training target `(n, 2 * points)`."""
        scale = self.size / REFERENCE_SIZE
        return ((xy_crop.flatten(1) + 0.5) / scale - 0.5 - OFFSET) / UNIT

    @torch.no_grad()
    def start_from_mean(self, mean_xy_crop: Tensor) -> None:
        """Sets the head so that an untrained network answers the mean face, `(points, 2)` px."""
        nn.init.normal_(self.backbone.fc.weight, std=0.01)
        self.backbone.fc.bias.copy_(self.encode(mean_xy_crop[None])[0])


def load_backbone_weights(net: KeypointNet, weights: str) -> dict[str, str]:
    """Fills the network with starting weights.

    Args:
        net: the network, changed in place.
        weights: `none` (from scratch), `imagenet` (torchvision's, from its cache or fetched),
            `auto` (those if they can be had, else from scratch), or a file: a torchvision
            ResNet-18 `.pth`, read as weights only.

    Returns:
        What a run's record says of them: `weights` as above but `auto`, or the file's name and `weights_sha256`.

    Raises:
        KpError: the weights were asked for by name and can't be had or do not fit.
    """
    if weights == "none":
        return {"weights": "none"}
    try:
        if weights in ("imagenet", "auto"):
            state = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        else:
            state = torch.load(Path(weights), map_location="cpu", weights_only=True)  # noqa: TID251 - torchvision publishes these as .pth
    except Exception as error:  # torch.hub raises whatever its network stack or unpickler does
        if weights == "auto":
            log.warning("ImageNet weights can't be had here (%s): training from scratch", error)
            return {"weights": "none"}
        raise KpError(
            f"the weights {weights} can't be had here ({error}); use --weights none to train from scratch"
        ) from error
    first = state.get("conv1.weight") if isinstance(state, dict) else None
    if not isinstance(first, Tensor) or first.ndim != 4:
        raise KpError(f"{weights} is no torchvision ResNet-18: it has no conv1.weight of 4 dimensions")
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    if state["conv1.weight"].shape[1] == 3:
        state["conv1.weight"] = state["conv1.weight"].sum(dim=1, keepdim=True) / _GREY_STD
    try:
        odd = net.backbone.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise KpError(f"{weights} is no torchvision ResNet-18: its tensors have other shapes") from error
    if odd.unexpected_keys or set(odd.missing_keys) > {"fc.weight", "fc.bias"}:
        raise KpError(f"{weights} is no torchvision ResNet-18: it has other layers")
    if weights in ("imagenet", "auto"):
        return {"weights": "imagenet"}
    return {"weights": as_text(Path(weights).name), "weights_sha256": sha256_of_file(Path(weights))}
