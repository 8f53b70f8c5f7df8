"""The effects that are here under a name; their pictures are drawn when they are asked for.

They are drawn on the plain face of `scheme68.mean_shape`, whose unit is half a face's width, with y down.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kp_runtime.effects import ANCHORS, Blur, Effect, Picture, picture_from_toml
from kp_runtime.errors import InputError
from kp_runtime.files import as_path
from kp_runtime.frame import import_cv2
from kp_runtime.point_maps import triangles_from_points
from kp_runtime.scheme68 import mean_shape, point_names

__all__ = ["EFFECTS", "PICTURES", "hat", "mesh", "moustache", "open_effect", "sunglasses"]

_UNIT = 200  # pixels of a finished picture
_FINE = 2  # drawn this many times larger, then averaged
_SHIFT = 4  # OpenCV's drawing takes positions in sixteenths of a pixel

Points = NDArray[np.float64]
Colour = Sequence[float] | NDArray[np.float64] | Callable[[Points, Points], Points]
"""BGR, 0 to 255; or a function of x and y, `(h, w)` each, that gives `(h, w, 3)`."""


class _Sheet:
    """A transparent sheet over a part of the plain face, to paint on."""

    def __init__(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self._low, self._scale = np.array([x0, y0]), _UNIT * _FINE
        width, height = round((x1 - x0) * _UNIT) * _FINE, round((y1 - y0) * _UNIT) * _FINE
        self._colour = np.zeros((height, width, 3), np.float32)  # times opacity
        self._opacity = np.zeros((height, width, 1), np.float32)

    def fill(self, xy: Points, colour: Colour, opacity: float = 1.0, within: Points | None = None) -> None:
        """Paints a polygon, or only what of it is within another one."""
        self._paint(xy, 0, colour, opacity, within)

    def line(self, xy: Points, width: float, colour: Colour, opacity: float = 1.0) -> None:
        """Paints an open line."""
        self._paint(xy, width, colour, opacity, None)

    def picture(self, names: Sequence[str], placed: str = "similarity") -> Picture:
        """The finished picture with these anchors."""
        height, width = self._opacity.shape[:2]
        cv2 = import_cv2()
        small = cv2.resize(
            np.dstack([self._colour, self._opacity]), (width // _FINE, height // _FINE), interpolation=cv2.INTER_AREA
        )
        bgra = small / np.maximum(small[:, :, 3:], 1e-6)
        bgra[:, :, 3] = small[:, :, 3] * 255
        face = mean_shape()
        anchors = {n: (face[list(ANCHORS[n])].mean(axis=0) - self._low) * _UNIT - 0.5 for n in names}
        return Picture(np.rint(bgra).clip(0, 255).astype(np.uint8), anchors, placed)

    def _paint(self, xy: Points, width: float, colour: Colour, opacity: float, within: Points | None) -> None:
        limit = self._opacity.shape[1::-1]
        pixels = (xy - self._low) * self._scale
        reach = width * self._scale + 2
        x0, y0 = np.floor(pixels.min(axis=0) - reach).clip(0, limit).astype(int).tolist()
        x1, y1 = np.ceil(pixels.max(axis=0) + reach).clip(0, limit).astype(int).tolist()
        value: ArrayLike = 0.0 if callable(colour) else colour
        if callable(colour):
            x, y = np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5)
            value = colour(self._low[0] + x / self._scale, self._low[1] + y / self._scale)
        mask = self._mask(xy, width, (x0, y0, x1, y1))
        if within is not None:
            mask = np.minimum(mask, self._mask(within, 0, (x0, y0, x1, y1)))
        cover = mask[:, :, None] * np.float32(opacity / 255)
        for layer, wanted in ((self._colour, value), (self._opacity, 1)):
            part = layer[y0:y1, x0:x1]
            part += (np.asarray(wanted, np.float32) - part) * cover

    def _mask(self, xy: Points, width: float, window: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """How much of each pixel of a window a polygon or a line covers, 0 to 255."""
        cv2 = import_cv2()
        x0, y0, x1, y1 = window
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        fixed = np.rint(((xy - self._low) * self._scale - (x0 + 0.5, y0 + 0.5)) * 2**_SHIFT).astype(np.int32)
        if width:
            cv2.polylines(mask, [fixed], False, 255, max(1, round(width * self._scale)), cv2.LINE_AA, _SHIFT)
        else:
            cv2.fillPoly(mask, [fixed], 255, cv2.LINE_AA, _SHIFT)
        return mask


def sunglasses() -> Picture:
    """Dark glasses with a thick frame."""
    sheet = _Sheet(-1.15, -0.85, 1.15, 0.2)
    glass = _along("y", (-0.62, (26, 20, 18)), (-0.1, (92, 66, 50)))
    frame = _along("y", (-0.68, (62, 56, 54)), (-0.45, (22, 18, 18)))
    for side in (-1, 1):
        temple = np.array([(0.72, -0.62), (1.06, -0.6), (1.08, -0.5), (0.76, -0.44)]) * (side, 1)
        sheet.fill(temple, frame)
        sheet.fill(_lens(side, 1.17), frame)
    sheet.fill(np.concatenate([_arc(0, -0.4, 0.17, 0.13, 200, 340), _arc(0, -0.36, 0.15, 0.07, 340, 200)]), frame)
    for side in (-1, 1):
        sheet.fill(_lens(side, 1.0), glass)
        for left, width in ((-0.22, 0.14), (-0.02, 0.05)):
            band = np.array([(left + 0.3, -0.8), (left + width + 0.3, -0.8), (left + width, 0.1), (left, 0.1)])
            sheet.fill(band + np.array([side * 0.46 - 0.08, 0]), (255, 250, 240), 0.16, within=_lens(side, 0.95))
        rim = _lens(side, 1.12)
        sheet.line(rim[len(rim) // 2 + 4 : -4], 0.012, (150, 140, 135), 0.5)
    return sheet.picture(("left_eye", "right_eye", "nose_bridge_0", "jaw_0", "jaw_16"))


def hat() -> Picture:
    """A top hat with a red band."""
    sheet = _Sheet(-1.6, -3.0, 1.6, -0.7)
    felt = _along("x", (-1.3, (14, 12, 12)), (-0.45, (74, 66, 64)), (0.3, (32, 28, 27)), (1.3, (10, 9, 9)))
    ribbon = _along("x", (-1.1, (18, 10, 70)), (-0.45, (70, 50, 210)), (0.3, (34, 22, 140)), (1.1, (14, 8, 60)))

    def ring(y: float, half: float, bend: float) -> Points:
        return _arc(0, y, half, bend, 180, 0)  # the nearer half of a round, from below

    def wall(low: tuple[float, float, float], high: tuple[float, float, float]) -> Points:
        return np.concatenate([ring(*low), ring(*high)[::-1]])

    sheet.fill(_arc(0, -1.2, 1.5, 0.3, 0, 360), _along("y", (-1.4, (52, 46, 44)), (-0.95, (20, 17, 17))))
    sheet.line(_arc(0, -1.2, 1.49, 0.29, 15, 165), 0.02, (96, 88, 84), 0.7)
    sheet.fill(wall((-1.3, 1.0, 0.16), (-2.72, 1.12, -0.12)), felt)
    sheet.fill(wall((-1.3, 1.0, 0.16), (-1.62, 1.025, 0.14)), ribbon)
    for y, half, bend in ((-1.3, 1.0, 0.16), (-1.62, 1.025, 0.14)):
        sheet.line(ring(y, half, bend), 0.012, (10, 6, 30), 0.8)
    sheet.line(_arc(0, -2.72, 1.115, 0.12, 190, 350), 0.015, (110, 102, 98), 0.6)
    return sheet.picture(("jaw_0", "jaw_16", "left_brow", "right_brow", "left_eye", "right_eye"))


def moustache() -> Picture:
    """A moustache with curled ends."""
    sheet = _Sheet(-0.9, -0.05, 0.9, 0.65)
    upper = _bezier((0.0, 0.3), (0.2, 0.13), (0.36, 0.5), (0.55, 0.36), (0.68, 0.27), (0.68, 0.12), (0.56, 0.12))
    lower = _bezier((0.0, 0.37), (0.22, 0.5), (0.42, 0.6), (0.63, 0.44), (0.8, 0.3), (0.76, 0.06), (0.56, 0.12))
    browns = np.array([(18, 28, 44), (34, 52, 84), (60, 88, 130), (12, 18, 28)], np.float64)
    generator = np.random.default_rng(68)
    for side in (-1, 1):
        flip = (side, 1)
        sheet.fill(np.concatenate([upper, lower[::-1]]) * flip, (20, 30, 48))
        for share in generator.permutation(np.linspace(0.02, 0.98, 60)):
            hair = (upper * (1 - share) + lower * share) * flip
            begin = generator.integers(0, len(hair) // 2)
            end = generator.integers(begin + 8, len(hair) + 1)
            sheet.line(hair[begin:end], 0.008, browns[generator.integers(len(browns))].tolist(), 0.75)
    return sheet.picture(("outer_lip_0", "outer_lip_6", "nose_base_0", "nose_base_2", "nose_base_4"))


def mesh() -> Picture:
    """A mask of the face's triangles, with holes for eyes and mouth; it follows every point."""
    sheet, face = _Sheet(-1.1, -1.0, 1.1, 1.15), mean_shape()
    holes = [set(ANCHORS[part]) for part in ("left_eye", "right_eye", "inner_lip")]
    triangles = [t for t in triangles_from_points(face) if not any(set(t.tolist()) <= hole for hole in holes)]
    for triangle in triangles:
        x, y = face[triangle].mean(axis=0)
        light = 0.75 + 0.25 * np.cos(7 * abs(x) + 5 * y)
        share = np.clip((y + 0.8) / 1.8, 0, 1)
        sheet.fill(
            face[triangle], ((1 - share) * np.array([210, 150, 40]) + share * np.array([170, 50, 150])) * light, 0.55
        )
    for triangle in triangles:
        sheet.line(face[[*triangle, triangle[0]]], 0.008, (255, 245, 225), 0.8)
    return sheet.picture(point_names(), "mesh")


