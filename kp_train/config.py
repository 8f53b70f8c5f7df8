"""The settings of a training run, of keypoints or of the detector: a flat dataclass, stored with the weights.

And whether this processor has the arithmetic that a precision wants.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kp_runtime.errors import KpError

__all__ = ["AUGMENTS", "PRECISIONS", "RECIPES", "DetectorConfig", "TrainConfig", "has_bfloat16", "recipe"]

AUGMENTS = ("faces", "varied", "bent", "shaken", "tight", "light", "crop", "none")
"""How crops are varied, see `TrainConfig.augment`."""

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Lightning's that are of use here: in 16-true and bf16-true the labels are rounded, too."""

_MOST = 10**9
"""Of steps, epochs and faces a step: what is counted of them stays a number of 64 bits."""


@dataclass(frozen=True)
class TrainConfig:
    """What a run does; every field is an option of `kp train` or fixed by the recipe.

    Attributes:
        recipe: the name that the defaults came from.
        box: `keypoints` trains on face crops, `frame` on the original project's view.
        size: side of the crop in pixels.
        reduce: the backbone sees means of `reduce` x `reduce` pixels of the crop.
        margin: side of the crop's square, in longer sides of the box.
        epochs: most epochs; `patience` may end the run earlier.
        batch_size: faces a step, on each device.
        optimizer: `adamw` (with `weight_decay` and a one-cycle schedule) or `adam` (constant rate).
        lr: learning rate, the peak of the schedule where there is one.
        warmup: share of the steps in which the one-cycle schedule rises.
        beta: how wide the quadratic part of the SmoothL1 loss (Girshick 2015) is, in units of 50 px of a 224 px crop;
            far from zero the loss grows like the plain distance whatever `beta`. 1 is the original project's.
        ema: decay of the weight averaging a step; 0 turns it off, None is by the run's length (`resolved`).
        keep: which epoch's weights the run ends with: `best`, of the lowest held-out loss, or `last`, as suits a
            schedule that falls to nothing, and a run that begins at weights which the held-out faces chose.
        patience: epochs without a better validation loss before the run stops; 0 never stops.
        augment: `faces` (place, size, turn, mirror, light, blur, JPEG, noise, patches), `varied` (more of it, and
            faces stretched and sheared), `bent` (that, and faces bent), `shaken` (that, and all boxes err as widely as
            four in ten do before), `tight` (`shaken`, not bent; four boxes in ten do not err at all), `light` (less
            than `faces`), `crop` (random crop alone, as the original) or `none`.
        val_fraction: share of the people that are held out.
        seed: of weights, order and augmentation.
        points: of each face; another number than 68 is a mark-up of one's own.
        pairs: of points that change places in a mirrored face, such as `0-1,3-4`; none with 68 points, whose pairs are
            known. See `mirror_from_pairs`.
        precision: `32-true`, `bf16-mixed`, or, on a GPU alone, `16-mixed`.
    """

    recipe: str = "default"
    box: str = "keypoints"
    size: int = 224
    reduce: int = 1
    margin: float = 1.3
    epochs: int = 60
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 2e-3
    warmup: float = 0.15
    weight_decay: float = 0.02
    beta: float = 0.05
    ema: float | None = None
    keep: str = "best"
    patience: int = 0
    augment: str = "faces"
    val_fraction: float = 0.1
    seed: int = 68
    points: int = 68
    pairs: str = ""
    precision: str = "32-true"

    def __post_init__(self) -> None:
        _check(self.size >= 64 and self.size % 16 == 0, "size", self.size, "a multiple of 16, 64 or more")
        _check(self.reduce >= 1 and self.size % self.reduce == 0, "reduce", self.reduce, "a divisor of size")
        _check(1 <= self.epochs <= _MOST, "epochs", self.epochs, "1 to 10^9")
        _check(1 <= self.batch_size <= _MOST, "batch_size", self.batch_size, "1 to 10^9")
        _check(self.box in ("keypoints", "frame"), "box", self.box, "keypoints or frame")
        _check(self.optimizer in ("adamw", "adam"), "optimizer", self.optimizer, "adamw or adam")
        _check(0 < self.lr < 1, "lr", self.lr, "over 0 and under 1")
        _check(0 < self.warmup < 1, "warmup", self.warmup, "over 0 and under 1")
        _check(0 <= self.weight_decay < 1, "weight_decay", self.weight_decay, "0 to under 1")
        _check(0 < self.beta < 100, "beta", self.beta, "over 0 and under 100")
        _check(self.ema is None or 0 <= self.ema < 1, "ema", self.ema, "0 (off) to under 1")
        _check(self.keep in ("best", "last"), "keep", self.keep, "best or last")
        _check(self.patience >= 0, "patience", self.patience, "0 (off) or more")
        _check(self.augment in AUGMENTS, "augment", self.augment, f"one of {', '.join(AUGMENTS)}")
        _check(
            self.augment != "crop" or self.box == "frame", "augment", self.augment,
            "another one where crops are of faces: crop is for whole photos (--recipe seed)",
        )  # fmt: skip
        _check(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "over 0 and under 1")
        _check(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")
        _check(
            self.points != 68 or not self.pairs, "pairs", self.pairs,
            "left out with 68 points: they must be in iBUG's order, whose pairs are known",
        )  # fmt: skip
        _check(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")

    def resolved(self, steps: int) -> TrainConfig:
        """With a decay that suits a run of so many steps, where none is given.

        Most of the average is of the last tenth of the steps then, of 500 at most; what the run began at counts
        `exp(-10)` or less.
        """
        return self if self.ema is not None else dataclasses.replace(self, ema=max(0.0, min(0.998, 1 - 10 / steps)))


@dataclass(frozen=True)
class DetectorConfig:
    """What a run of the face detector does.

    Attributes:
        steps: of the optimiser.
        batch_size: windows a step.
        lr: learning rate, but for the first and the last steps.
        warmup: steps in which it rises.
        decay: share of the steps in which it falls, at the end: a run may be stopped and ended sooner or later.
        weight_decay: of AdamW, on matrices alone.
        ema: decay of the weight averaging a step.
        trust: steps in which nothing in a photo but its labelled face is taken for a face.
        val_fraction: share of the people that are held out.
        seed: of weights and windows.
    """

    steps: int = 3000
    batch_size: int = 32
    lr: float = 3e-3
    warmup: int = 60
    decay: float = 0.4
    weight_decay: float = 0.01
    ema: float = 0.995
    trust: int = 700
    val_fraction: float = 0.1
    seed: int = 68

    def __post_init__(self) -> None:
        _check(1 <= self.steps <= _MOST, "steps", self.steps, "1 to 10^9")
        _check(1 <= self.batch_size <= _MOST, "batch_size", self.batch_size, "1 to 10^9")
        _check(0 < self.lr < 1, "lr", self.lr, "over 0 and under 1")
        _check(0 <= self.ema < 1, "ema", self.ema, "0 to under 1")
        _check(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "over 0 and under 1")
        _check(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")

    def rate(self, step: int) -> float:
        """The learning rate of a step: up, level, and down in straight lines."""
        up = (step + 1) / max(1, self.warmup)
        down = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, up, down)


def _check(good: bool, name: str, got: object, expected: str) -> None:
    if not good:
        raise KpError(f"the setting {name} must be {expected}, got {got}")


RECIPES: dict[str, TrainConfig] = {
    "default": TrainConfig(),
    # The original project: whole photos at 250 px, random 224 crops, Adam, early stopping.
    "seed": TrainConfig(
        recipe="seed",
        box="frame",
        margin=1.0,
        epochs=200,
        batch_size=32,
        optimizer="adam",
        lr=1e-3,
        weight_decay=0.0,
        beta=1.0,
        ema=0.0,
        patience=10,
        augment="crop",
    ),
}


def recipe(name: str, **changes: Any) -> TrainConfig:
    """A recipe's settings with the given fields changed; `None` keeps the recipe's value.

    Raises:
        KpError: no such recipe, or a value out of range.
    """
    if name not in RECIPES:
        raise KpError(f"there is no recipe {name!r}; the recipes are: {', '.join(RECIPES)}")
    return dataclasses.replace(RECIPES[name], **{k: v for k, v in changes.items() if v is not None})


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether this processor computes in bfloat16, by what Linux says of it; None where that can't be read.

    One that does not takes many times longer for it than for float32.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)  # the last is ARM's
