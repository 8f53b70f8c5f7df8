"""Measures face detectors beside each other: faces found, false boxes, how far the boxes are off, time.

    python scripts/measure_detectors.py DATA … [--held-out SHARE] [--own BUNDLE] [--yunet MODEL.onnx] [--scores]

DATA as for `kp train`; `--held-out 0.1` takes the faces that training holds out alone. A face is found where a box
overlaps that of its points by more than 0.4. A false box is every one but one on the labelled face, counted on the
photos in which YuNet sees no other face even at a score of 0.3 (without --yunet: on all photos, so that boxes of faces
that nobody labelled count too). The detectors take turns on each photo, on one thread; times are ratios to Haar's
on this machine. `--scores` prints the own detector's numbers by least score.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

from kp_cli.report import one_line_errors, print_table
from kp_runtime.center_detector import CenterDetector
from kp_runtime.detect import HaarDetector, YuNetDetector
from kp_runtime.errors import InputError
from kp_runtime.frame import Frame
from kp_runtime.geometry import boxes_from_points, overlaps
from kp_train.data import is_held_out, luma_from_file, parse_source

SAME = 0.4
SCORES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)


@dataclass
class Tally:
    """What a detector did on the photos so far."""

    found: int = 0
    largest: int = 0
    nothing: int = 0
    false: int = 0
    edges: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, boxes: np.ndarray, truth: np.ndarray, alone: bool, seconds: float) -> None:
        """Counts one photo: the detector's boxes, largest first, the face's, and whether it is the only face."""
        self.seconds.append(seconds)
        shares = overlaps(boxes, truth[None])[:, 0] if len(boxes) else np.zeros(0)
        hit = bool((shares > SAME).any())
        self.found += hit
        self.largest += bool(len(shares) and shares[0] > SAME)
        self.nothing += not len(boxes)
        if alone:
            self.false += len(boxes) - hit
        if hit:
            self.edges.append((boxes[shares.argmax()] - truth) / (truth[2:] - truth[:2]).max())

    def row(self, name: str, photos: int, alone: int, haar: float) -> list[str]:
        """The detector's line of the table."""
        off = np.array(self.edges)
        return [
            name,
            *(f"{count / photos:.1%}" for count in (self.found, self.largest, self.nothing)),
            f"{self.false / max(1, alone):.3f}",
            *((f"{np.abs(off).mean():.3f}", f"{off.std(axis=0).mean():.3f}") if len(off) else ("none", "none")),
            f"{np.median(self.seconds) / haar:.2f}",
        ]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--held-out", type=float)
    parser.add_argument("--own", type=Path)
    parser.add_argument("--yunet", type=Path)
    parser.add_argument("--scores", action="store_true")
    args = parser.parse_args()
    if args.scores and not args.own:
        raise InputError("--scores is about the own detector; name its bundle too: --own engines/face-detector")
    cv2.setNumThreads(1)
    faces = [face for source in map(parse_source, args.data) for face in source.faces]
    faces = [face for face in faces if args.held_out is None or is_held_out(face.person, args.held_out)]
    if not faces:
        raise InputError("no face is left to measure on; name other data, or a larger share with --held-out")
    detectors: dict[str, Callable[[Frame], np.ndarray]] = {"Haar": HaarDetector()}
    if args.yunet:
        detectors["YuNet"] = YuNetDetector(args.yunet)
    if args.own:
        own = CenterDetector(args.own, threads=1)
        detectors[f"own, {own.score:g}"] = own
        for score in SCORES if args.scores else ():
            detectors[f"own, {score:g}"] = CenterDetector(args.own, score=score, threads=1)
    witness = YuNetDetector(args.yunet, score=0.3) if args.yunet else None

    tallies = {name: Tally() for name in detectors}
    alone = 0
    for face in track(faces):
        frame, truth = Frame(luma_from_file(face.image), "gray"), boxes_from_points(face.xy)
        is_alone = witness is None or not others(witness(frame), truth)
        alone += is_alone
        for name, detector in detectors.items():
            start = time.perf_counter()
            boxes = detector(frame)
            tallies[name].add(boxes, truth, is_alone, time.perf_counter() - start)
    print(f"{len(faces)} photos, {alone} of them with one face alone")
    haar = float(np.median(tallies["Haar"].seconds))
    rows = [tally.row(name, len(faces), alone, haar) for name, tally in tallies.items()]
    head = ["detector", "found", "largest box", "no box", "false/photo", "edges off", "spread", "time/Haar"]
    print_table("", head, rows)


def others(boxes: np.ndarray, truth: np.ndarray) -> bool:
    """Whether a box is of another face than the labelled one."""
    return bool(len(boxes)) and bool((overlaps(boxes, truth[None])[:, 0] < 0.2).any())


if __name__ == "__main__":
    with one_line_errors("measure_detectors"):
        main()
