"""Photos on a disk to keypoints on a disk: drawn pictures, JSON, and the formats of `interchange`."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.detect import Detector
from kp_runtime.draw import put_boxes, put_keypoints
from kp_runtime.errors import ImageError, InputError, KpError, reason_of
from kp_runtime.files import files_with_suffix, write_file
from kp_runtime.frame import IMAGE_SUFFIXES, OTHER_SUFFIXES, bgr_copy, cv2_name, image_from_file, import_cv2
from kp_runtime.geometry import frame_box
from kp_runtime.interchange import check_format, faces_to_file
from kp_runtime.labelled_face import LabelledFace
from kp_runtime.pipeline import Model
from kp_runtime.results import Keypoints
from kp_runtime.scheme68 import POINTS
from kp_runtime.timing import StageTimer

__all__ = [
    "FORMATS",
    "FailedPhoto",
    "NotDrawnError",
    "Photo",
    "check_formats",
    "faces_seen",
    "photos_from_paths",
    "predict_photo",
    "results_json",
    "unread_pictures",
    "write_results",
]

_PLACES = {"csv": "keypoints.csv", "pts": ".", "coco": "keypoints.coco.json", "parquet": "keypoints.parquet"}
FORMATS = ("json", *_PLACES)


@dataclass(frozen=True)
class Photo:
    """A photo's path, its keypoints, and where the drawn copy lies, if one was written."""

    path: Path
    keypoints: Keypoints
    drawn: Path | None


class NotDrawnError(ImageError):
    """A photo's keypoints were found, but its drawn copy can't be written.

    Attributes:
        photo: its path and its keypoints.
    """

    def __init__(self, message: str, photo: Photo) -> None:
        super().__init__(message)
        self.photo = photo


@dataclass(frozen=True)
class FailedPhoto:
    """A photo's path, and why it has no keypoints."""

    path: Path
    error: str


def photos_from_paths(paths: Sequence[Path]) -> list[Path]:
    """Photos named one by one or by folder (not its subfolders), in order.

    Raises:
        ImageError: a path is not there or no file, or a folder holds no photo.
    """
    photos: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = files_with_suffix(path.iterdir(), IMAGE_SUFFIXES)
            if not inside:
                left = "".join(f"; {line}" for line in unread_pictures([path]))
                raise ImageError(f"{path} holds no photos ({', '.join(IMAGE_SUFFIXES)}){left}")
            photos += inside
        elif path.is_file():
            photos.append(path)
        elif path.exists():
            raise ImageError(f"{path} is a pipe or a device; photos are read from files: write it into one first")
        else:
            address = "; of an address, download it first" if re.match("[a-z][a-z0-9]+:/", str(path)) else ""
            raise ImageError(f"there is no photo or folder at {path}{address}")
    return photos


def unread_pictures(paths: Sequence[Path]) -> list[str]:
    """A line a folder that holds pictures in formats which `photos_from_paths` leaves out."""
    lines = []
    for folder in filter(Path.is_dir, paths):
        if left := files_with_suffix(folder.iterdir(), OTHER_SUFFIXES):
            names = ", ".join(path.name for path in left[:3]) + f" and {len(left) - 3} more" * (len(left) > 3)
            lines.append(f"{folder} holds pictures whose format is not read: {names}; save them as JPEG")
    return lines


