from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kp_runtime.errors import InputError
from kp_runtime.smooth import OneEuro

RATE = 30
TIMES = np.arange(300) / RATE


def smoothed(values: np.ndarray, unit: float = 1.0) -> np.ndarray:
    smooth = OneEuro()
    return np.stack([smooth(value, t, unit) for value, t in zip(values, TIMES, strict=True)])


def test_jitter_of_a_still_face_is_cut_by_three(rng: np.random.Generator) -> None:
    side = 80.0
    still = rng.normal(0, 0.0025 * side, (300, 68, 2)) + rng.uniform(0, side, (68, 2))
    steady = smoothed(still, side)
    assert still[60:].std(axis=0).mean() > 3 * steady[60:].std(axis=0).mean()
    assert np.abs(np.diff(still, axis=0)).mean() > 3 * np.abs(np.diff(steady[60:], axis=0)).mean()


def test_a_moving_face_lags_less_than_50_ms() -> None:
    for sides_a_second in (0.25, 0.5, 1, 2):
        moving = (80 * sides_a_second * TIMES)[:, None]
        behind = (moving - smoothed(moving, 80.0))[150:] / (80 * sides_a_second)
        assert 0 < behind.max() < 0.05
    for hertz in (0.5, 1):
        moving = np.sin(2 * np.pi * hertz * TIMES)[:, None] * 40
        found = smoothed(moving, 80.0)[150:, 0]
        lags = np.arange(0, 0.2, 0.001)
        off = [np.abs(np.interp(TIMES[150:] - lag, TIMES, moving[:, 0]) - found).mean() for lag in lags]
        assert lags[int(np.argmin(off))] < 0.05


def test_near_and_far_faces_are_smoothed_alike(rng: np.random.Generator) -> None:
    values = rng.normal(size=(300, 4)).cumsum(axis=0)
    np.testing.assert_allclose(smoothed(values * 10, unit=10), smoothed(values) * 10, rtol=1e-9, atol=1e-9)


def test_each_number_is_smoothed_by_itself(rng: np.random.Generator) -> None:
    values = rng.normal(size=(300, 2, 68, 2))
    whole = smoothed(values)
    assert whole.shape == values.shape
    assert np.array_equal(whole[:, 1, 5, 0], smoothed(values[:, 1, 5, 0]))


def test_first_value_and_what_does_not_change_stay() -> None:
    value = np.array([[3.0, -2.0]])
    smooth = OneEuro()
    for t in (0.0, 0.1, 0.5, 20.0):
        assert np.array_equal(smooth(value, t), value)


def test_the_papers_recurrence() -> None:
    smooth = OneEuro(min_cutoff=2.0, beta=3.0, speed_cutoff=1.5)
    smooth(np.array([1.0]), 0.0)
    got = smooth(np.array([2.0]), 0.1)[0]
    share = lambda cutoff: 1 / (1 + 1 / (2 * np.pi * cutoff) / 0.1)  # noqa: E731 - the paper's alpha
    speed = share(1.5) * 10.0
    assert abs(got - (1 + share(2.0 + 3.0 * speed))) < 1e-12


def test_a_time_that_is_not_later_changes_nothing() -> None:
    smooth = OneEuro()
    smooth(np.zeros(2), 0.0)
    at = smooth(np.ones(2), 0.1)
    for t in (0.1, 0.05, -0.8):
        assert np.array_equal(smooth(np.full(2, 9.0), t), at)


@pytest.mark.parametrize("seconds", [0.0, 98.9])
def test_a_clock_that_is_set_back_by_over_a_second_is_a_new_beginning(seconds: float) -> None:
    smooth = OneEuro()
    smooth(np.array([10.0]), 100.0)
    assert smooth(np.array([70.0]), seconds) == 70
    assert smooth(np.array([75.0]), seconds + 0.033) > 70


def test_a_value_of_another_shape_is_refused() -> None:
    """One face more would have been smoothed with the points of the first."""
    smooth = OneEuro()
    smooth(np.zeros((1, 68, 2)), 0.0)
    with pytest.raises(InputError, match=r"one shape, \(1, 68, 2\) so far, got \(2, 68, 2\); .* take one for each"):
        smooth(np.zeros((2, 68, 2)), 0.1)


@pytest.mark.parametrize(
    ("value", "seconds", "message"),
    [
        ("a", 0.0, "smooths an array of numbers, got 'a'"),
        (np.array([0, np.nan]), 0.0, "smooths finite numbers: where points are lost, leave the call out"),
        (np.zeros(2), float("nan"), "time must be a finite number of seconds, got nan"),
        (np.zeros(2), None, "time must be a finite number of seconds, got None"),
    ],
)
def test_what_can_not_be_smoothed_is_refused(value: Any, seconds: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        OneEuro()(value, seconds)


@pytest.mark.parametrize("unit", [0, -1.0, float("nan"), "1"])
def test_a_unit_of_no_size_is_refused(unit: float) -> None:
    """What was smoothed with it was no number ever after."""
    smooth = OneEuro()
    smooth(np.zeros(2), 0.0)
    with pytest.raises(InputError, match="unit must be over 0, got "):
        smooth(np.ones(2), 0.1, unit)
    assert np.isfinite(smooth(np.ones(2), 0.1)).all()


def test_answers_are_the_callers_own() -> None:
    smooth = OneEuro()
    first = smooth(np.zeros(2), 0.0)
    first += 5
    assert np.array_equal(smooth(np.zeros(2), 0.1), np.zeros(2))


@pytest.mark.parametrize("settings", [{"min_cutoff": -1}, {"beta": np.nan}, {"speed_cutoff": 0}, {"min_cutoff": "x"}])
def test_settings_that_smooth_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cutoffs must be finite numbers over 0, and its beta at least 0"):
        OneEuro(**settings)
