"""The 68 points of the iBUG / Multi-PIE mark-up: names, regions, contours, mirrored pairs.

Indices are 0-based (iBUG's own figures count from 1). "Left" is the picture's left, which is
the person's right when the person looks into the camera.
Source of the order: Sagonas et al. 2013, "300 Faces in-the-Wild Challenge", figure 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kp_runtime.errors import InputError

__all__ = [
    "CONTOURS",
    "EYE_CORNERS",
    "MIRROR",
    "POINTS",
    "REGIONS",
    "check_mirrored",
    "mean_of_mirrored",
    "mean_shape",
    "point_names",
    "regions_of",
]

POINTS = 68

_PARTS: dict[str, range] = {
    "jaw": range(17),
    "left_brow": range(17, 22),
    "right_brow": range(22, 27),
    "nose_bridge": range(27, 31),
    "nose_base": range(31, 36),
    "left_eye": range(36, 42),
    "right_eye": range(42, 48),
    "outer_lip": range(48, 60),
    "inner_lip": range(60, 68),
}

REGIONS: dict[str, tuple[int, ...]] = {
    "jaw": tuple(range(17)),
    "brows": tuple(range(17, 27)),
    "nose": tuple(range(27, 36)),
    "eyes": tuple(range(36, 48)),
    "mouth": tuple(range(48, 68)),
}

EYE_CORNERS = (36, 45)
"""The outer eye corners: their distance is the unit of the NME (Sagonas et al. 2013)."""

_CLOSED = ("left_eye", "right_eye", "outer_lip", "inner_lip")
CONTOURS: dict[str, tuple[int, ...]] = {
    name: tuple(part) + ((part[0],) if name in _CLOSED else ()) for name, part in _PARTS.items()
}
"""Each part as the points that a drawn line joins, in order; eyes and lips end where they begin."""


def _mirror() -> NDArray[np.intp]:
    pairs = [(i, 16 - i) for i in range(8)]
    pairs += [(17 + i, 26 - i) for i in range(5)]
    pairs += [(31, 35), (32, 34)]
    pairs += [(36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46)]
    pairs += [(48, 54), (49, 53), (50, 52), (55, 59), (56, 58)]
    pairs += [(60, 64), (61, 63), (65, 67)]
    order = np.arange(POINTS)
    for left, right in pairs:
        order[left], order[right] = right, left
    order.setflags(write=False)
    return order


MIRROR: NDArray[np.intp] = _mirror()
"""`(68,)` int: point `i` of a mirrored face is point `MIRROR[i]` of the face."""


def check_mirrored(points: int) -> None:
    """Raises InputError where the pairs of a mark-up of so many points are not known, as a mirrored look needs them."""
    if points != POINTS:
        raise InputError(f"mirrored looks are for the {POINTS} points; this model has {points}: leave mirror out")


def mean_of_mirrored(xy: NDArray[np.floating]) -> NDArray[np.float64]:
    """The means of what was found on `n` faces and then, in the same frame, on their mirrored crops.

    Args:
        xy: `(2 n, 68, 2)`; in the second half each point has the name that it has in the mirrored face.

    Returns:
        `(n, 68, 2)` float64.

    Raises:
        InputError: another number of points, of which nobody knows the mirrored pairs.
    """
    check_mirrored(np.shape(xy)[1])
    straight, mirrored = np.asarray(xy, np.float64).reshape(2, -1, POINTS, 2)
    means: NDArray[np.float64] = (straight + mirrored[:, MIRROR]) / 2
    return means


def point_names() -> tuple[str, ...]:
    """The 68 names, such as `jaw_0` or `left_eye_3`, in order."""
    return tuple(f"{part}_{i}" for part, indices in _PARTS.items() for i in range(len(indices)))


def regions_of(points: int) -> dict[str, tuple[int, ...]]:
    """The regions of a face of so many points: `REGIONS`, or none where the mark-up is the user's own."""
    return REGIONS if points == POINTS else {}


def mean_shape() -> NDArray[np.float64]:
    """A plain frontal face, `(68, 2)`, x and y from -1 to 1, y down."""

    def arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, n: int) -> list[tuple[float, float]]:
        angles = np.radians(np.linspace(start, stop, n))
        return [(cx + rx * np.cos(a), cy + ry * np.sin(a)) for a in angles]

    points = arc(0, -0.3, 1.0, 1.3, 180, 0, 17)
    points += arc(-0.47, -0.62, 0.32, 0.16, 180, 340, 5) + arc(0.47, -0.62, 0.32, 0.16, 200, 360, 5)
    points += [(0, y) for y in np.linspace(-0.45, 0.05, 4)]
    points += [(x, 0.2 + 0.05 * np.cos(6 * x)) for x in np.linspace(-0.2, 0.2, 5)]
    points += arc(-0.43, -0.4, 0.19, 0.09, 180, 480, 6) + arc(0.43, -0.4, 0.19, 0.09, 180, 480, 6)
    points += arc(0, 0.52, 0.38, 0.18, 180, 510, 12) + arc(0, 0.52, 0.27, 0.07, 180, 495, 8)
    return np.array(points)
