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

import contextlib
import csv
import importlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from kp_runtime.errors import DataError, InputError, MissingExtraError, reason_of
from kp_runtime.files import writing
from kp_runtime.frame import IMAGE_SUFFIXES, image_from_file
from kp_runtime.geometry import boxes_from_points
from kp_runtime.pts import image_beside, numbers_of_pts, pts_files, pts_text
from kp_runtime.scheme68 import CONTOURS, POINTS, point_names

__all__ = [
    "FORMATS",
    "LabelledFace",
    "as_text",
    "check_format",
    "faces_from_file",
    "faces_to_file",
    "format_of",
    "import_pyarrow",
    "parquet_table",
    "with_sizes",
]

_ODD = "backslashreplace"
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
    if kind == "coco" and points != POINTS:
        raise InputError(f"COCO files are of the {POINTS} points alone, not of {points}; write json or csv")
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


def _points(numbers: Any, where: str, points: int) -> NDArray[np.float64]:
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


def _box(numbers: Any, where: str) -> NDArray[np.float64]:
    try:
        box = np.array(numbers, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: a number of the box is none ({str(error)[:80]})") from error
    if box.shape != (4,) or not np.isfinite(box).all():
        raise DataError(f"{where}: a box must have 4 finite numbers")
    return box


def _rounded(values: NDArray[np.floating]) -> list[float]:
    rounded: list[float] = np.round(np.asarray(values, np.float64).ravel(), 3).tolist()
    return rounded


# .pts


def _read_pts(path: Path, points: int) -> list[LabelledFace]:
    if path.is_file():
        return [_pts_face(path, path.parent, points)]
    return [_pts_face(file, path, points) for file in pts_files(path)]


def _pts_face(file: Path, folder: Path, points: int) -> LabelledFace:
    image, where = image_beside(file) or file.with_suffix(""), str(file)
    xy = _points(numbers_of_pts(_text(file), where), where, points) - 1
    return LabelledFace(image.relative_to(folder).as_posix(), xy, where=where)


def _write_pts(faces: Sequence[LabelledFace], path: Path, as_labels: bool = False) -> list[Path]:
    texts = _pts_texts(faces, path, as_labels)
    if as_labels and (there := [str(place) for place in texts if os.path.lexists(place)]):
        raise InputError(f"{there[0]} is there already and may be a label made by hand; name another place")
    return [_write(place, text) for place, text in texts.items()]


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
    for face, number in zip(faces, _face_numbers(faces), strict=True):
        image = Path(face.image)  # of frame.0001 and photo.v2 all is the name
        stem = image.stem if re.fullmatch(r"\.[A-Za-z][A-Za-z0-9]{2,3}", image.suffix) else image.name
        folder = image.parent if folders and not image.anchor and ".." not in image.parts else Path()
        name = folder / (stem + (f"_{number}" if many[face.image] > 1 else "") + ".pts")
        if path / name in texts:
            raise InputError(f"{face.image} and a photo before it would both be {name}; write json or csv instead")
        texts[path / name] = pts_text(face.xy)
    return texts


# COCO keypoints: https://cocodataset.org/#format-data


def _read_coco(path: Path, points: int) -> list[LabelledFace]:
    text = _text(path)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({str(error)[:80]}); is it cut off?") from error
    if isinstance(document, list):
        raise DataError(
            f"{path} is a list, as kp predict writes its own JSON, and no COCO file; "
            "run kp predict with --format coco, csv or parquet instead"
        )
    try:
        images = {image["id"]: image for image in document["images"]}
        ids = [image["id"] for image in document["images"]]
        names = {c["id"]: c.get("keypoints") for c in document["categories"]}
        annotations = list(document["annotations"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no COCO keypoint file: it lacks {str(error)[:80]}") from error
    if twice := [each for each, count in Counter(ids).items() if count > 1]:
        raise DataError(f"{path} has two images of the id {twice[0]!r:.40}; number them anew where files were joined")
    faces = []
    for i, annotation in enumerate(annotations):
        where = f"{path}, annotation {i}"
        try:
            if annotation["category_id"] in names and names[annotation["category_id"]] is None:
                continue  # a box of something, such as a person
            if annotation["image_id"] not in images:
                raise DataError(f"{where}: the file lists no image of the image_id {annotation['image_id']!r:.40}")
            image, flat = images[annotation["image_id"]], annotation["keypoints"]
            if len(names[annotation["category_id"]]) != points:
                raise DataError(f"{where}: its category has not the {points} points of a face")
            box = annotation.get("bbox")
            if not isinstance(image["file_name"], str):
                raise DataError(f"{where}: the image's name is no text")
            size = (int(image["height"]), int(image["width"]))
            xy = _points([value for at, value in enumerate(flat) if at % 3 != 2], where, points)
            if len(flat) != 3 * points or not all(flat[2::3]):
                raise DataError(f"{where}: a point is not labelled (visibility 0); all {points} are needed")
            corners = None if box is None else _box(box, where)
            if corners is not None:
                corners[2:] += corners[:2]
            faces.append(LabelledFace(image["file_name"], xy, corners, size, where))
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{where} lacks or has a wrong {str(error)[:80]}") from error
    return faces


def _write_coco(faces: Sequence[LabelledFace], path: Path) -> list[Path]:
    images: dict[str, dict[str, Any]] = {}
    annotations = []
    for i, face in enumerate(faces):
        check_format("coco", len(face.xy))
        if face.size_hw is None:
            raise InputError(
                f"COCO needs the height and width of {face.image}, which the source does not say; "
                f"add the folder in which {face.image} lies: --images FOLDER"
            )
        image = images.setdefault(
            face.image,
            {"id": len(images) + 1, "file_name": face.image, "height": face.size_hw[0], "width": face.size_hw[1]},
        )
        x0, y0, x1, y1 = _rounded(boxes_from_points(face.xy) if face.box_xyxy is None else face.box_xyxy)
        flat = [value for x, y in zip(*[iter(_rounded(face.xy))] * 2, strict=True) for value in (x, y, 2)]
        annotations.append({
            "id": i + 1, "image_id": image["id"], "category_id": 1, "iscrowd": 0, "num_keypoints": POINTS,
            "bbox": [x0, y0, round(x1 - x0, 3), round(y1 - y0, 3)], "area": round((x1 - x0) * (y1 - y0), 3),
            "keypoints": flat,
        })  # fmt: skip
    joined = [[a + 1, b + 1] for part in CONTOURS.values() for a, b in itertools.pairwise(part)]
    category = {
        "id": 1, "name": "face", "supercategory": "person", "keypoints": list(point_names()), "skeleton": joined,
    }  # fmt: skip
    document = {"images": list(images.values()), "annotations": annotations, "categories": [category]}
    return [_write(path, json.dumps(document) + "\n")]


# CSV


def _read_csv(path: Path, points: int) -> list[LabelledFace]:
    faces = []
    try:
        with _opened(path) as file:
            lines = csv.reader(file)
            for i, row in enumerate(row for row in lines if row):
                if i == 0 and _is_header(row):
                    _check_order(row[-2 * points :], points, path)
                    continue
                for mark, name in ((";", "semicolons"), ("\t", "tabs")):
                    if mark in row[0] and ",".join(row).count(mark) >= 2 * points:
                        what = f"its columns are separated by {name}; save it with commas, and points in the numbers"
                        raise DataError(f"{path}: {what}")
                where = f"{path}, line {lines.line_num} ({row[0][:200]})"
                first = len(row) - 2 * points
                if first not in (1, 6):
                    raise DataError(
                        f"{where}: expected a file name and {2 * points} numbers for {points} points, got "
                        f"{len(row) - 1} numbers; face and box (5 numbers) may stand between"
                    )
                box = _box(row[2:6], where) if first == 6 else None
                faces.append(LabelledFace(row[0], _points(row[first:], where, points), box, where=where))
    except csv.Error as error:
        raise DataError(f"{path} can't be read as CSV: {str(error)[:200]}") from error
    return faces


def _is_header(row: Sequence[str]) -> bool:
    """Whether the first line of a CSV of faces is a header: no image's name, or no coordinates behind it.

    A name without a suffix is an image's where numbers follow that do not just count from 0, as a table's columns.
    """
    if Path(row[0]).suffix.lower() in IMAGE_SUFFIXES or re.search("[;\t]", row[0]):  # the last: no commas between
        return False
    counted = all(text == str(i) for i, text in enumerate(row[1:]))
    return not row[0].strip() or counted or not any(map(_is_number, row[1:]))


def _check_order(columns: Sequence[str], points: int, path: Path) -> None:
    """Refuses columns whose names say, all of them and as often, x or y as their first or last word, in another order.

    `x_0`, `nose_3_y` and `y1` say it.
    """
    axes = [
        {words[0], words[-1]} & {"x", "y"} if (words := re.findall("[a-z]+", column.lower())) else set()
        for column in columns
    ]
    if axes.count({"x"}) == axes.count({"y"}) == points and axes != [{"x"}, {"y"}] * points:
        raise DataError(
            f"{path}: its header's columns begin with {columns[0][:80]}, {columns[1][:80]}; wanted are x and y of each "
            "point in turn: x0, y0, x1, y1 …"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _write_csv(faces: Sequence[LabelledFace], path: Path) -> list[Path]:
    count = len(faces[0].xy) if faces else POINTS
    names = point_names() if count == POINTS else tuple(f"point_{i}" for i in range(count))
    columns = [f"{name}_{axis}" for name in names for axis in "xy"]
    whole = not faces or faces[0].box_xyxy is not None
    if odd := [face.image for face in faces if (face.box_xyxy is not None) is not whole]:
        raise InputError(
            f"{path}: some faces have a box, and others, as one of {odd[0]}, have not, which a CSV has no place for; "
            "write coco or parquet instead"
        )
    with writing(path) as temporary, temporary.open("w", encoding="utf-8", errors=_ODD, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", *(["face", "x0", "y0", "x1", "y1"] if whole else []), *columns])
        for face, index in zip(faces, _face_numbers(faces), strict=True):
            middle = [] if face.box_xyxy is None else [index, *_rounded(face.box_xyxy)]
            writer.writerow([face.image, *middle, *_rounded(face.xy)])
    return [path]


def _face_numbers(faces: Sequence[LabelledFace]) -> list[int]:
    """Which face of its image each one is, from 0."""
    seen: dict[str, int] = {}
    numbers = []
    for face in faces:
        numbers.append(seen.get(face.image, 0))
        seen[face.image] = numbers[-1] + 1
    return numbers


# Parquet


def _read_parquet(path: Path, points: int) -> list[LabelledFace]:
    pa, pq = import_pyarrow()
    faces = []
    try:
        table = pq.read_table(path, columns=["image", "box", "keypoints"])
        # few rows at a time: as Python's numbers they take many times the memory
        rows = (row for part in table.to_batches(max_chunksize=1024) for row in part.to_pylist())
        for i, row in enumerate(rows):
            where = f"{path}, row {i}"
            if not isinstance(row["image"], str):
                raise DataError(f"{where}: the image's name is no text")
            box = None if row["box"] is None else _box(row["box"], where)
            faces.append(LabelledFace(row["image"], _points(row["keypoints"], where, points), box, where=where))
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise DataError(f"{path} is no Parquet file of labelled faces ({reason_of(error, lines=1)})") from error
    return faces


def parquet_table(faces: Sequence[LabelledFace]) -> Any:
    """The `pyarrow.Table` that is written: columns image, face (its number on the image), box, keypoints."""
    pa, _ = import_pyarrow()
    numbers = pa.list_(pa.float32())
    return pa.table(
        {
            "image": pa.array([as_text(face.image) for face in faces], pa.string()),
            "face": pa.array(_face_numbers(faces), pa.int32()),
            "box": pa.array([None if f.box_xyxy is None else _rounded(f.box_xyxy) for f in faces], numbers),
            "keypoints": pa.array([_rounded(face.xy) for face in faces], numbers),
        }
    )


def _write_parquet(faces: Sequence[LabelledFace], path: Path) -> list[Path]:
    _, pq = import_pyarrow()
    table = parquet_table(faces)
    with writing(path) as temporary:
        pq.write_table(table, temporary)
    return [path]


def import_pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet, or the error that says how to get them."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "reading or writing Parquet") from error


def _text(path: Path) -> str:
    with _opened(path) as file:
        return file.read()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A text file to read, with its lines as they end."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # Excel begins a file with a mark
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error.reason}); save it as UTF-8") from error


def as_text(name: str) -> str:
    """A file's name, which may be no text, as text."""
    return name.encode("utf-8", _ODD).decode()


def _write(path: Path, text: str) -> Path:
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=_ODD)
    return path


Reader = Callable[[Path, int], list[LabelledFace]]
Writer = Callable[[Sequence[LabelledFace], Path], list[Path]]

FORMATS: dict[str, tuple[Reader, Writer]] = {
    "pts": (_read_pts, _write_pts),
    "coco": (_read_coco, _write_coco),
    "csv": (_read_csv, _write_csv),
    "parquet": (_read_parquet, _write_parquet),
}
"""What can be read and written."""

_EMPTY = {
    "pts": ": there are no .pts files in it or below it; give the folder that holds the labelled photos",
    "csv": ": it has no rows below its header line",
}
"""What a file without faces lacks."""
