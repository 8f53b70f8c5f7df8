"""Labelled faces as JSON of COCO's keypoint task: category `face` with 68 named points.

The format: <https://cocodataset.org/#format-data>.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kp_runtime.errors import DataError, InputError
from kp_runtime.geometry import boxes_from_points
from kp_runtime.labelled_face import (
    LabelledFace,
    checked_box,
    checked_points,
    order_by_name,
    rounded,
    text_of,
    write_text,
)
from kp_runtime.scheme68 import CONTOURS, POINTS, point_names

__all__ = ["check_coco", "read_coco", "write_coco"]


def check_coco(points: int) -> None:
    """Whether COCO has a place for faces of so many points.

    Raises:
        InputError: it has none.
    """
    if points != POINTS:
        raise InputError(f"COCO files are of the {POINTS} points alone, not of {points}; write json or csv")


def read_coco(path: Path, points: int) -> list[LabelledFace]:
    """Those of all categories that have keypoints, in the order of their names if these tell one.

    The rest is as in `interchange.faces_from_file`.
    """
    text = text_of(path)
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
        orders = {key: order_by_name([str(name) for name in of or ()]) for key, of in names.items()}
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
            xy = checked_points([value for at, value in enumerate(flat) if at % 3 != 2], where, points)
            if len(flat) != 3 * points or not all(flat[2::3]):
                raise DataError(f"{where}: a point is not labelled (visibility 0); all {points} are needed")
            corners = None if box is None else checked_box(box, where)
            if corners is not None:
                corners[2:] += corners[:2]
            xy = xy[orders[annotation["category_id"]]]
            known = size if min(size) > 0 else None  # some tools write 0 x 0 where they do not know
            faces.append(LabelledFace(image["file_name"], xy, corners, known, where))
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{where} lacks or has a wrong {str(error)[:80]}") from error
    return faces


def write_coco(faces: Sequence[LabelledFace], path: Path) -> list[Path]:
    """Writes the faces, each with the size of its image.

    Raises:
        InputError: a size is not known, or a face has not 68 points.
        KpError: the file can't be written.
    """
    images: dict[str, dict[str, Any]] = {}
    annotations = []
    for i, face in enumerate(faces):
        check_coco(len(face.xy))
        if face.size_hw is None:
            raise InputError(
                f"COCO needs the height and width of {face.image}, which the source does not say; "
                f"add the folder in which {face.image} lies: --images FOLDER"
            )
        image = images.setdefault(
            face.image,
            {"id": len(images) + 1, "file_name": face.image, "height": face.size_hw[0], "width": face.size_hw[1]},
        )
        x0, y0, x1, y1 = rounded(boxes_from_points(face.xy) if face.box_xyxy is None else face.box_xyxy)
        flat = [value for x, y in zip(*[iter(rounded(face.xy))] * 2, strict=True) for value in (x, y, 2)]
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
    return [write_text(path, json.dumps(document) + "\n")]
