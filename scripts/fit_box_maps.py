"""Fits the detectors' box maps (`kp_runtime/detect.py`) on training faces and prints them.

    python scripts/fit_box_maps.py DATA … [--yunet MODEL.onnx] [--most N]

DATA as for `kp train`. A detection counts where `box_of_face` takes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.progress import track

from kp_cli.report import one_line_errors
from kp_runtime.detect import HaarDetector, YuNetDetector, map_from_pairs
from kp_runtime.errors import DataError, InputError
from kp_runtime.frame import Frame
from kp_runtime.geometry import box_of_face, boxes_from_points
from kp_train.data import Face, evenly_spread, luma_from_file, parse_source


def pairs(detector: HaarDetector | YuNetDetector, faces: list[Face]) -> tuple[np.ndarray, np.ndarray]:
    """Matched boxes: the detector's and the keypoints'."""
    found, wanted = [], []
    for face in track(faces, type(detector).__name__):
        raw = box_of_face(detector.raw(Frame(luma_from_file(face.image), "gray")), face.xy)
        if raw is not None:
            found.append(raw)
            wanted.append(boxes_from_points(face.xy))
    if not found:
        raise DataError(f"{type(detector).__name__} found none of {len(faces)} faces; name other data")
    return np.array(found), np.array(wanted)


def main() -> None:
    """Fits and prints the map of each detector."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--yunet", type=Path)
    parser.add_argument("--most", type=int, default=1000, help="faces of each source, evenly spread")
    args = parser.parse_args()
    if args.most < 1:
        raise InputError("--most must be 1 or more")
    faces: list[Face] = []
    for source in map(parse_source, args.data):
        faces += [source.faces[i] for i in evenly_spread(len(source.faces), args.most)]
    detectors: list[HaarDetector | YuNetDetector] = [HaarDetector()]
    if args.yunet:
        detectors.append(YuNetDetector(args.yunet))
    for detector in detectors:
        found, wanted = pairs(detector, faces)
        fitted = map_from_pairs(found, wanted)
        error = (fitted.apply(found) - wanted) / (wanted[:, 2:] - wanted[:, :2]).max(axis=1, keepdims=True)
        spread = ", ".join(f"{value:.3f}" for value in error.std(axis=0))
        print(f"{type(detector).__name__}: {fitted}; {len(found)} of {len(faces)} faces; spread of the edges {spread}")


if __name__ == "__main__":
    with one_line_errors("fit_box_maps"):
        main()
