"""The One-Euro filter (Casiez, Roussel and Vogel, CHI 2012): still points hold still, moving ones lag little."""

from __future__ import annotations

import math
from typing import SupportsFloat

import numpy as np
from numpy.typing import NDArray

from kp_runtime.errors import InputError

__all__ = ["OneEuro"]


class OneEuro:
    """Smooths an array that changes with time, each number by its own speed.

    A low pass whose cutoff rises with the speed: `min_cutoff + beta * |speed|` (the paper's equation 5).
    Speeds are in `unit`s a second, so that with a face's size as the unit the same settings suit near and
    far faces.

    Args:
        min_cutoff: cutoff in Hz of what does not move; lower is steadier.
        beta: Hz for each unit a second; higher lags less.
        speed_cutoff: cutoff in Hz of the speed itself.

    Raises:
        InputError: a cutoff that is not over 0, or a `beta` under 0.
    """

    def __init__(self, min_cutoff: float = 0.6, beta: float = 5.0, speed_cutoff: float = 1.0) -> None:
        numbers = all(isinstance(v, SupportsFloat) and math.isfinite(v) for v in (min_cutoff, beta, speed_cutoff))
        if not (numbers and min_cutoff > 0 and beta >= 0 and speed_cutoff > 0):
            raise InputError(
                f"a OneEuro's cutoffs must be finite numbers over 0, and its beta at least 0, got {min_cutoff!r:.20}, "
                f"{beta!r:.20} and {speed_cutoff!r:.20}"
            )
        self._min_cutoff, self._beta, self._speed_cutoff = min_cutoff, beta, speed_cutoff
        self._seconds = -math.inf
        self._value = self._speed = np.zeros(0)

    def __call__(self, value: NDArray[np.floating], seconds: float, unit: float = 1.0) -> NDArray[np.float64]:
        """The smoothed value at a time.

        Args:
            value: any shape, the same in each call, such as `(68, 2)` or `(n, 68, 2)`.
            seconds: when it was measured; a time that is not after the last one gives the last answer again, but one
                that lies over a second before it is a new beginning.
            unit: what speeds are counted in, in the value's own unit; over 0.

        Returns:
            Float64, the shape of `value`.

        Raises:
            InputError: `value` is no array of finite numbers or has another shape than before, `seconds` is not finite,
                or `unit` is not over 0.
        """
        if not (isinstance(unit, SupportsFloat) and unit > 0):
            raise InputError(f"a OneEuro's unit must be over 0, got {unit!r:.40}")
        if not (isinstance(seconds, SupportsFloat) and math.isfinite(seconds)):
            raise InputError(f"a OneEuro's time must be a finite number of seconds, got {seconds!r:.40}")
        try:
            new = np.asarray(value, np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"a OneEuro smooths an array of numbers, got {value!r:.40}") from error
        if not np.isfinite(new).all():
            raise InputError("a OneEuro smooths finite numbers: where points are lost, leave the call out")
        step = seconds - self._seconds
        if math.isinf(step) or step < -1:
            self._value, self._speed, self._seconds = new.copy(), np.zeros(new.shape), seconds
        elif new.shape != self._value.shape:
            raise InputError(
                f"a OneEuro smooths values of one shape, {self._value.shape} so far, got {new.shape}; where faces come "
                "and go, take one for each"
            )
        elif step > 0:
            speed = (new - self._value) / (step * unit)
            self._speed = self._speed + _share(self._speed_cutoff, step) * (speed - self._speed)
            cutoff = self._min_cutoff + self._beta * np.abs(self._speed)
            self._value = self._value + _share(cutoff, step) * (new - self._value)
            self._seconds = seconds
        return self._value.copy()


def _share(cutoff: float | NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """How much of a new value is taken over after `step` seconds (the paper's equations 3 and 4)."""
    angle = 2 * math.pi * step * np.asarray(cutoff)
    share: NDArray[np.float64] = angle / (1 + angle)
    return share
