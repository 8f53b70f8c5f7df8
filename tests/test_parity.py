"""How far a file is from PyTorch, and what is too far."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from kp_export.parity import LIMITS, FaceSet, check_parity, parity
from kp_runtime.backend import Answer
from kp_runtime.errors import ParityError

SIZE = 64


def test_parity_finds_the_worst_face_and_region() -> None:
    faces = FaceSet(("a", "b", "c"), np.zeros((3, 1, SIZE, SIZE), np.uint8), "made up")
    base = np.zeros((3, 68, 2), np.float32)
    base[:, 45, 0] = 20.0  # the eyes are 20 px apart
    moved = base.copy()
    moved[1, 50] += (3, 4)
    report = parity(Answer(base), Answer(moved), faces, file="f", precision="fp32")
    assert report.worst_face == "b"
    assert report.max_px == 5.0
    assert report.nme == pytest.approx(5 / 68 / 20 / 3 * 100)
    assert report.regions_px == pytest.approx({"jaw": 0, "brows": 0, "nose": 0, "eyes": 0, "mouth": 5 / 60})
    with pytest.raises(ParityError, match="the worst face is b"):
        check_parity(report, SIZE)


def test_one_point_in_a_face_is_over_its_99th_percentile_and_the_eyes_are_pytorchs() -> None:
    faces = FaceSet(("a",), np.zeros((1, 1, SIZE, SIZE), np.uint8), "made up")
    base = np.zeros((1, 68, 2), np.float32)
    base[:, 45, 0] = 20.0
    moved = base.copy()
    moved[0, 45] += (5, 0)  # the file's own eyes are 25 px apart
    report = parity(Answer(base), Answer(moved), faces, file="f", precision="fp32")
    assert (report.p50_px, report.p99_px) == (0, 5)
    assert report.nme == pytest.approx(5 / 68 / 20 * 100)


def test_labels_show_a_rise_of_the_error() -> None:
    crops = np.zeros((2, 1, SIZE, SIZE), np.uint8)
    truth = np.zeros((2, 68, 2))
    truth[:, 45, 0] = 20.0
    right, off = truth.astype(np.float32), (truth + np.array([0, 0.001])).astype(np.float32)
    faces = FaceSet(("a", "b"), crops, "made up", truth)
    report = parity(Answer(right), Answer(off), faces, file="f", precision="fp32")
    assert report.rise == pytest.approx(0.001 / 20 * 100, rel=1e-3)
    with pytest.raises(ParityError, match=r"rise of the NME 0\.005 percentage points"):
        check_parity(report, SIZE)
    assert parity(Answer(off), Answer(right), faces, file="f", precision="fp32").rise < 0  # type: ignore[operator]


def test_no_region_is_lost_behind_another() -> None:
    truth = np.zeros((1, 68, 2))
    truth[:, 45, 0] = 20.0
    pytorchs, files = truth.astype(np.float32), truth.astype(np.float32)
    pytorchs[0, :17, 1] = 0.2  # its jaw is off by 1% of the eye distance, and the file's mouth by 0.8%
    files[0, 48:, 1] = 0.16
    faces = FaceSet(("a",), np.zeros((1, 1, SIZE, SIZE), np.uint8), "made up", truth)
    report = parity(Answer(pytorchs), Answer(files), faces, file="f", precision="int8")
    assert report.rise is not None
    assert report.rise < 0
    told = {"jaw": -1, "brows": 0, "nose": 0, "eyes": 0, "mouth": 0.8}
    assert report.regions_rise == pytest.approx(told, abs=1e-6)
    with pytest.raises(
        ParityError, match=r"f is too far from PyTorch: rise of the NME of the mouth 0\.8 .*at most 0\.1"
    ):
        check_parity(report, SIZE)


def test_a_nan_is_as_far_as_can_be() -> None:
    faces = FaceSet(("a",), np.zeros((1, 1, SIZE, SIZE), np.uint8), "made up")
    base = np.zeros((1, 68, 2), np.float32)
    base[:, 45, 0] = 20.0
    for precision in LIMITS:
        report = parity(Answer(base), Answer(base * np.nan), faces, file="f", precision=precision)
        with pytest.raises(ParityError, match="worst point inf px"):
            check_parity(report, SIZE)


def test_the_limits_are_those_that_the_docs_tell() -> None:
    page = (Path(__file__).parents[1] / "docs" / "parity.md").read_text(encoding="utf-8")
    rows = page.partition("## The limits\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    told = {}
    for precision, *cells in (row.strip("| ").split("|") for row in rows):
        told[precision.split(",")[0].strip()] = [float(c.split()[0]) if c.strip() else math.inf for c in cells]
    assert told == {name: [of.rise, of.max_px, of.p99_px, of.score] for name, of in LIMITS.items()}


@pytest.mark.parametrize(
    ("precision", "away", "what"), [("fp16", 0.3, "worst point"), ("int8", 0.8, "99th percentile")]
)
def test_a_smaller_crop_has_smaller_limits(precision: str, away: float, what: str) -> None:
    faces = FaceSet(("a",), np.zeros((1, 1, SIZE, SIZE), np.uint8), "made up")
    base = np.zeros((1, 68, 2), np.float32)
    base[:, 45, 0] = 20.0
    report = parity(Answer(base), Answer(base + np.float32([away, 0])), faces, file="f", precision=precision)
    check_parity(report, 224)
    with pytest.raises(ParityError, match=f"{what} {away} px"):
        check_parity(report, 112)


@pytest.mark.parametrize(("second", "said"), [(0.88, "0.02"), (np.nan, "inf")])
def test_a_lost_score_has_a_limit_too(second: float, said: str) -> None:
    faces = FaceSet(("tiny", "b"), np.zeros((2, 1, SIZE, SIZE), np.uint8), "made up", tiny=1)
    base = np.zeros((2, 68, 2), np.float32)
    base[:, 45, 0] = 20.0
    answers = [Answer(base, np.float32([0.9, score])) for score in (0.9, second)]
    with pytest.raises(ParityError, match=rf"too far from PyTorch: lost score {said} away \(at most 0.01\)"):
        check_parity(parity(*answers, faces, file="f", precision="fp16"), SIZE)
    enlarged = [Answer(base, np.float32([score, 0.9])) for score in (0.9, 0.1)]
    assert parity(*enlarged, faces, file="f", precision="int8").score == 0  # int8 is not judged by the tiny ones


def test_beside_a_face_the_lost_score_counts_and_no_keypoint() -> None:
    crops, base = np.zeros((1, 1, SIZE, SIZE), np.uint8), np.zeros((2, 68, 2), np.float32)
    base[:, 45, 0] = 20.0
    faces = FaceSet(("a",), crops, "made up", base[:1].astype(np.float64), 0, crops + 1, 0.5)
    assert faces.shown[:, 0, 0, 0].tolist() == [0, 1]
    moved = base + np.float32([[[0]], [[9]]])
    right, strayed, broken, sagged = (Answer(moved, np.float32([0.15, score])) for score in (1.0, 0.8, np.nan, 0.4))
    report = parity(Answer(base, right.lost_score), right, faces, file="f", precision="int8")
    assert (report.faces, report.max_px, report.score) == (1, 0, 0)
    assert parity(right, strayed, faces, file="f", precision="int8").score == 0, "it holds no face all the same"
    assert parity(right, broken, faces, file="f", precision="int8").score == math.inf
    assert parity(broken, broken, faces, file="f", precision="int8").score == math.inf
    with pytest.raises(ParityError, match=r"too far from PyTorch: lost score 0\.6 away \(at most 0\.1\)"):
        check_parity(parity(Answer(base, right.lost_score), sagged, faces, file="f", precision="int8"), SIZE)
