"""What the run-time gives on one processor, and how far two processors are apart.

    python -m scripts.architectures record OUT.npz PHOTO [BUNDLE]
    python -m scripts.architectures compare HERE.npz THERE.npz

`record` writes the photo's grey levels, Haar's boxes, crops of several boxes and turns, and the
keypoints of each of the bundle's ONNX files. `compare` prints the differences of two such files and
exits with 1 where one is larger than allowed. `scripts/test-aarch64` calls both.
"""

from __future__ import annotations

import argparse
import platform
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.backend_by_name import CPU_ORDER, GOLDEN_TOLERANCE_PX, open_backend
from kp_runtime.detect import HaarDetector
from kp_runtime.errors import InputError, KpError
from kp_runtime.files import writing
from kp_runtime.frame import as_frame, image_from_file
from kp_runtime.geometry import matrices_from_boxes
from kp_runtime.manifest import Manifest
from kp_runtime.preprocess_cpu import crops_from_frame

__all__ = ["Difference", "compare", "main", "record", "recording"]

BOXES = np.array(
    [(181, 88, 269, 178), (100, 30, 400, 330), (0, 0, 511, 511), (-40, -30, 120, 130), (200.3, 100.7, 230.2, 131.9)]
)
"""A face as it is, large ones that are averaged in blocks first, one over the edge, one enlarged; a 512 x 512 photo."""

SIZES = (64, 112, 224)
TURNS = (0.0, 0.3)
ALLOWED_PX = {"fp32": 0.01, "fp16": GOLDEN_TOLERANCE_PX["fp16"], "int8": GOLDEN_TOLERANCE_PX["int8"]}
"""Largest distance of a keypoint between two processors, pixels of the crop.

fp32: the same arithmetic in another order. The others: what the golden check allows to one of them in a crop of 224 px.
"""


@dataclass(frozen=True)
class Difference:
    """How far two processors are apart in one thing.

    Attributes:
        name: what was compared.
        values: how many numbers or, of keypoints, points.
        differing: how many of them differ at all.
        largest: the largest difference; of keypoints the distance in pixels.
        allowed: the largest that is.
    """

    name: str
    values: int
    differing: int
    largest: float
    allowed: float

    @property
    def is_fine(self) -> bool:
        """Whether the difference is allowed; NaN never is."""
        return self.largest <= self.allowed


def record(out: Path, photo: Path, bundle: Path | None = None) -> None:
    """Writes all that is compared."""
    frame = as_frame(image_from_file(photo))
    height, width = frame.size_hw
    luma = frame.luma(0, 0, width, height)
    results: dict[str, NDArray[Any]] = {"grey levels": luma, "Haar's boxes": HaarDetector()(frame)}
    for size in SIZES:
        matrices = np.concatenate([matrices_from_boxes(BOXES, size, 1.3, angle=turn) for turn in TURNS])
        results[f"crops of {size} px"] = crops_from_frame(frame, matrices, size)
        results[f"grey crops of {size} px"] = crops_from_frame(as_frame(luma), matrices, size)
    if bundle is not None:
        manifest = Manifest.read(bundle)
        matrices = matrices_from_boxes(BOXES[:3], manifest.spec.size, manifest.spec.margin)
        crops = crops_from_frame(frame, matrices, manifest.spec.size)
        held = {entry.precision for entry in manifest.files.values() if entry.kind == "onnx"}
        for precision in [name for name in CPU_ORDER if name in held]:
            backend = open_backend(bundle, "ort-cpu", precision)
            print(f"{precision}: golden crop {backend.report.golden_error_px} px from PyTorch's", flush=True)
            results[f"keypoints {precision}"] = np.concatenate([backend.infer(crop[None]) for crop in crops])
    results["machine"] = np.array(f"{platform.machine()}, Python {platform.python_version()}")
    with writing(out) as temporary, open(temporary, "wb") as file:
        np.savez(file, **results)  # type: ignore[arg-type]


def compare(here: Path, there: Path) -> list[Difference]:
    """All differences of two recordings; one that only one of them has counts as infinite."""
    one, other = recording(here), recording(there)
    names = [name for name in one | other if name != "machine"]
    return [_difference(name, one.get(name), other.get(name)) for name in names]


def recording(path: Path) -> dict[str, NDArray[Any]]:
    """What `record` wrote.

    Raises:
        InputError: it can't be read.
    """
    try:
        with open(path, "rb") as file, np.load(file) as recorded:
            return dict(recorded)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no recording; make one with: record") from error


def _difference(name: str, one: NDArray[Any] | None, other: NDArray[Any] | None) -> Difference:
    precision = name.split()[1] if name.startswith("keypoints") else ""
    allowed = ALLOWED_PX.get(precision, 0.0)
    if one is None or other is None or one.shape != other.shape:
        return Difference(name, 0, 0, float("inf"), allowed)
    apart = np.abs(one.astype(np.float64) - other.astype(np.float64))
    if precision:
        apart = np.linalg.norm(apart, axis=-1)
    return Difference(name, apart.size, int((apart != 0).sum()), float(apart.max(initial=0)), allowed)


def main(words: list[str] | None = None) -> int:
    """The command: `record` or `compare`; 1 where a difference is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("photo", type=Path)
    recording.add_argument("bundle", type=Path, nargs="?")
    comparing = commands.add_parser("compare")
    comparing.add_argument("here", type=Path)
    comparing.add_argument("there", type=Path)
    args = parser.parse_args(words)
    try:
        if args.command == "record":
            record(args.out, args.photo, args.bundle)
            return 0
        found = compare(args.here, args.there)
    except KpError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{'':34} {'values':>9} {'differ':>9} {'largest':>11} {'allowed':>8}")
    for d in found:
        mark = "" if d.is_fine else "  TOO FAR"
        print(f"{d.name:34} {d.values:9} {d.differing:9} {d.largest:11.3g} {d.allowed:8.3g}{mark}")
    return 0 if all(d.is_fine for d in found) else 1


if __name__ == "__main__":
    sys.exit(main())
