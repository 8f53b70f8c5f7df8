"""One labelled face, and what its files in all formats have in common: checked numbers, text in UTF-8."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from kp_runtime.errors import DataError
from kp_runtime.files import writing
from kp_runtime.scheme68 import point_names

__all__ = [
    "ODD",
    "LabelledFace",
    "as_text",
    "checked_box",
    "checked_points",
    "face_numbers",
    "opened_text",
    "order_by_name",
    "rounded",
    "text_of",
    "write_text",
]

ODD = "backslashreplace"
"""What becomes of names that are no text."""


@dataclass(frozen=True, eq=False)
class LabelledFace:
    """One face of one image.

    Attributes:
        image: the image's path as the file names it; of a `.pts` file, the photo of that stem beside
            it (`a.jpg` of `a_0.pts`, `a_1.pts` … too), or the stem where there is none.
        xy: `(68, 2)` float64 or as many as there are, pixels of the image from 0, an integer is a pixel's centre.
        box_xyxy: `(4,)` float64 in the same pixels, or None where the file has none.
        size_hw: the image's height and width, or None where the file has none.
        where: the file and the place in it, for messages; empty where it was read from none.
    """

    image: str
    xy: NDArray[np.float64]
    box_xyxy: NDArray[np.float64] | None = None
    size_hw: tuple[int, int] | None = None
    where: str = ""


def checked_points(numbers: Any, where: str, points: int) -> NDArray[np.float64]:
    """`(points, 2)` of twice as many numbers, or the error that names the place."""
    try:
        values = np.array(numbers, np.float64).ravel()
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{where}: a coordinate is not a number ({str(error)[:80]}); correct it or remove the face"
        ) from error
    if len(values) != 2 * points:
        raise DataError(f"{where}: expected {points} points, got {len(values) / 2:g}; is the file cut off?")
    if not np.isfinite(values).all():
        raise DataError(f"{where}: a coordinate is not finite; correct it or remove the face")
    xy = values.reshape(points, 2)
    for mark in (0, -1):
        if len(found := np.flatnonzero((xy == mark).all(axis=1))):
            raise DataError(
                f"{where}: point {found[0]} is not labelled ({mark}, {mark}); all {points} are needed, hidden ones too"
            )
    return xy


def order_by_name(names: Sequence[str]) -> list[int]:
    """Where in a file each point stands whose points have names, which tools sort: `10` before `2`.

    Names that tell it are the 68 of `point_names`, or hold a number each, which together count all points. By others,
    points are taken as they stand.
    """
    own, numbers = point_names(), [re.findall("[0-9]{1,9}", name) for name in names]
    if sorted(names) == sorted(own):
        return [names.index(name) for name in own]
    counted = [int(found[0]) for found in numbers if len(found) == 1]
    by_number = sorted(range(len(counted)), key=counted.__getitem__)
    if len(counted) == len(names) and all(counted[at] == counted[by_number[0]] + i for i, at in enumerate(by_number)):
        return by_number
    return list(range(len(names)))


def checked_box(numbers: Any, where: str) -> NDArray[np.float64]:
    """`(4,)` of four finite numbers, or the error that names the place."""
    try:
        box = np.array(numbers, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: a number of the box is none ({str(error)[:80]})") from error
    if box.shape != (4,) or not np.isfinite(box).all():
        raise DataError(f"{where}: a box must have 4 finite numbers")
    return box


def rounded(values: NDArray[np.floating]) -> list[float]:
    """All numbers, to a thousandth of a pixel."""
    numbers: list[float] = np.round(np.asarray(values, np.float64).ravel(), 3).tolist()
    return numbers


def face_numbers(faces: Sequence[LabelledFace]) -> list[int]:
    """Which face of its image each one is, from 0."""
    seen: dict[str, int] = {}
    numbers = []
    for face in faces:
        numbers.append(seen.get(face.image, 0))
        seen[face.image] = numbers[-1] + 1
    return numbers


def text_of(path: Path) -> str:
    """All of a text file; see `opened_text`."""
    with opened_text(path) as file:
        return file.read()


@contextlib.contextmanager
def opened_text(path: Path) -> Iterator[TextIO]:
    """A text file to read, with its lines as they end."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # Excel begins a file with a mark
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error.reason}); save it as UTF-8") from error


def as_text(name: str) -> str:
    """A file's name, which may be no text, as text."""
    return name.encode("utf-8", ODD).decode()


def write_text(path: Path, text: str) -> Path:
    """Writes a text file, the old one kept whole until the new one is; its path."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=ODD)
    return path
