"""Makes labelled faces small enough to carry to a machine that trains: cut out, grey, as WebP.

    python scripts/pack_faces.py DATA … --out packed

DATA as for `kp train`. Each source becomes `packed/NAME.csv` with its pictures in `packed/NAME/`, for `kp train --data
packed/NAME.csv`. The pictures keep their names, so the same people are held out. Each keeps `--cut` times its face's
longer side, and is shrunk where that side has more than `--face` pixels: more than training at 224 px sees.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from kp_cli.report import one_line_errors
from kp_runtime.errors import InputError, KpError
from kp_runtime.files import write_file
from kp_runtime.geometry import boxes_from_points
from kp_runtime.interchange import faces_to_file
from kp_runtime.labelled_face import LabelledFace
from kp_runtime.scheme68 import POINTS
from kp_train.data import Face, Source, luma_from_file, read_source

CUT, FACE, QUALITY = 2.2, 190, 92


def packed_face(
    luma: NDArray[np.uint8], xy: NDArray[np.floating], cut: float = CUT, most: int = FACE
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The part around a face, and the points in it.

    Args:
        luma: `(h, w)` uint8.
        xy: `(points, 2)`, pixels of it.
        cut: the part's side, in longer sides of the box of the points; it ends at the image's edge.
        most: pixels of that longer side that are kept.

    Returns:
        `(h', w')` uint8, and `(points, 2)` float64 in its pixels.
    """
    box = boxes_from_points(xy).astype(np.float64)
    side, centre = (box[2:] - box[:2]).max(), (box[:2] + box[2:]) / 2
    size_wh = np.array(luma.shape[::-1])
    low = np.floor(centre - cut * side / 2).clip(0, size_wh - 1).astype(int)
    high = np.ceil(centre + cut * side / 2 + 1).clip(low + 1, size_wh).astype(int)
    part, moved = luma[low[1] : high[1], low[0] : high[0]], np.asarray(xy, np.float64) - low
    if side <= most:
        return part, moved
    new_wh = np.maximum(1, np.rint((high - low) * most / side)).astype(int)
    small = cv2.resize(part, (int(new_wh[0]), int(new_wh[1])), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.uint8), (moved + 0.5) * new_wh / (high - low) - 0.5


def pack(source: Source, out: Path, cut: float = CUT, most: int = FACE, quality: int = QUALITY) -> Path:
    """Writes a source's faces; the path of the CSV.

    Raises:
        DataError: an image can't be read.
        InputError: something of that name is there, which may be the labels themselves.
        KpError: a file can't be written.
    """
    path = source.path.resolve()
    name = path.stem if path.is_file() else path.name
    if there := [place for place in (out / f"{name}.csv", out / name) if place.exists()]:
        raise InputError(f"{there[0]} is already there, and nothing is written over; name another folder with --out")
    base = Path(os.path.commonpath([face.image.parent for face in source.faces]))
    images = {_plain(face, base) for face in source.faces}
    given: set[Path] = set()
    faces = []
    for face in track(source.faces, name):
        image = _name(_plain(face, base), images, given)
        part, xy = packed_face(luma_from_file(face.image), face.xy, cut, most)
        done, data = cv2.imencode(".webp", part, [cv2.IMWRITE_WEBP_QUALITY, quality])
        if not done:
            raise KpError(
                f"this OpenCV can't write WebP, so {face.image} was not packed; install opencv-python-headless"
            )
        write_file(out / name / image, data.tobytes())
        faces.append(LabelledFace(str(image), xy, size_hw=(part.shape[0], part.shape[1])))
    return faces_to_file(faces, out / f"{name}.csv", "csv")[0]


def _plain(face: Face, base: Path) -> Path:
    return face.image.relative_to(base).with_suffix("")


def _name(plain: Path, images: set[Path], given: set[Path]) -> Path:
    """A face's picture: its image's name, numbered where that is given already, so that the person stays the same."""
    name, number, mark = plain, 1, "-" if "_" in plain.name else "_"  # the person is what stands before the last "_"
    while name in given or (number > 1 and name in images):
        number += 1
        name = plain.with_name(f"{plain.name}{mark}{number}")
    given.add(name)
    return name.with_name(f"{name.name}.webp")


def main() -> None:
    """Packs the sources and says how large they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="as kp train --data takes them, without weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", type=int, default=POINTS, help="of a face, as for kp train (%(default)s)")
    parser.add_argument(
        "--cut", type=float, default=CUT, help="what is kept, in longer sides of the face (%(default)s)"
    )
    parser.add_argument("--face", type=int, default=FACE, help="most pixels of that side (%(default)s)")
    parser.add_argument("--quality", type=int, default=QUALITY, help="of WebP, 1 to 100 (%(default)s)")
    args = parser.parse_args()
    if not (args.cut >= 1 and args.face >= 1 and 1 <= args.quality <= 100):
        raise InputError("--cut and --face must be 1 or more, --quality 1 to 100")
    for source in (read_source(data, points=args.points) for data in args.data):
        path = pack(source, args.out, args.cut, args.face, args.quality)
        size = sum(file.stat().st_size for file in path.with_suffix("").rglob("*.webp"))
        print(f"{path}: {len(source.faces)} faces, {size / 1e6:.1f} MB of pictures")


if __name__ == "__main__":
    with one_line_errors("pack_faces"):
        main()
