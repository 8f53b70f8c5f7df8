"""Pictures and privacy put on faces by their 68 points.

An effect is called with an image and the points of its faces, and gives a new image. A `Picture` has anchors:
places of the picture that belong on named points of the face. It is placed as a whole, by the similarity map
(turn, scale, shift, mirroring) with the least squares at its anchors, or as a mesh: the anchors' Delaunay triangles,
each by the affine map of its own. `Blur` hides faces.

Positions are `(x, y)` in pixels, an integer is a pixel's centre, in pictures as in images.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kp_runtime.errors import ImageError, InputError, MissingExtraError, reason_of
from kp_runtime.frame import Frame, bgr_copy, bytes_of_picture, import_cv2
from kp_runtime.geometry import apply_matrix, invert_matrix, point_array
from kp_runtime.point_maps import is_mirrored, mesh_positions, similarity_from_points, triangles_from_points
from kp_runtime.scheme68 import CONTOURS, POINTS, REGIONS, mean_shape, point_names

__all__ = [
    "ANCHORS",
    "Blur",
    "Effect",
    "Picture",
    "face_outline",
    "picture_from_toml",
]

ANCHORS: dict[str, tuple[int, ...]] = {
    **REGIONS,
    **{part: tuple(sorted(set(indices))) for part, indices in CONTOURS.items()},
    **{name: (i,) for i, name in enumerate(point_names())},
}
"""What an anchor may be named: a point, or a part or region, which stands for the mean of its points."""

_MAPS = ("similarity", "mesh")
_MOST_PIXELS = 4096  # of a picture's side
_FARTHEST = 1e6  # pixels; an anchor may be beside its picture
_TILE = 512  # pixels; a face may be as large as its image, and the memory for it not
_THIN = 0.01  # anchors whose spread across is less of their spread along lie on one line
_LEAST_CELL = 8  # pixels


class Effect(Protocol):
    """Changes the faces of an image."""

    def __call__(self, image: Frame | NDArray[Any], xy: ArrayLike) -> NDArray[np.uint8]:
        """The image `(h, w, 3)` uint8 BGR with the effect on each face; a new array.

        Args:
            image: as `draw_keypoints` takes it.
            xy: `(n, 68, 2)`, pixels of the image; `n` may be 0.

        Raises:
            ImageError: not an image.
            InputError: not points, or points that are not finite.
        """
        ...


class Picture:
    """A picture with transparency that is put on faces.

    Args:
        bgra: `(h, w, 4)` uint8, the fourth channel is opacity; colours are not multiplied by it.
        anchors: three or more names of `ANCHORS`, each with its `(x, y)` in the picture; not on one line.
        placed: `similarity` places the picture as a whole, `mesh` each triangle of anchors by itself, and nothing
            of the picture that is outside of them.
        origin: the picture's name in messages.

    Raises:
        ImageError: the picture has no opacity, is not uint8 or too large.
        InputError: the anchors are not usable, or there is no such way to place them.
    """

    def __init__(
        self,
        bgra: NDArray[np.uint8],
        anchors: Mapping[str, Sequence[float]],
        placed: str = "similarity",
        origin: str = "the picture",
    ) -> None:
        _check_picture(bgra, origin)
        if placed not in _MAPS:
            raise InputError(f"{origin}: a picture is placed by {' or '.join(_MAPS)}, got {placed!r:.200}")
        self.anchors = {name: _anchor(name, place, origin) for name, place in anchors.items()}
        self.picture_xy = np.array(list(self.anchors.values()), np.float64).reshape(-1, 2)
        _check_spread(self.picture_xy, origin)
        _check_spread(self.anchors_of(mean_shape()), origin)
        self._mirrored = is_mirrored(self.picture_xy, self.anchors_of(mean_shape()))
        self._triangles = triangles_from_points(self.picture_xy) if placed == "mesh" else None
        self._bgra, self._shrunk = bgra, dict[int, NDArray[np.float32]]()

    def __call__(self, image: Frame | NDArray[Any], xy: ArrayLike) -> NDArray[np.uint8]:
        """Puts the picture on each face; see `Effect`.

        Raises:
            ImageError: not an image.
            InputError: not points of faces.
        """
        canvas = bgr_copy(image)
        for face in _faces(xy):
            self._draw(canvas, face)
        return canvas

    def anchors_of(self, face_xy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where the anchors belong on a face, `(68, 2)` to `(k, 2)`, in the order of `anchors`."""
        return np.array([face_xy[list(ANCHORS[name])].mean(axis=0) for name in self.anchors])

    def image_from_picture(self, face_xy: NDArray[np.float64]) -> NDArray[np.float64]:
        """The similarity map that puts the picture on a face, `(2, 3)`."""
        # all points tell whether a face is mirrored: three anchors of a face seen from the side may not
        mirrored = self._mirrored != is_mirrored(mean_shape(), face_xy)
        return similarity_from_points(self.picture_xy, self.anchors_of(face_xy), mirrored=mirrored)

    def _draw(self, canvas: NDArray[np.uint8], face: NDArray[np.float64]) -> None:
        matrix = self.image_from_picture(face)
        scale = math.sqrt(abs(np.linalg.det(matrix[:, :2])))
        if scale < 1e-6:
            return  # a face without size
        height, width = self._bgra.shape[:2]
        corners = np.array([(x, y) for x in (-1, width) for y in (-1, height)], np.float64)
        outline = apply_matrix(matrix, corners) if self._triangles is None else self.anchors_of(face)
        # 1e-6: at exactly a whole number the rounding of the place must not decide
        shrink = max(1, min(math.floor(1 / scale + 1e-6), height, width))
        layer, picture_from_image, cv2 = self._layer(shrink), invert_matrix(matrix), import_cv2()
        for x0, y0, x1, y1 in _tiles(*_window(outline, canvas)):
            grid = np.stack(np.meshgrid(np.arange(x0, x1), np.arange(y0, y1)), axis=-1).astype(np.float64)
            if self._triangles is None:
                positions = apply_matrix(picture_from_image, grid)
            else:
                positions = mesh_positions(grid, self._triangles, outline, self.picture_xy)
            positions = ((positions + 0.5) / shrink - 0.5).astype(np.float32)
            # outside of the picture all four channels are 0
            cut = cv2.remap(layer, positions, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
            part = canvas[y0:y1, x0:x1]
            part[:] = np.clip(cut[:, :, :3] + part * (1 - cut[:, :, 3:]) + 0.5, 0, 255)

    def _layer(self, shrink: int) -> NDArray[np.float32]:
        """The picture's means of `shrink` x `shrink` pixels, `(h, w, 4)`: colours times opacity, opacity 0 to 1."""
        if shrink not in self._shrunk:
            layer = self._bgra.astype(np.float32)
            layer[:, :, 3] /= 255
            layer[:, :, :3] *= layer[:, :, 3:]
            height, width = layer.shape[:2]
            layer = np.pad(layer, ((0, -height % shrink), (0, -width % shrink), (0, 0)))
            blocks = layer.reshape(layer.shape[0] // shrink, shrink, layer.shape[1] // shrink, shrink, 4)
            self._shrunk[shrink] = blocks.mean(axis=(1, 3))
        return self._shrunk[shrink]


class Blur:
    """Hides faces: what `face_outline` encloses becomes a mosaic of a few mean colours.

    The result is computed from these means alone, so that nothing finer than a cell can be found in it, by
    whatever means: images with the same means give the same result. A blur by a known filter is different; it
    can be reversed in part.

    Args:
        cells: along the longer side of the face; 1 leaves one colour. No cell is smaller than 8 x 8 pixels,
            where the image has that many.

    Raises:
        InputError: less than one cell.
    """

    def __init__(self, cells: int = 6) -> None:
        if not cells >= 1:
            raise InputError(f"a hidden face has one cell or more, got {cells}")
        self._cells = cells

    def __call__(self, image: Frame | NDArray[Any], xy: ArrayLike) -> NDArray[np.uint8]:
        """Hides each face; see `Effect`.

        Raises:
            ImageError: not an image.
            InputError: not points of faces.
        """
        canvas = bgr_copy(image)
        for face in _faces(xy):
            self._hide(canvas, face_outline(face))
        return canvas

    def _hide(self, canvas: NDArray[np.uint8], outline: NDArray[np.float64]) -> None:
        x0, y0, x1, y1 = _window(outline, canvas)
        if x0 >= x1 or y0 >= y1:
            return
        x0, x1 = _widened(x0, x1, canvas.shape[1])
        y0, y1 = _widened(y0, y1, canvas.shape[0])
        side = max(float(np.ptp(outline, axis=0).max()) / self._cells, _LEAST_CELL)
        cv2, shift, part = import_cv2(), 4, canvas[y0:y1, x0:x1]
        mosaic = np.empty_like(part)
        for top, bottom in pairwise(_cuts(y1 - y0, side)):
            for left, right in pairwise(_cuts(x1 - x0, side)):
                sums = np.array(cv2.sumElems(part[top:bottom, left:right])[:3])
                mosaic[top:bottom, left:right] = np.rint(sums / ((bottom - top) * (right - left)))
        fixed = np.clip(np.rint((outline - (x0, y0)) * 2**shift), -(2**26), 2**26).astype(np.int32)
        mask = cv2.fillConvexPoly(np.zeros(part.shape[:2], np.uint8), fixed, 1, cv2.LINE_8, shift)
        cv2.copyTo(mosaic, mask, part)


def face_outline(face_xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """The convex hull of a face with its forehead, a tenth larger; `(68, 2)` to `(k, 2)` in order.

    The 68 points end at the brows; the forehead is taken to be as high as it is from the brows to below the nose.
    """
    brows, below_nose = face_xy[list(REGIONS["brows"])], face_xy[list(ANCHORS["nose_base"])]
    forehead = brows + (brows.mean(axis=0) - below_nose.mean(axis=0))
    points = np.concatenate([face_xy, forehead])  # seen from the side, the nose may be outside of jaw and brows
    hull = import_cv2().convexHull(points.astype(np.float32)).reshape(-1, 2).astype(np.float64)
    middle = (hull.min(axis=0) + hull.max(axis=0)) / 2
    return np.asarray(middle + 1.1 * (hull - middle))


def picture_from_toml(path: Path) -> Picture:
    """Reads an effect of your own; docs/filters.md shows the file.

    Raises:
        InputError: the file is missing or not TOML, a key is missing or unknown, or the anchors are not usable.
        ImageError: the picture is missing, or none with opacity.
        MissingExtraError: Python 3.10 without tomli.
    """
    try:
        data = _toml_loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
        str(data)  # a ValueError where a hexadecimal number has more digits than Python writes
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # errors of TOML and UTF-8 are ValueErrors
        raise InputError(f"{path} is no TOML file: {error}") from error
    wanted = "image = \"FILE\", [anchors] with NAME = [x, y], and map = 'similarity' or 'mesh' if you like"
    if odd := sorted(set(data) - {"image", "anchors", "map"}):
        raise InputError(f"{path} has the unknown key {odd[0]!r:.200}; an effect has {wanted}")
    image, anchors = data.get("image"), data.get("anchors")
    if not isinstance(image, str) or not isinstance(anchors, dict):
        missing = "anchors" if isinstance(image, str) else "image"
        raise InputError(f"{path} lacks {missing}; an effect has {wanted}")
    return Picture(_bgra_from_file(path.parent / image), anchors, data.get("map", "similarity"), str(path))


def _toml_loads(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise MissingExtraError("tomli", "effects", "an effect of your own on Python 3.10") from error
    return tomllib.loads(text)


def _bgra_from_file(path: Path) -> NDArray[np.uint8]:
    cv2, data = import_cv2(), np.frombuffer(bytes_of_picture(path), np.uint8)
    try:
        picture = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    except cv2.error as error:
        raise ImageError(f"{path} can't be decoded: {reason_of(error)}") from error
    if picture is None:
        raise ImageError(f"{path} is no picture that OpenCV can decode; save it as PNG with transparency")
    _check_picture(picture, str(path))
    return np.asarray(picture, np.uint8)


def _check_picture(bgra: NDArray[Any], origin: str) -> None:
    if bgra.ndim != 3 or bgra.shape[2] != 4 or bgra.dtype != np.uint8 or bgra.size == 0:
        raise ImageError(
            f"{origin} must have four channels of 8 bits, the fourth its opacity; got {bgra.dtype} {bgra.shape}; "
            "save it as PNG with transparency (RGBA)"
        )
    if max(bgra.shape[:2]) > _MOST_PIXELS:
        raise ImageError(f"{origin} is {bgra.shape[1]} x {bgra.shape[0]} pixels; at most {_MOST_PIXELS} a side")


def _anchor(name: str, place: Any, origin: str) -> tuple[float, float]:
    if name not in ANCHORS:
        raise InputError(
            f"{origin}: there is no point {name!r:.200}; name one such as left_eye_0 or jaw_16, "
            f"or the mean of {', '.join(n for n, indices in ANCHORS.items() if len(indices) > 1)}"
        )
    numbers = list(place) if isinstance(place, (list, tuple, np.ndarray)) else []
    real = all(isinstance(v, (int, float, np.integer, np.floating)) and not isinstance(v, bool) for v in numbers)
    if len(numbers) != 2 or not real or not all(abs(v) <= _FARTHEST for v in numbers):
        raise InputError(f"{origin}: the anchor {name} must be [x, y] in pixels of the picture, got {place!r:.200}")
    return float(numbers[0]), float(numbers[1])


def _check_spread(xy: NDArray[np.float64], origin: str) -> None:
    """Whether points hold a picture: three or more, not on one line."""
    if len(xy) < 3:
        raise InputError(f"{origin} has {len(xy)} anchors; a picture needs three or more")
    along, across = np.linalg.svd(xy - xy.mean(axis=0), compute_uv=False)
    if across <= _THIN * along:
        raise InputError(f"{origin}: the anchors lie on one line; add one beside it, such as mouth or nose_base_2")


def _faces(xy: ArrayLike) -> NDArray[np.float64]:
    faces = point_array(xy)
    if faces.size == 0:
        return faces.reshape(0, POINTS, 2)
    if faces.shape[1:] != (POINTS, 2) or not np.isfinite(faces).all():
        raise InputError(f"the faces must be finite points (n, {POINTS}, 2), got shape {faces.shape}")
    return faces


def _window(xy: NDArray[np.float64], image: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """The pixels `x0 <= x < x1`, `y0 <= y < y1` of an image around points; empty where x0 >= x1 or y0 >= y1."""
    limit = (image.shape[1], image.shape[0])
    low, high = np.floor(xy.min(axis=0)).clip(0, limit), (np.ceil(xy.max(axis=0)) + 1).clip(0, limit)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _tiles(x0: int, y0: int, x1: int, y1: int) -> Iterator[tuple[int, int, int, int]]:
    """A window in parts; none of an empty one."""
    for y, x in product(range(y0, y1, _TILE), range(x0, x1, _TILE)):
        yield x, y, min(x + _TILE, x1), min(y + _TILE, y1)


def _widened(low: int, high: int, limit: int) -> tuple[int, int]:
    """At least a cell long, where the image is."""
    missing = max(0, _LEAST_CELL - (high - low))
    low = max(0, min(low - missing // 2, limit - _LEAST_CELL))
    return low, min(max(high, low + _LEAST_CELL), limit)


def _cuts(length: int, side: float) -> list[int]:
    """Where a length is cut into equal parts, none under `side` long unless the length is."""
    parts = max(1, math.floor(length / side))
    return [length * i // parts for i in range(parts + 1)]