def predict_photo(
    model: Model,
    path: Path,
    *,
    detector: Detector | None = None,
    boxes_xyxy: NDArray[np.float64] | None = None,
    drawn: Path | None = None,
    draw: Callable[[NDArray[np.uint8], NDArray[np.float32]], NDArray[np.uint8]] | None = None,
    draw_lost: bool = True,
    timer: StageTimer | None = None,
    looks: int = 1,
    mirror: bool = False,
) -> Photo:
    """Reads one photo, finds its faces and their keypoints, and draws them.

    Args:
        model: a loaded model.
        path: the photo.
        detector: finds the boxes when `boxes_xyxy` is None.
        boxes_xyxy: `(n, 4)` boxes in pixels of the photo, in the keypoint convention.
        drawn: where to write the drawn copy; not drawn when None.
        draw: draws on the image the points `(n, 68, 2)`, such as an `effects.Effect`; when None,
            boxes, and the points of those in which the model sees a face.
        draw_lost: whether `draw` gets the points too of boxes in which the model sees no face.
        timer: collects the stages read, detect, crop, infer, map back; on a GPU it slows each call.
        looks: see `Model.__call__`.
        mirror: likewise.

    Raises:
        ImageError: the photo can't be read, or is too large for the memory.
        BoxError: a given box is not usable.
        NotDrawnError: the drawn copy can't be written; the error has the keypoints.
    """
    stage: Any = timer or contextlib.nullcontext
    with _named(path):
        with stage("read"):
            image = image_from_file(path)
        if boxes_xyxy is None:
            if model.spec.box == "frame":
                boxes_xyxy = frame_box((image.shape[0], image.shape[1]))[None]
            elif detector is not None:
                with stage("detect"):
                    boxes_xyxy = detector(image)
            else:
                raise InputError("give boxes or a detector")
        keypoints = model(image, boxes_xyxy, timer=timer, looks=looks, mirror=mirror)
    if drawn is not None:
        try:
            with _named(path):
                seen = keypoints.xy[faces_seen(keypoints, model.spec.lost_limit)]
                if draw is None:
                    picture = bgr_copy(image)
                    put_boxes(picture, keypoints.boxes_xyxy)
                    put_keypoints(picture, seen)
                else:
                    picture = draw(image, keypoints.xy if draw_lost else seen)
                _write_picture(picture, drawn)
        except KpError as error:
            raise NotDrawnError(f"{path} was not drawn: {error}", Photo(path, keypoints, None)) from error
    return Photo(path, keypoints, drawn)


def faces_seen(keypoints: Keypoints, lost_limit: float | None) -> NDArray[np.bool_]:
    """Which boxes hold a face by their lost scores, `(n,)` bool; all, where the model gives none."""
    if keypoints.lost_score is None or lost_limit is None:
        return np.ones(len(keypoints), np.bool_)
    return keypoints.lost_score <= lost_limit


@contextlib.contextmanager
def _named(photo: Path) -> Iterator[None]:
    """Of one photo, too little memory and what OpenCV can't do are a fault like any other."""
    try:
        yield
    except (MemoryError, import_cv2().error) as error:
        raise ImageError(f"{photo} is too large for the memory, or OpenCV failed: {reason_of(error)}") from error


def _write_picture(picture: NDArray[np.uint8], path: Path) -> None:
    cv2 = import_cv2()
    try:
        done, encoded = cv2.imencode(cv2_name(path.suffix), picture)
    except cv2.error as error:
        raise ImageError(f"OpenCV can't write a picture as {path.name!r}; use .jpg or .png") from error
    if not done:
        height, width = picture.shape[:2]
        raise ImageError(f"OpenCV can't write a picture of {width} x {height} px as {path.name!r}; use .png")
    write_file(path, encoded.tobytes())


def check_formats(formats: Sequence[str], points: int = POINTS) -> None:
    """Whether `write_results` can write them of faces with so many points, before a photo is read.

    Raises:
        InputError: an unknown format, or one that has no place for so many points.
        MissingExtraError: Parquet without pyarrow.
    """
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"there is no format {name!r}; choose from {', '.join(FORMATS)}")
        if name != "json":
            check_format(name, points)


def write_results(photos: Sequence[Photo | FailedPhoto], out: Path, name: str) -> list[Path]:
    """Writes one format into a folder: `keypoints.json`, `.csv`, `.coco.json`, `.parquet`, or a `.pts` file a face.

    Photos without a face, and those that failed, are in `keypoints.json` alone.

    Returns:
        The paths written.

    Raises:
        InputError, MissingExtraError: as `check_formats`.
        KpError: a file can't be written, such as where two faces' `.pts` files would have one name.
    """
    check_formats([name])
    if name == "json":
        write_file(out / "keypoints.json", json.dumps(results_json(photos), indent=1) + "\n")
        return [out / "keypoints.json"]
    faces = [
        LabelledFace(photo.path.as_posix(), xy.astype(np.float64), box, photo.keypoints.size_hw)
        for photo in photos
        if isinstance(photo, Photo)
        for xy, box in zip(photo.keypoints.xy, photo.keypoints.boxes_xyxy, strict=True)
    ]
    return faces_to_file(faces, out / _PLACES[name], name)


def results_json(photos: Sequence[Photo | FailedPhoto]) -> list[dict[str, Any]]:
    """All photos' faces as plain data: path, size, boxes, keypoints; `error` in their place where one failed."""
    return [
        {"image": photo.path.as_posix()}
        | (photo.keypoints.to_json() if isinstance(photo, Photo) else {"error": photo.error})
        for photo in photos
    ]