PICTURES: dict[str, Callable[[], Picture]] = {
    "sunglasses": sunglasses,
    "hat": hat,
    "moustache": moustache,
    "mesh": mesh,
}
"""Each picture by its name."""

EFFECTS = (*PICTURES, "blur")
"""The effects that are here under a name."""


def open_effect(name: str | os.PathLike[str]) -> Effect:
    """An effect by its name, or one of your own by its `.toml` file (docs/filters.md).

    Args:
        name: `sunglasses`, `hat`, `moustache`, `mesh`, `blur`, or the path of a `.toml` file.

    Returns:
        `effect(image, xy)` gives a new `(h, w, 3)` uint8 BGR image with the effect on each face of `xy`, `(n, 68, 2)`
        pixels of the image, which is an array as `draw_keypoints` takes it; `n` may be 0.

    Raises:
        InputError: there is no such effect, or the file is missing or wrong.
        ImageError: the file's picture is missing, or none with opacity.
        MissingExtraError: OpenCV is not installed, or, on Python 3.10, tomli.
    """
    path, name = as_path(name, "an effect"), os.fspath(name)
    if path.suffix.lower() == ".toml":
        return picture_from_toml(path)
    if name == "blur":
        return Blur()
    if name not in PICTURES:
        raise InputError(f"there is no effect {name!r}; choose from {', '.join(EFFECTS)}, or name a .toml file")
    return PICTURES[name]()


