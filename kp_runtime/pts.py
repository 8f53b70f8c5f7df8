"""iBUG's `.pts`: a text of one face's points, which count pixels from 1, beside its photo.

What is in memory counts them from 0.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kp_runtime.errors import DataError
from kp_runtime.files import files_below
from kp_runtime.frame import IMAGE_SUFFIXES

__all__ = ["image_beside", "numbers_of_pts", "pts_files", "pts_text"]


def numbers_of_pts(text: str, where: str) -> list[str]:
    """The numbers between the braces of a `.pts` text, as they stand there: x and y of each point, from 1.

    Args:
        text: the whole file.
        where: its name, for the message.

    Raises:
        DataError: it has no header, or no end: the last number may be a part of one.
    """
    head, brace, rest = text.partition("{")
    if "n_points" not in head or not brace:
        raise DataError(f"{where} has no .pts header (version, n_points, then the points between braces)")
    numbers, end, _ = rest.partition("}")
    if not end:
        raise DataError(f"{where} is cut off: there is no }} behind its points; copy it again")
    return numbers.split()


def pts_text(xy: NDArray[np.floating]) -> str:
    """An iBUG `.pts` text of `(k, 2)` 0-based points, which counts pixels from 1."""
    lines = [f"{x + 1:.3f} {y + 1:.3f}" for x, y in np.asarray(xy, np.float64)]
    return "\n".join(["version: 1", f"n_points: {len(lines)}", "{", *lines, "}", ""])


def pts_files(folder: Path) -> list[Path]:
    """The `.pts` files of a folder and of those in it, in order; cameras write suffixes in capitals."""
    return files_below(folder, (".pts",))


def image_beside(label: Path) -> Path | None:
    """The photo that a `.pts` file is about: of its stem, in its folder; None where there is none.

    Several faces of `a.jpg` are written as `a_0.pts`, `a_1.pts` and so on. So they are taken where none of them has a
    photo of its own, and there is no `a.pts`.
    """
    stem, whole = label.with_suffix(""), label.with_name(label.stem.rpartition("_")[0] or label.stem)
    photo = _photo_of(stem)
    if photo or not (shared := _photo_of(whole)) or Path(f"{whole}.pts").exists():
        return photo
    numbered = (Path(f"{whole}_{i}") for i in itertools.count())
    faces = list(itertools.takewhile(lambda face: Path(f"{face}.pts").is_file(), numbered))
    return shared if len(faces) > 1 and stem in faces and not any(map(_photo_of, faces)) else None


def _photo_of(stem: Path) -> Path | None:
    places = (Path(f"{stem}{s}") for suffix in IMAGE_SUFFIXES for s in (suffix, suffix.upper()))
    return next((place for place in places if place.is_file()), None)
