"""Labelled faces from the two layouts that people have, their photos, and who is held out; without torch.

Layout 1, CSV: a file name, then x0, y0, … x67, y67 (or as many points as the model has), in pixels of that
image, an integer being a pixel's centre; a header line first, or none. Layout 2, folders of photos with an iBUG
`.pts` file of the same stem beside each. `kp_runtime.interchange` reads both; a box between is left aside.

The person of a face is its file's stem up to the last underscore: both public data sets name
their files so. Splits are by person, by a hash of the name, so they do not depend on order.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.errors import DataError, ImageError
from kp_runtime.frame import IMAGE_SUFFIXES, Frame, as_frame, image_from_file
from kp_runtime.interchange import faces_from_file
from kp_runtime.labelled_face import LabelledFace, as_text
from kp_runtime.manifest import Manifest
from kp_runtime.pts import pts_files
from kp_runtime.scheme68 import EYE_CORNERS, POINTS
from kp_train.metrics import nme_unit

__all__ = [
    "Face",
    "Source",
    "evenly_spread",
    "faces_with_frames",
    "held_out_fraction",
    "held_out_of",
    "is_held_out",
    "luma_from_file",
    "luma_of_face",
    "lumas_of_faces",
    "parse_source",
    "read_source",
    "recorded_fraction",
    "sha256_of_files",
]


_WIDEST = 10
"""Times an image's longer side that a face may measure: over it a coordinate is mistyped."""


@dataclass(frozen=True)
class Face:
    """One labelled face.

    Attributes:
        image: the path of the image.
        xy: its points in pixels of the image, `(68, 2)` float32 or as many as there are.
        bias: how far each of these lies from what it names, to the right and down, in sides of the plain crop,
            `(68, 2)` float64; nothing when None. See `label_bias`.
    """

    image: Path
    xy: NDArray[np.float32]
    bias: NDArray[np.float64] | None = None

    @property
    def person(self) -> str:
        """Who it is, as far as the file's name tells."""
        return self.image.stem.rpartition("_")[0] or self.image.stem


@dataclass(frozen=True)
class Source:
    """One data source: its faces, how often they are drawn, and what was read.

    Attributes:
        path: as the user gave it.
        weight: how often each face is drawn, on the average, in an epoch.
        faces: in the order of the file or of the names.
        sha256: of the label file, or of all label files in order of their names.
        whole: nobody of it is held out.
    """

    path: Path
    weight: float
    faces: tuple[Face, ...]
    sha256: str
    whole: bool = False

    @property
    def name(self) -> str:
        """Of its file or folder, as a record keeps it."""
        return as_text(self.path.name)


def is_held_out(person: str, fraction: float) -> bool:
    """Whether a person belongs to the held-out share: fixed by the name alone."""
    bucket = int(hashlib.sha256(person.encode("utf-8", "surrogateescape")).hexdigest()[:8], 16) / 0x1_0000_0000
    return bucket < fraction


def held_out_fraction(manifest: Manifest) -> float:
    """The share of people who were held out when a model was trained.

    Raises:
        DataError: its manifest does not say.
    """
    fraction = recorded_fraction(manifest.training)
    if fraction is None:
        raise DataError(
            f"the manifest of {manifest.spec.name} does not say which people were held out; take a model of kp train"
        )
    return fraction


def recorded_fraction(training: dict[str, Any]) -> float | None:
    """The same by a run's record; None where it does not say."""
    held_out = training.get("held_out")
    fraction = held_out.get("val_fraction") if isinstance(held_out, dict) else None
    return float(fraction) if isinstance(fraction, int | float) else None


def held_out_of(sources: Sequence[Source], fraction: float) -> list[Face]:
    """The faces of held-out people of all sources together that are not whole."""
    return [f for source in sources if not source.whole for f in source.faces if is_held_out(f.person, fraction)]


def parse_source(text: str, points: int = POINTS) -> Source:
    """Reads `PATH` or `PATH=WEIGHT`, the way the command line names a source."""
    path, sign, weight = text.rpartition("=")
    if not sign or (Path(text).exists() and not Path(path).exists()):  # a folder may be named so
        return read_source(Path(text), points=points)
    try:
        value = float(weight)
    except ValueError:
        return read_source(Path(text), points=points)
    if not (math.isfinite(value) and value > 0):
        raise DataError(f"the weight of {path} must be a number over 0, got {weight}")
    return read_source(Path(path), value, points)


def read_source(path: Path, weight: float = 1.0, points: int = POINTS) -> Source:
    """Reads a CSV of points or a folder of photos with `.pts` files.

    Args:
        path: the CSV or the folder.
        weight: how often each face is drawn, on the average, in an epoch.
        points: how many points each face has.

    Raises:
        DataError: neither of the two, nothing in it, or a label that can't be read.
    """
    folder = path.is_dir()
    if not (folder or (path.is_file() and path.suffix.lower() == ".csv")):
        others = path.is_file() and path.suffix.lower() in (".json", ".parquet") and points == POINTS
        paths = (shlex.quote(str(name)) for name in (path, path.with_suffix(".csv")))
        advice = f"make one of it: kp convert {' '.join(paths)}" if others else "check the path"
        raise DataError(f"{path} is neither a CSV of {points} points nor a folder with .pts files; {advice}")
    labelled = faces_from_file(path, "pts" if folder else "csv", points)
    images = path if folder else _image_folder(path, labelled[0].image)
    if folder and (alone := [face.where for face in labelled if not (images / face.image).is_file()]):
        raise DataError(
            f"{alone[0]} has no image beside it (looked for {', '.join(IMAGE_SUFFIXES)}); put the photos there"
        )
    faces = tuple(Face(images / face.image, _checked(face)) for face in labelled)
    return Source(path, weight, faces, sha256_of_files(pts_files(path) if folder else [path]))


