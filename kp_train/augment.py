"""How training crops are varied: the square's place, size and turn, then the grey levels.

The square is jittered before the one sampling that makes the crop, so a varied crop is as sharp
as a plain one; one that is bent is sampled once more, by a cubic. All that follows is
`torchvision.transforms.v2` on `Image` and `KeyPoints`.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors
from torchvision.transforms import v2

from kp_runtime.errors import KpError
from kp_runtime.geometry import apply_matrix, boxes_from_points, matrices_from_boxes, mirrored_matrices
from kp_runtime.scheme68 import MIRROR, POINTS
from kp_train.config import AUGMENTS

__all__ = [
    "Augment",
    "MirrorFace",
    "augment_from_name",
    "bent",
    "face_augment",
    "grey_levels",
    "mirror_from_pairs",
    "scale_of",
]

_NODES = 5  # of a bent crop, across and down
_STEPS = 8  # in which a bent point is found
_NO_MAP = np.empty(0, np.float32)  # both coordinates are in the first map


class MirrorFace(v2.Transform):  # type: ignore[misc]
    """Mirrors a face and gives each point the name of its partner on the other side.

    Args:
        p: how often.
        order: `(k,)` int: point `i` of the mirrored face is point `order[i]` of the face.
    """

    def __init__(self, p: float = 0.5, order: NDArray[np.intp] = MIRROR) -> None:
        super().__init__()
        self.p, self.order = p, torch.from_numpy(order.copy())

    def forward(self, *inputs: Any) -> Any:
        """Image and KeyPoints in, the same out, mirrored with probability `p`."""
        image, points = inputs
        return (image, points) if torch.rand(()) >= self.p else self.mirrored(image, points)

    def mirrored(self, image: tv_tensors.Image, points: tv_tensors.KeyPoints) -> Any:
        """Image and KeyPoints in, the same out, mirrored."""
        image = v2.functional.horizontal_flip(image)
        points = v2.functional.horizontal_flip(points)
        return image, tv_tensors.wrap(points[self.order], like=points)


def mirror_from_pairs(pairs: str, points: int) -> NDArray[np.intp] | None:
    """The order of a mirrored face's points.

    Args:
        pairs: such as `0-1,3-4`: these points change places, the others lie in the middle. Empty for the 68 points,
            whose pairs are known, and for a mark-up whose faces are not to be mirrored.
        points: their number.

    Returns:
        `(points,)` int, or None where nothing is known.

    Raises:
        KpError: text that is no pairs, a point that is not there or comes twice.
    """
    if not pairs:
        return MIRROR if points == POINTS else None
    try:
        numbers = [[int(number) for number in pair.split("-")] for pair in pairs.split(",")]
        flat = [number for left, right in numbers for number in (left, right)]
    except ValueError as error:
        raise KpError(f"pairs must be points such as 0-1,3-4; got {pairs!r}") from error
    if len(set(flat)) < len(flat) or not all(0 <= number < points for number in flat):
        raise KpError(f"pairs must name each of the points 0 to {points - 1} once at most; got {pairs!r}")
    order = np.arange(points)
    for left, right in numbers:
        order[[left, right]] = right, left
    return order


class Augment:
    """A jitter of the square, a mirror, and a chain of transforms of the grey levels.

    Args:
        shift: standard deviation of the centre's displacement, in sides of the square.
        max_shift: the most of it. Where `shift` is 0 the window lies anywhere in the image, whose
            shorter side leaves this much on both sides of it.
        zoom: standard deviation of the logarithm of the side's factor.
        turn: standard deviation of the turn in degrees.
        mirror: the order of a mirrored face's points; half of the faces are mirrored, none when None.
        grey: what is done to the crop's grey levels alone.
        wide: share of the faces whose `shift` and `zoom` are 2.5 times as wide: boxes err by more
            in some detectors than in others (scripts/fit_box_maps.py prints by how much).
        stretch: standard deviation of the logarithm of height over width, and of the shear: faces of other shapes.
        bend: standard deviation, in sides of the crop, of a displacement that differs over it, smooth between 5 x 5
            nodes: faces of still other shapes.
        tight: share of the faces whose square, after all this, is the one around their labels, but for a bend.
    """

    def __init__(
        self,
        shift: float,
        max_shift: float,
        zoom: float,
        turn: float,
        mirror: NDArray[np.intp] | None,
        grey: v2.Transform,
        wide: float = 0.0,
        stretch: float = 0.0,
        bend: float = 0.0,
        tight: float = 0.0,
    ) -> None:
        self.shift, self.max_shift, self.zoom, self.turn, self.wide = shift, max_shift, zoom, turn, wide
        self.stretch, self.bend, self.tight = stretch, bend, tight
        self.mirror = MirrorFace(0.5, mirror) if mirror is not None else None
        self.grey = grey

    def draw_tight(self) -> bool | None:
        """Of a face that is to be tight, whether it is mirrored, which its square depends on; None of another one."""
        if not self.tight or torch.rand(()) >= self.tight:
            return None
        return self.mirror is not None and bool(torch.rand(()) < self.mirror.p)

    def draw_jitter(self, size_hw: tuple[int, int]) -> dict[str, Any]:
        """Keyword arguments of `matrices_from_boxes` for one face of an image of this size."""
        factor = 2.5 if torch.rand(()) < self.wide else 1.0
        if self.shift:
            shift = (torch.randn(2) * self.shift * factor).clamp(-self.max_shift, self.max_shift)
        else:
            # the window may lie anywhere in the image: along its longer side there is more room
            room = torch.tensor(size_hw[::-1]) / min(size_hw) * (1 + 2 * self.max_shift) - 1
            shift = (torch.rand(2) - 0.5) * room
        normal = torch.randn(2).clamp(-2.5, 2.5).tolist()
        return {
            "shift": shift.numpy(),
            "zoom": math.exp(self.zoom * factor * normal[0]),
            "angle": math.radians(self.turn * normal[1]),
        }

    def deform(self, crop_from_image: NDArray[np.float64], size: int) -> NDArray[np.float64]:
        """A crop's matrix `(2, 3)` stretched along one axis and sheared about the middle of the crop."""
        if not self.stretch:
            return crop_from_image
        log, shear = (torch.randn(2).clamp(-2.5, 2.5) * self.stretch).tolist()
        middle = (size - 1) / 2
        linear = np.array([[math.exp(log / 2), shear], [0.0, math.exp(-log / 2)]])
        deformed = linear @ crop_from_image
        deformed[:, 2] += middle - linear.sum(axis=1) * middle
        return deformed

    def tightened(
        self,
        crop_from_image: NDArray[np.float64],
        xy: NDArray[np.floating],
        bias: NDArray[np.float64],
        size: int,
        margin: float,
        mirrored: bool,
    ) -> NDArray[np.float64]:
        """A crop's matrix `(2, 3)`, moved and scaled so that the labels that come of it lie in the square as in use.

        Args:
            crop_from_image: with all but that.
            xy: `(k, 2)` labels without their bias, pixels of the image.
            bias: `(k, 2)`, what is added to the labels of the crop once it is mirrored, pixels of the image.
            size: of the crop.
            margin: side of the square, in longer sides of the labels' box.
            mirrored: whether the crop will be mirrored.
        """
        shown = mirrored_matrices(crop_from_image[None], size)[0] if mirrored else crop_from_image
        seen = apply_matrix(shown, xy)
        if mirrored and self.mirror is not None:
            seen = seen[self.mirror.order.numpy()]
        box = boxes_from_points(seen + bias * scale_of(crop_from_image))
        moved = matrices_from_boxes(box[None], size, margin)[0]
        tight: NDArray[np.float64] = moved[:, :2] @ shown
        tight[:, 2] += moved[:, 2]
        return mirrored_matrices(tight[None], size)[0] if mirrored else tight

    def __call__(self, image: tv_tensors.Image, points: tv_tensors.KeyPoints, mirrored: bool | None = None) -> Any:
        """Image and KeyPoints of a crop in, the same out, varied; `mirrored` is what `draw_tight` said."""
        if self.bend:
            image, points = bent(image, points, self.bend)
        if self.mirror is not None and mirrored is not False:
            image, points = (self.mirror if mirrored is None else self.mirror.mirrored)(image, points)
        return self.grey(image), points


