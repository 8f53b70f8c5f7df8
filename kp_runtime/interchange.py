"""Labelled faces in the files that other tools read and write: `.pts`, COCO, CSV, Parquet.

| format | file | pixels are counted from |
|---|---|---|
| `pts` | a folder of iBUG `.pts` files, one a face, or one such file | 1 |
| `coco` | JSON of COCO's keypoint task: category `face` with 68 named points | 0 |
| `csv` | a header line or none, then image, 136 numbers, or with face and box between, as `kp predict` writes it | 0 |
| `parquet` | columns image, face, box (4 numbers), keypoints (136 numbers) | 0 |

In memory an integer is a pixel's centre and pixels count from 0; numbers are kept to a thousandth of
a pixel. What a format has no place for (a box in `.pts`, the image's size in all but COCO) is left out. The rows of a
CSV have one length, so its faces have all a box or none has.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kp_runtime.coco import check_coco, read_coco, write_coco
from kp_runtime.errors import DataError, InputError
from kp_runtime.face_table import import_pyarrow, read_csv, read_parquet, write_csv, write_parquet
from kp_runtime.frame import image_from_file
from kp_runtime.labelled_face import LabelledFace, checked_points, face_numbers, text_of, write_text
from kp_runtime.pts import image_beside, numbers_of_pts, pts_files, pts_text
from kp_runtime.scheme68 import POINTS

__all__ = [
    "FORMATS",
    "check_format",
    "faces_from_file",
    "faces_to_file",
    "format_of",
    "with_sizes",
]


def format_of(path: Path) -> str:
    """The format of a path, by its suffix: a folder and `.pts`, `.json`, `.csv`, `.parquet`.

    Raises:
        InputError: another suffix.
    """
    named = {".pts": "pts", ".json": "coco", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix.lower())
    if named is None and (path.is_dir() or not path.suffix):
        return "pts"
    if named is None:
        raise InputError(f"{path} has a suffix of no known format; name it .pts, .json, .csv or .parquet, or a folder")
    return named


def check_format(kind: str, points: int = POINTS) -> None:
    """Whether files of this format can be written here, before any work is done for one.

    Args:
        kind: one of `FORMATS`.
        points: how many each face has.

    Raises:
        InputError: no such format, or it has no place for so many points.
        MissingExtraError: Parquet without pyarrow.
    """
    _format(kind)
    if kind == "coco":
        check_coco(points)
    if kind == "parquet":
        import_pyarrow()


def faces_from_file(path: Path, kind: str | None = None, points: int = POINTS) -> list[LabelledFace]:
    """Reads labelled faces.

    Args:
        path: the file, or for `pts` a folder, searched with its subfolders.
        kind: one of `FORMATS`; by the suffix when None.
        points: how many each face has.

    Raises:
        InputError: no such format.
        DataError: the file can't be read, a face in it has not that many finite points, or one is at 0, 0 or -1, -1,
            as data sets write what is not labelled.
        MissingExtraError: Parquet without pyarrow.
    """
    kind = kind or format_of(path)
    read, _ = _format(kind)
    try:
        path.stat()  # a folder that is not there is no empty one
        faces = read(path, points)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error
    if not faces:
        raise DataError(f"{path} holds no labelled face{_EMPTY.get(kind, '')}")
    return faces


def faces_to_file(
    faces: Sequence[LabelledFace], path: Path, kind: str | None = None, as_labels: bool = False
) -> list[Path]:
    """Writes labelled faces; what lies there is kept whole until the new file is.

    Args:
        faces: none make a file without rows, and no `.pts` file.
        path: the file; for `pts` a folder, or a `.pts` file where there is one face.
        kind: one of `FORMATS`; by the suffix when None.
        as_labels: `.pts` files lie in the folders of their images' names below `path`, where training looks for the
            images, and replace none, which may be a label made by hand.

    Returns:
        The paths written.

    Raises:
        InputError: no such format, two faces that would be one `.pts` file, one that is there already with `as_labels`,
            or an image of unknown size for COCO.
        KpError: the file can't be written.
        MissingExtraError: Parquet without pyarrow.
    """
    kind = kind or format_of(path)
    _, write = _format(kind)
    return _write_pts(faces, path, as_labels) if kind == "pts" else write(faces, path)


def with_sizes(faces: Sequence[LabelledFace], images: Path) -> list[LabelledFace]:
    """The same faces with the size of each image, read where it is not known.

    Args:
        faces: of `faces_from_file`.
        images: the folder that their paths start from.

    Raises:
        ImageError: an image can't be read.
    """
    names = {face.image for face in faces if face.size_hw is None}
    shapes = {name: image_from_file(images / name).shape for name in names}
    return [
        face if face.size_hw else replace(face, size_hw=(shapes[face.image][0], shapes[face.image][1]))
        for face in faces
    ]


def _format(kind: str) -> tuple[Reader, Writer]:
    if kind not in FORMATS:
        raise InputError(f"there is no format {kind!r}; choose from {', '.join(FORMATS)}")
    return FORMATS[kind]


# .pts


def _read_pts(path: Path, points: int) -> list[LabelledFace]:
    if path.is_file():
        return [_pts_face(path, path.parent, points)]
    return [_pts_face(file, path, points) for file in pts_files(path)]


def _pts_face(file: Path, folder: Path, points: int) -> LabelledFace:
    image, where = image_beside(file) or file.with_suffix(""), str(file)
    xy = checked_points(numbers_of_pts(text_of(file), where), where, points) - 1
    return LabelledFace(image.relative_to(folder).as_posix(), xy, where=where)


def _write_pts(faces: Sequence[LabelledFace], path: Path, as_labels: bool = False) -> list[Path]:
    texts = _pts_texts(faces, path, as_labels)
    if as_labels and (there := [str(place) for place in texts if os.path.lexists(place)]):
        raise InputError(f"{there[0]} is there already and may be a label made by hand; name another place")
    return [write_text(place, text) for place, text in texts.items()]


def _pts_texts(faces: Sequence[LabelledFace], path: Path, folders: bool) -> dict[Path, str]:
    """Each file's place and text; with `folders` those of the images' names are kept, where they lie below `path`."""
    if not faces:
        return {}
    if path.suffix.lower() == ".pts" and not path.is_dir():
        if len(faces) > 1:
            raise InputError(f"{path} can hold one face, not {len(faces)}; name a folder")
        return {path: pts_text(faces[0].xy)}
    many = Counter(face.image for face in faces)
    texts: dict[Path, str] = {}
    for face, number in zip(faces, face_numbers(faces), strict=True):
        image = Path(face.image)  # of frame.0001 and photo.v2 all is the name
        stem = image.stem if re.fullmatch(r"\.[A-Za-z][A-Za-z0-9]{2,3}", image.suffix) else image.name
        folder = image.parent if folders and not image.anchor and ".." not in image.parts else Path()
        name = folder / (stem + (f"_{number}" if many[face.image] > 1 else "") + ".pts")
        if path / name in texts:
            raise InputError(f"{face.image} and a photo before it would both be {name}; write json or csv instead")
        texts[path / name] = pts_text(face.xy)
    return texts


Reader = Callable[[Path, int], list[LabelledFace]]
Writer = Callable[[Sequence[LabelledFace], Path], list[Path]]

FORMATS: dict[str, tuple[Reader, Writer]] = {
    "pts": (_read_pts, _write_pts),
    "coco": (read_coco, write_coco),
    "csv": (read_csv, write_csv),
    "parquet": (read_parquet, write_parquet),
}
"""What can be read and written."""

_EMPTY = {
    "pts": ": there are no .pts files in it or below it; give the folder that holds the labelled photos",
    "csv": ": it has no rows below its header line",
}
"""What a file without faces lacks."""
