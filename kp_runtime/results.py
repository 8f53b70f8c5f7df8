"""What a model answers: keypoints in pixels of the image, and the ways to write them down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.errors import InputError
from kp_runtime.pts import pts_text
from kp_runtime.scheme68 import regions_of

__all__ = ["Keypoints"]


@dataclass(frozen=True, eq=False)
class Keypoints:
    """The keypoints of all faces of one image.

    Attributes:
        xy: `(n, 68, 2)` float32, pixels of the image, x then y, an integer is a pixel's centre.
        boxes_xyxy: `(n, 4)` float64, the boxes that were asked for.
        crop_from_image: `(n, 2, 3)` float64, the crop matrices that were used.
        size_hw: the image's height and width.
        lost_score: `(n,)` float32, how far off the points are expected to be, about 1 where there is no face; above
            `ModelSpec.lost_limit` they lie on none. None of a model that does not say.
    """

    xy: NDArray[np.float32]
    boxes_xyxy: NDArray[np.float64]
    crop_from_image: NDArray[np.float64]
    size_hw: tuple[int, int]
    lost_score: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.xy)

    def __repr__(self) -> str:
        height, width = self.size_hw
        return f"Keypoints({len(self)} face(s) of {self.xy.shape[1]} points on {width} x {height} px)"

    def region(self, name: str) -> NDArray[np.float32]:
        """The points of a region (`jaw`, `brows`, `nose`, `eyes`, `mouth`), `(n, k, 2)`.

        Raises:
            InputError: no such region; a mark-up of your own has none.
        """
        regions = regions_of(self.xy.shape[1])
        if name not in regions:
            known = ", ".join(regions) or "none of a mark-up of your own: index xy instead"
            raise InputError(f"there is no region {name!r}; the regions of {self.xy.shape[1]} points: {known}")
        return self.xy[:, list(regions[name])]

    def to_json(self) -> dict[str, Any]:
        """Boxes and points as plain lists, rounded to a thousandth of a pixel; `lost_score` where the model says."""
        faces: list[dict[str, Any]] = [
            {"box_xyxy": np.round(box, 3).tolist(), "keypoints_xy": np.round(xy.astype(np.float64), 3).tolist()}
            for box, xy in zip(self.boxes_xyxy, self.xy, strict=True)
        ]
        if self.lost_score is not None:
            for face, score in zip(faces, self.lost_score.tolist(), strict=True):
                face["lost_score"] = round(score, 3)
        return {"height": self.size_hw[0], "width": self.size_hw[1], "faces": faces}

    def to_pts(self, face: int) -> str:
        """One face as an iBUG `.pts` text, which counts pixels from 1.

        Raises:
            InputError: no such face.
        """
        try:
            return pts_text(self.xy[face])
        except IndexError as error:
            raise InputError(f"there is no face {face!r:.40} among {len(self)}, which are counted from 0") from error
