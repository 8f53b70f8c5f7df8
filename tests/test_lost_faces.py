"""`scripts/lost_faces.py`: its arithmetic by known answers. The measurement itself needs the data sets."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.lost_faces import WORSE, auc, shown_otherwise


def test_a_score_that_tells_nothing_and_one_that_tells_all() -> None:
    assert auc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1
    assert auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 0
    assert auc(np.array([1.0, 1.0]), np.array([1.0])) == 0.5


@pytest.mark.parametrize("how", WORSE)
def test_a_photo_is_made_worse_by_as_much_as_is_said(how: str) -> None:
    rng = np.random.default_rng(1)
    luma = rng.integers(60, 190, (300, 300), dtype=np.uint8)
    if how.startswith("turned"):  # what lies to the right is brighter
        luma = np.broadcast_to((20 + np.arange(300) / 2).astype(np.uint8), (300, 300)).copy()
    box = np.array([100.0, 90, 200, 210])
    shown, seen = shown_otherwise(luma, box, how, rng)
    what, amount = how.split(" ")[0], float(how.split(" ")[1].rstrip("%°x"))
    middle, size = (seen[:2] + seen[2:]) / 2, seen[2:] - seen[:2]
    assert np.linalg.norm(middle - (150, 150)) == pytest.approx(120 * amount / 100 if what == "off" else 0)
    assert size == pytest.approx(np.array([100, 120]) * (amount if what == "box" else 1))
    if what in ("off", "box"):
        assert shown is luma
    elif what == "turned":  # a place to the right of the middle shows what was so far around it, to either side
        assert shown[150, 210] == pytest.approx(20 + (150 + 60 * np.cos(np.radians(amount))) / 2, abs=1.5)
    elif what == "covered":
        assert (shown != luma).sum() == pytest.approx(120 * 100 * amount / 100, rel=0.05)
        assert (shown[(shown != luma)] == 127).all()
    elif what == "noise":
        assert (shown.astype(float) - luma).std() == pytest.approx(amount, rel=0.1)
    else:
        assert shown.mean() == pytest.approx(luma.mean() * amount, rel=0.05)
