"""What is fuzzed, and how much of each."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's packages, and tests.models

import fuzz_bundles as bundles
import fuzz_inputs as inputs

__all__ = ["TARGETS", "Case", "Target"]

Case = Callable[[random.Random], object]


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        prepare: makes the valid inputs in a folder and gives the function of a case.
        weight: share of the cases, in cases of a thousand.
        slow_start: imports torch; such targets share their processes.
    """

    prepare: Callable[[Path], Case]
    weight: int
    slow_start: bool = False


TARGETS = {
    "manifest": Target(bundles.manifest_case, 160),
    "bundle": Target(bundles.bundle_case, 30),
    "signature": Target(bundles.signature_case, 60),
    "golden": Target(bundles.golden_case, 90),
    "onnx": Target(bundles.onnx_case, 130),
    "operators": Target(bundles.operators_case, 30),
    "plan": Target(bundles.plan_case, 70),
    "image": Target(inputs.image_case, 140),
    "boxes": Target(inputs.boxes_case, 60),
    "frame": Target(inputs.frame_case, 60),
    "bench": Target(inputs.bench_case, 60),
    "tuned": Target(inputs.tuned_case, 60),
    "effect": Target(inputs.effect_case, 40),
    "labels": Target(inputs.labels_case, 60),
    "detector": Target(bundles.detector_case, 40),
    "csv": Target(inputs.csv_case, 40, slow_start=True),
    "pts": Target(inputs.pts_case, 40, slow_start=True),
    "state": Target(bundles.state_case, 25, slow_start=True),
    "checkpoint": Target(bundles.checkpoint_case, 5, slow_start=True),
}