def _along(axis: str, *stops: tuple[float, tuple[float, float, float]]) -> Callable[[Points, Points], Points]:
    """A gradient along x or y."""
    places, colours = [place for place, _ in stops], np.array([colour for _, colour in stops], np.float64)

    def colour(x: Points, y: Points) -> Points:
        at = x if axis == "x" else y
        return np.stack([np.interp(at, places, colours[:, i]) for i in range(3)], axis=-1)

    return colour


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float) -> Points:
    """An ellipse's arc; angles in degrees, 90 is down."""
    angles = np.radians(np.linspace(start, stop, 90))
    return np.column_stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)])


def _lens(side: int, size: float) -> Points:
    """The outline of a glass, narrower below and to the nose."""
    angles = np.radians(np.linspace(0, 360, 120, endpoint=False))
    across, down = np.cos(angles), np.sin(angles)
    x = np.sign(across) * abs(across) ** 0.7 * 0.36 * size * (1 - 0.12 * down)
    y = np.sign(down) * abs(down) ** 0.75 * 0.3 * size * (1 + 0.1 * np.sign(across) * abs(across))
    return np.column_stack([side * (0.46 + x), -0.34 + y - 0.06 * x])


def _bezier(*points: ArrayLike) -> Points:
    """Cubic curves one after the other: a start, then two handles and an end each."""
    corners = np.array(points, np.float64)
    t = np.linspace(0, 1, 40)[:, None]
    curves = []
    for i in range(0, len(corners) - 1, 3):
        a, b, c, d = corners[i : i + 4]
        curves.append((1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d)
    return np.concatenate(curves)
