"""`scripts/measure_detectors.py` and `fit_box_maps.py` on a labelled photo and on one without a face; wrong numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_cli.report import one_line_errors
from kp_runtime.pts import pts_text
from kp_runtime.scheme68 import mean_shape
from scripts import fit_box_maps, lost_faces, measure_detectors, measure_video
from tests.test_detect import FACE

OWN = str(Path(__file__).parents[1] / "engines" / "face-detector")
Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a script as a person types it: exit status, lines on stdout, text on stderr."""
    threads = cv2.getNumThreads()

    def run(script: object, *words: object) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
        status = 0
        try:
            with one_line_errors("script"):
                script.main()  # type: ignore[attr-defined]
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    yield run
    cv2.setNumThreads(threads)


@pytest.fixture
def labelled(astronaut: Path, tmp_path: Path) -> Path:
    """A folder with the astronaut and about her points."""
    return labelled_photo(tmp_path / "faces", cv2.imread(str(astronaut)))


@pytest.fixture
def without_a_face(tmp_path: Path) -> Path:
    return labelled_photo(tmp_path / "none", np.full((400, 400, 3), 90, np.uint8))


def labelled_photo(folder: Path, image: np.ndarray | None) -> Path:
    assert image is not None
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), image)
    shape = mean_shape()
    low, size = shape.min(axis=0), np.ptp(shape, axis=0)
    corner, end = np.array(FACE[:2]), np.array(FACE[2:])
    (folder / "a.pts").write_text(pts_text((shape - low) / size * (end - corner) + corner))
    return folder


def test_scores_show_what_the_least_score_does(run: Run, labelled: Path) -> None:
    status, out, _ = run(measure_detectors, labelled, "--own", OWN, "--scores")
    assert status == 0
    at = next(i for i, line in enumerate(out) if line.startswith("detector"))
    assert "1 photos, 1 of them with one face alone" in out
    rows = {line[:9].strip(): line[9:].split() for line in out[at + 1 :] if line.strip()}
    assert set(rows) == {"Haar", *(f"own, {score:g}" for score in measure_detectors.SCORES)}
    assert {row[0] for row in rows.values()} == {"100.0%"}
    false = [float(rows[f"own, {score:g}"][3]) for score in measure_detectors.SCORES]
    assert false == sorted(false, reverse=True)
    assert false[0] > false[-1] == 0


def test_scores_need_the_own_detector(run: Run, labelled: Path) -> None:
    status, out, err = run(measure_detectors, labelled, "--scores")
    assert (status, out) == (1, [])
    assert err == "script: --scores is about the own detector; name its bundle too: --own engines/face-detector\n"


def test_photos_without_a_face_are_measured_without_a_warning(run: Run, without_a_face: Path) -> None:
    status, out, _ = run(measure_detectors, without_a_face)
    assert (status, out[-1].split()[:7]) == (0, ["Haar", "0.0%", "0.0%", "100.0%", "0.000", "none", "none"])


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        (fit_box_maps, ("x", "--most", -1), "--most must be 1 or more"),
        (lost_faces, ("x", "--data", "x", "--yunet", "x", "--most", 0), "--most must be 1 or more"),
        (measure_video, ("x", "--rounds", 0), "--frames and --rounds must be 1 or more"),
    ],
)
def test_numbers_that_make_no_sense_are_said_at_once(
    run: Run, script: object, words: tuple[object, ...], told: str
) -> None:
    assert run(script, *words) == (1, [], f"script: {told}\n")


def test_a_map_is_fitted_and_printed(run: Run, labelled: Path) -> None:
    status, out, _ = run(fit_box_maps, labelled)
    assert status == 0
    assert out[-1].startswith("HaarDetector: BoxMap(dx=0.0")
    assert "; 1 of 1 faces; spread of the edges 0.000" in out[-1]


def test_no_map_is_fitted_where_no_face_is_found(run: Run, without_a_face: Path, tmp_path: Path) -> None:
    status, _, err = run(fit_box_maps, without_a_face)
    assert (status, err) == (1, "script: HaarDetector found none of 1 faces; name other data\n")
    (tmp_path / "empty").mkdir()
    status, _, err = run(fit_box_maps, tmp_path / "empty")
    assert (status, err.count("\n")) == (1, 1)
    assert "there are no .pts files in it or below it; give the folder that holds the labelled photos" in err