def _checked(face: LabelledFace) -> NDArray[np.float32]:
    """A face's points, or the error of those that have no size."""
    with np.errstate(over="ignore"):
        xy, where = face.xy.astype(np.float32), face.where
    if not np.isfinite(xy).all():
        raise DataError(f"{where}: a coordinate is over what float32 holds; correct it or remove the face")
    if np.ptp(xy, axis=0).max() < 1:
        what = "all points lie within one pixel (fractions of the image? pixels are needed)"
        raise DataError(f"{where}: {what}; correct them or remove the face")
    if nme_unit(xy[None])[0] < 1:
        what = "its outer eye corners lie on one spot, so there is no size to count its NME in"
        raise DataError(f"{where}: {what}; correct or remove the face")
    if len(xy) == POINTS and _is_mirrored(xy):
        what = "its points are a mirrored face's: 36 to 41 are the eye on the picture's left, and y counts downwards"
        raise DataError(f"{where}: {what}; bring them into iBUG's order, where left is right by scheme68.MIRROR")
    return xy


def _is_mirrored(xy: NDArray[np.float32]) -> bool:
    """Whether the 68 points, however the face is turned in the picture, lie as in a mirror.

    Of a head turned so far that its nose leaves the middle half of the jaw's breadth, nobody can tell.
    """
    jaw, eyes, down = xy[16] - xy[0], xy[EYE_CORNERS[1]] - xy[EYE_CORNERS[0]], xy[48:].mean(0) - xy[36:48].mean(0)
    frontal = abs((xy[30] - (xy[0] + xy[16]) / 2) @ jaw) < jaw @ jaw / 4
    return bool(frontal and eyes[0] * down[1] < eyes[1] * down[0])


def _image_folder(path: Path, name: str) -> Path:
    """Beside `training_frames_keypoints.csv` the photos lie in a folder of that name, in `training/`, or in its own.

    Those that `kp predict` names lie in the working folder.
    """
    names = dict.fromkeys((path.stem, path.stem.split("_")[0], ""))
    places = [path.parent / name for name in names]
    with contextlib.suppress(OSError):  # of a name that is longer than any file's
        if found := [place for place in (*places, Path()) if (place / name).is_file()]:
            return found[0]
    raise DataError(
        f"{path} names the image {name[:200]}, which is in none of: {', '.join(map(str, places))}, the working folder; "
        "put the photos into one of these folders"
    )


def sha256_of_files(files: Iterable[Path]) -> str:
    """Of all their bytes, one file behind the other."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def luma_from_file(path: Path) -> NDArray[np.uint8]:
    """Decodes an image file to grey, `(h, w)` uint8, as the run-time does.

    Raises:
        DataError: as `image_from_file`.
    """
    try:
        frame = as_frame(image_from_file(path))
    except ImageError as error:
        raise DataError(f"{error}; mend or remove it") from error
    height, width = frame.size_hw
    return frame.luma(0, 0, width, height)


def lumas_of_faces(faces: Sequence[Face]) -> list[NDArray[np.uint8]]:
    """The photo of each face, as `luma_from_file`; faces of one photo share it.

    Raises:
        DataError: one can't be read, or no point of a face lies in it, or one lies very far off it.
    """
    decoded: dict[Path, NDArray[np.uint8]] = {}
    for face in faces:
        if face.image not in decoded:
            decoded[face.image] = luma_from_file(face.image)
        _check_place(face, *decoded[face.image].shape)
    return [decoded[face.image] for face in faces]


def faces_with_frames(faces: Iterable[Face]) -> Iterator[tuple[Face, Frame]]:
    """Each face with its photo in grey, one after the other; faces of one photo in a row share its frame.

    Raises:
        DataError: as `lumas_of_faces`.
    """
    image, frame = None, None
    for face in faces:
        if frame is None or face.image != image:
            image, frame = face.image, Frame(luma_from_file(face.image), "gray")
        _check_place(face, *frame.size_hw)
        yield face, frame


def luma_of_face(face: Face) -> NDArray[np.uint8]:
    """The photo of one face, as `lumas_of_faces`."""
    return lumas_of_faces([face])[0]


def _check_place(face: Face, height: int, width: int) -> None:
    if not ((face.xy > -0.5) & (face.xy < (width - 0.5, height - 0.5))).all(axis=1).any():
        raise DataError(
            f"{face.image} has {width} x {height} pixels, and none of its face's points lies in them; "
            "correct them or remove the face"
        )
    if np.ptp(face.xy, axis=0).max() > _WIDEST * max(width, height):
        far = int(np.abs(face.xy).max(axis=1).argmax())
        raise DataError(
            f"{face.image} has {width} x {height} pixels, and its face is over {_WIDEST} times as large: point {far} "
            f"lies at {face.xy[far, 0]:g}, {face.xy[far, 1]:g}; correct it or remove the face"
        )


def evenly_spread(count: int, most: int) -> list[int]:
    """Which of `count` items to take where `most` are enough: all, or as many from the first to the last."""
    return [int(i) for i in np.linspace(0, count - 1, min(most, count))]
