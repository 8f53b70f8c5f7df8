"""Labelled faces as a table, a row a face: CSV, Parquet."""

from __future__ import annotations

import csv
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kp_runtime.errors import DataError, InputError, MissingExtraError, reason_of
from kp_runtime.files import writing
from kp_runtime.frame import IMAGE_SUFFIXES
from kp_runtime.labelled_face import (
    ODD,
    LabelledFace,
    as_text,
    checked_box,
    checked_points,
    face_numbers,
    opened_text,
    order_by_name,
    rounded,
)
from kp_runtime.scheme68 import POINTS, point_names

__all__ = ["import_pyarrow", "parquet_table", "read_csv", "read_parquet", "write_csv", "write_parquet"]


def read_csv(path: Path, points: int) -> list[LabelledFace]:
    """Those below a header line or none; the rest is as in `interchange.faces_from_file`."""
    faces = []
    try:
        with opened_text(path) as file:
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
                box = checked_box(row[2:6], where) if first == 6 else None
                faces.append(LabelledFace(row[0], checked_points(row[first:], where, points), box, where=where))
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

    `x_0`, `nose_3_y` and `y1` say it. So it is with points whose names tell another order.
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
    names = [re.sub("[_ .-]*[xXyY]$", "", column) for column in columns[::2]]
    order = order_by_name(names)
    if late := [i for i, place in enumerate(order) if i != place]:
        wanted, got = names[order[late[0]]], names[late[0]]
        raise DataError(
            f"{path}: its header's columns are sorted otherwise than the points: {got[:80]} stands where {wanted[:80]} "
            "should; put them in the points' order"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def write_csv(faces: Sequence[LabelledFace], path: Path) -> list[Path]:
    """Writes the faces below a header line, all with a box or none.

    Raises:
        InputError: some faces have a box, and others not.
        KpError: the file can't be written.
    """
    count = len(faces[0].xy) if faces else POINTS
    names = point_names() if count == POINTS else tuple(f"point_{i}" for i in range(count))
    columns = [f"{name}_{axis}" for name in names for axis in "xy"]
    whole = not faces or faces[0].box_xyxy is not None
    if odd := [face.image for face in faces if (face.box_xyxy is not None) is not whole]:
        raise InputError(
            f"{path}: some faces have a box, and others, as one of {odd[0]}, have not, which a CSV has no place for; "
            "write coco or parquet instead"
        )
    with writing(path) as temporary, temporary.open("w", encoding="utf-8", errors=ODD, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", *(["face", "x0", "y0", "x1", "y1"] if whole else []), *columns])
        for face, index in zip(faces, face_numbers(faces), strict=True):
            middle = [] if face.box_xyxy is None else [index, *rounded(face.box_xyxy)]
            writer.writerow([face.image, *middle, *rounded(face.xy)])
    return [path]


def read_parquet(path: Path, points: int) -> list[LabelledFace]:
    """Those of a file with the columns of `parquet_table`; the rest is as in `interchange.faces_from_file`."""
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
            box = None if row["box"] is None else checked_box(row["box"], where)
            faces.append(LabelledFace(row["image"], checked_points(row["keypoints"], where, points), box, where=where))
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
            "face": pa.array(face_numbers(faces), pa.int32()),
            "box": pa.array([None if f.box_xyxy is None else rounded(f.box_xyxy) for f in faces], numbers),
            "keypoints": pa.array([rounded(face.xy) for face in faces], numbers),
        }
    )


def write_parquet(faces: Sequence[LabelledFace], path: Path) -> list[Path]:
    """Writes the columns of `parquet_table`.

    Raises:
        KpError: the file can't be written.
        MissingExtraError: pyarrow is not installed.
    """
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