def scale_of(crop_from_image: NDArray[np.float64]) -> float:
    """Pixels of the crop in one of the image, the geometric mean of both directions."""
    (a, b, _), (c, d, _) = crop_from_image.tolist()
    return math.sqrt(a * d - b * c)


def bent(image: tv_tensors.Image, points: tv_tensors.KeyPoints, deviation: float) -> Any:
    """A face bent into another shape: a smooth random displacement, cubic between 5 x 5 nodes over the crop.

    Args:
        image: uint8 `(1, size, size)`.
        points: `(k, 2)` pixels of it.
        deviation: standard deviation of the displacement at a node, in sides of the crop.

    Returns:
        The image and the points, both bent. What is moved in from beyond the border repeats the border.
    """
    size = image.shape[-1]
    nodes = (torch.randn(_NODES, _NODES, 2) * deviation * size).numpy()
    away = cv2.resize(nodes, (size, size), interpolation=cv2.INTER_CUBIC)  # from a bent pixel to where it is taken from
    taken_from = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1).astype(np.float32) + away
    grey = cv2.remap(image[0].numpy(), taken_from, _NO_MAP, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    xy = points.as_subclass(torch.Tensor).numpy()
    bent_xy = xy
    for _ in range(_STEPS):  # a bent point p has p + away(p) = xy: fixed-point iteration
        there = cv2.remap(away, bent_xy[None], _NO_MAP, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0]
        bent_xy = xy - there
    return tv_tensors.wrap(torch.from_numpy(grey)[None], like=image), tv_tensors.wrap(
        torch.from_numpy(bent_xy), like=points
    )


class _DownUp(v2.Transform):  # type: ignore[misc]
    """Shrinks and enlarges the image: a face that was small in its photo."""

    def __init__(self, low: float) -> None:
        super().__init__()
        self.low = low

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"factor": float(torch.empty(()).uniform_(self.low, 0.9))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        size = list(inpt.shape[-2:])
        small = [max(16, round(side * params["factor"])) for side in size]
        return v2.functional.resize(v2.functional.resize(inpt, small, antialias=True), size, antialias=True)


class _Jpeg(v2.Transform):  # type: ignore[misc]
    """Encodes and decodes the image as JPEG of a quality between `low` and `high`."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"quality": int(torch.randint(self.low, self.high + 1, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        _, data = cv2.imencode(".jpg", inpt[0].numpy(), [cv2.IMWRITE_JPEG_QUALITY, params["quality"]])
        return tv_tensors.wrap(torch.from_numpy(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE))[None], like=inpt)


class _Noise(v2.Transform):  # type: ignore[misc]
    """Adds normal noise of up to `most` grey levels to a uint8 image."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"sigma": float(torch.empty(()).uniform_(0, self.most))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        noisy = inpt.float() + params["sigma"] * torch.randn(inpt.shape)
        return tv_tensors.wrap(noisy.round().clamp(0, 255).to(torch.uint8), like=inpt)


def grey_levels(light: float, patches: float, largest: float, noise: float, p: float) -> v2.Transform:
    """Light, blur, down-and-up, JPEG, noise of up to so many grey levels; grey patches on that share of the crops."""
    return v2.Compose(
        [
            v2.ColorJitter(brightness=light, contrast=light),
            v2.RandomApply([_DownUp(0.35)], p=2 * p),
            v2.RandomApply([v2.GaussianBlur(5, sigma=(0.3, 1.5))], p=p / 2),
            v2.RandomApply([_Jpeg(30, 90)], p=p),
            v2.RandomApply([_Noise(noise)], p=p),
            v2.RandomErasing(p=patches, scale=(0.01, largest), ratio=(0.4, 2.5), value=127),
        ]
    )


def face_augment(
    mirror: NDArray[np.intp] | None, *, wide: float = 0.4, varied: bool = False, bend: float = 0.0, tight: float = 0.0
) -> Augment:
    """That of `faces`, or one with more; see `TrainConfig.augment` and `Augment`."""
    light, patches, largest, turn, stretch = (0.3, 0.15, 0.1, 10, 0.05) if varied else (0.25, 0.05, 0.08, 8, 0.0)
    grey = grey_levels(light, patches, largest, noise=8, p=0.1)
    place = {"shift": 0.02, "max_shift": 0.16, "zoom": 0.04, "turn": turn, "wide": wide}
    return Augment(**place, mirror=mirror, grey=grey, stretch=stretch, bend=bend, tight=tight)


def augment_from_name(name: str, mirror: NDArray[np.intp] | None = MIRROR) -> Augment | None:
    """The augmentation of a name, one of `AUGMENTS` (see `TrainConfig.augment`); `mirror` as in `Augment`.

    Raises:
        KpError: no such name.
    """
    if name not in AUGMENTS:
        raise KpError(f"there is no augmentation {name!r}; choose from {', '.join(AUGMENTS)}")
    if name == "none":
        return None
    if name == "light":
        grey = v2.ColorJitter(brightness=0.2, contrast=0.2)
        return Augment(shift=0.02, max_shift=0.08, zoom=0.04, turn=5, mirror=mirror, grey=grey)
    if name == "crop":
        # the original draws a 224 window from the 250 image: up to 13 px of 224 either way
        return Augment(shift=0, max_shift=13 / 224, zoom=0, turn=0, mirror=None, grey=v2.Identity())
    return face_augment(
        mirror,
        wide=1.0 if name in ("shaken", "tight") else 0.4,
        varied=name != "faces",
        bend=0.015 if name in ("bent", "shaken") else 0.0,
        tight=0.4 if name == "tight" else 0.0,
    )
