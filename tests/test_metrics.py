"""Accuracy measures against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kp_train.metrics import accuracy, interval_over_people, point_errors, smooth_l1_original
from kp_train.synthetic import mean_shape

TRUTH = (mean_shape() * 50 + 100)[None].repeat(4, axis=0)
EYES = float(np.linalg.norm(TRUTH[0, 36] - TRUTH[0, 45]))
SIZES = np.array([[200, 240]] * 4)


def test_nme_is_the_distance_over_the_eye_corners() -> None:
    predicted = TRUTH + np.array([3.0, 4.0])
    np.testing.assert_allclose(point_errors(predicted, TRUTH), 5 / EYES)


def test_errors_are_counted_in_the_truths_own_size() -> None:
    middle = TRUTH.mean(axis=1, keepdims=True)
    errors = point_errors(2 * TRUTH - middle, TRUTH)  # a face that is twice as large
    np.testing.assert_allclose(errors, np.linalg.norm(TRUTH - middle, axis=-1) / EYES)


def test_accuracy_by_hand() -> None:
    shares = np.array([0.0, 0.02, 0.079, 0.081])  # a failure is over 8%
    predicted = TRUTH.copy()
    predicted[..., 0] += (shares * EYES)[:, None]
    measured = accuracy(predicted, TRUTH, SIZES)
    assert measured.faces == 4
    assert measured.nme == pytest.approx(0.045)
    assert measured.median == pytest.approx(0.0495)
    assert measured.p95 == pytest.approx(0.0807)  # between the last two, 0.95 of the way from the first to the last
    assert measured.failures == 0.25
    assert measured.auc == pytest.approx((1 + 0.75 + 0.0125 + 0) / 4)
    assert measured.regions == pytest.approx(dict.fromkeys(("jaw", "brows", "nose", "eyes", "mouth"), 0.045))


def test_missed_faces_are_failures_and_no_more() -> None:
    predicted = TRUTH.copy()
    predicted[0, :, 0] += 0.02 * EYES
    found, with_missed = accuracy(predicted, TRUTH, SIZES), accuracy(predicted, TRUTH, SIZES, missed=4)
    assert with_missed.failures == 0.5
    assert with_missed.auc == pytest.approx(found.auc / 2)
    assert (with_missed.nme, with_missed.p95, with_missed.faces) == (found.nme, found.p95, 4)


def test_the_interval_is_that_of_a_mean_over_people(rng: np.random.Generator) -> None:
    values = rng.normal(0.04, 0.01, 400)
    people = [f"p{i}" for i in range(400)]
    found = interval_over_people(values, people)
    half = 1.96 * values.std() / 20  # by the normal distribution
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 10)
    assert interval_over_people(values, people) == found
    # nine more frames of each person are no news of other people
    assert interval_over_people(values.repeat(10), np.repeat(people, 10).tolist()) == pytest.approx(found)
    assert interval_over_people(values, [f"p{i % 7}" for i in range(400)]) is None
    assert interval_over_people(values, [f"p{i % 8}" for i in range(400)]) is not None


def test_a_person_of_more_faces_weighs_more_in_the_interval() -> None:
    # the person of nine faces is among the eight drawn up to thrice, in all but one of 89 draws
    people = [*"abcdefg"] + ["h"] * 9
    assert interval_over_people(np.array([0.0] * 7 + [1.0] * 9), people) == (0.0, 27 / 32)


def test_a_region_feels_its_own_points_alone() -> None:
    predicted = TRUTH.copy()
    predicted[:, 48:, 1] += 10
    regions = accuracy(predicted, TRUTH, SIZES).regions
    assert regions["mouth"] == pytest.approx(10 / EYES)
    assert regions["jaw"] == regions["brows"] == regions["nose"] == regions["eyes"] == 0


def test_smooth_l1_is_the_original_projects(rng: np.random.Generator) -> None:
    """Rescale to a shorter side of 250, crop, (pixel - 100) / 50, torch's own loss."""
    predicted = TRUTH + rng.normal(0, 30, TRUTH.shape)
    scaled, wanted = predicted * (250 / 200), TRUTH * (250 / 200)
    crop = np.array([13.0, 25.0])
    raw = torch.tensor((scaled - crop - 100) / 50)
    target = torch.tensor((wanted - crop - 100) / 50)
    expected = torch.nn.functional.smooth_l1_loss(raw, target)
    assert smooth_l1_original(predicted, TRUTH, SIZES).mean() == pytest.approx(float(expected))


def test_smooth_l1_goes_by_the_shorter_side_whichever_it_is() -> None:
    moved = TRUTH + 7
    np.testing.assert_array_equal(
        smooth_l1_original(moved, TRUTH, SIZES), smooth_l1_original(moved, TRUTH, SIZES[:, ::-1])
    )
