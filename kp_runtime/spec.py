"""The contract of a model: what it takes and gives, the same for every file and backend of a bundle."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from kp_runtime.errors import BundleError, shortened

__all__ = ["BOXES", "SCHEMES", "DetectorSpec", "ModelSpec"]

BOXES = ("keypoints", "frame")
SCHEMES = ("ibug68", "own")
"""The words that `box` and `scheme` may have; a newer release may know more."""
_MOST_POINTS = 1000


@dataclass(frozen=True)
class ModelSpec:
    """What a model takes and gives; the same for every file and backend of a bundle.

    Input `crops`: uint8 `(n, 1, size, size)`, luma 0 to 255. Output `keypoints`: float32
    `(n, points, 2)`, pixels of the crop, x then y, an integer is a pixel's centre. Output `lost_score`,
    where there is a `lost_limit`: float32 `(n, 1)`, how far off the points are expected to be, about 1
    where there is no face.

    Attributes:
        name: the model's name, such as `resnet18-68`.
        size: side of the crop in pixels.
        margin: side of the square that is cut out, in longer sides of the box.
        box: what a box means: `keypoints` (tight around the points) or `frame` (the
            original project's view, `geometry.frame_box`).
        points: number of points.
        scheme: the mark-up of the points: `ibug68`, or `own` where their number is another.
        lost_limit: above this `lost_score` there is no face in the box; None for a model that does not say.
    """

    name: str
    size: int = 224
    margin: float = 1.3
    box: str = "keypoints"
    points: int = 68
    scheme: str = "ibug68"
    lost_limit: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or len(self.name) > 200 or not self.name.isprintable():
            raise BundleError(f"the model's name must be a line of up to 200 characters, got {shortened(self.name)}")
        if type(self.size) is not int or not 32 <= self.size <= 1024:
            raise BundleError(f"the model's crop size must be 32 to 1024 pixels, got {shortened(self.size)}")
        if type(self.margin) not in (int, float) or not 0.5 <= self.margin <= 4:
            raise BundleError(f"the model's margin must be 0.5 to 4, got {shortened(self.margin)}")
        if self.box not in BOXES:
            raise BundleError(f"the model's box must be 'keypoints' or 'frame', got {shortened(self.box)}")
        if type(self.points) is not int or not 2 <= self.points <= _MOST_POINTS:
            raise BundleError(f"the model's points must be 2 to {_MOST_POINTS}, got {shortened(self.points)}")
        if self.scheme != ("ibug68" if self.points == 68 else "own"):
            raise BundleError(
                "68 points are of the mark-up ibug68, any other number is of the mark-up own; "
                f"got {self.points} points of {shortened(self.scheme)}"
            )
        if self.lost_limit is not None and not (type(self.lost_limit) in (int, float) and 0 < self.lost_limit < 1):
            raise BundleError(
                f"the model's lost_limit must be between 0 and 1, or null; got {shortened(self.lost_limit)}"
            )

    @functools.cached_property  # asked for in each call of an engine
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """What the model gives, all float32: name to shape behind the number of crops, in the order of its files."""
        return {"keypoints": (self.points, 2)} | ({} if self.lost_limit is None else {"lost_score": (1,)})

    @functools.cached_property
    def output_bytes(self) -> tuple[int, ...]:
        """Bytes a crop of each of `outputs`."""
        return tuple(4 * math.prod(shape) for shape in self.outputs.values())


@dataclass(frozen=True)
class DetectorSpec:
    """What a face detector takes and gives; the same for every file of its bundle.

    Input `image`: uint8 `(1, 1, h, w)`, luma 0 to 255, of any size. Output `cells`: float32
    `(1, 5, rows, columns)`, a cell every `stride` pixels from pixel (0, 0) on: the score of a face around it,
    0 to 1, and the distances in pixels from the cell to the left, top, right and lower side of the tight box of
    its 68 points. Faces of other sizes than it knows are found by showing it the image at other sizes.

    Attributes:
        name: the detector's name.
        stride: pixels from a cell to the next.
        least_px: longer side of the smallest boxes that it finds.
        most_px: of the largest ones; at least twice `least_px`.
        score: from which score on a cell counts.
        task: tells its manifests from those of keypoint models.
    """

    name: str
    stride: int = 8
    least_px: float = 22.0
    most_px: float = 72.0
    score: float = 0.5
    task: str = "face-boxes"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or len(self.name) > 200 or not self.name.isprintable():
            raise BundleError(f"the detector's name must be a line of up to 200 characters, got {shortened(self.name)}")
        if type(self.stride) is not int or not 1 <= self.stride <= 64:
            raise BundleError(f"the detector's stride must be 1 to 64 pixels, got {shortened(self.stride)}")
        numbers = (self.least_px, self.most_px, self.score)
        if not all(type(number) in (int, float) for number in numbers):
            raise BundleError(f"the detector's least_px, most_px and score must be numbers, got {shortened(numbers)}")
        if not (4 <= self.least_px <= 512 and 2 * self.least_px <= self.most_px <= 4096 and 0 < self.score < 1):
            raise BundleError(
                "the detector's least_px must be 4 to 512, most_px at least twice that, and score between 0 and 1; "
                f"got {shortened(numbers)}"
            )
        if self.task != "face-boxes":
            raise BundleError(f"only detectors of face-boxes are known, got {shortened(self.task)}")
