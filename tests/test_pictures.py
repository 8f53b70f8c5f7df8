"""The pictures of an evaluation: curve, map of errors, worst faces."""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from kp_export.evaluate import Evaluation, evaluate
from kp_export.pictures import error_curve, point_error_map, worst_faces
from kp_export.robustness import turns
from kp_runtime.errors import MissingExtraError
from kp_runtime.scheme68 import MIRROR
from kp_runtime.spec import ModelSpec
from kp_train.data import Source, read_source
from kp_train.synthetic import write_csv_source
from tests.models import SIZE
from tests.test_evaluate import oracle


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return read_source(write_csv_source(tmp_path, people=12))


def test_the_pictures_show_the_faces(source: Source, tmp_path: Path) -> None:
    result = evaluate(oracle(source, ModelSpec("x", SIZE), error_px=2.0), source.faces)
    curve = cv2.imread(str(error_curve(result, "a model", tmp_path / "p" / "curve.png")))
    assert curve.shape[0] > 300
    assert len(np.unique(curve)) > 20
    sheet = cv2.imread(str(worst_faces(result, tmp_path / "p" / "worst.png", most=7, cell=96)))
    assert sheet.shape == (2 * 96, 6 * 96, 3)
    assert np.ptp(sheet[:, 96:].reshape(-1)) > 200
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["curve.png", "worst.csv", "worst.png"]


def test_the_curve_is_the_share_of_faces_up_to_each_error(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("kp_export.pictures._saved", lambda figure, path: drawn.extend(figure.axes[0].lines))
    result = evaluate(oracle(source, ModelSpec("x", SIZE), error_px=2.0), source.faces)
    error_curve(dataclasses.replace(result, errors=np.array([0.04, 0.01, 0.05, 0.02])), "a model", Path("x"))
    curve, *upright = drawn
    np.testing.assert_allclose(curve.get_xydata(), [[0, 0], [1, 25], [2, 50], [4, 75], [5, 100], [10, 100]])
    assert curve.get_drawstyle() == "steps-post"  # level up to the next error
    np.testing.assert_allclose([line.get_xdata()[0] for line in upright], [8, 100 * result.accuracy.nme])
    drawn.clear()
    error_curve(dataclasses.replace(result, errors=np.array([0.04]), missed=1), "a model", Path("x"))
    np.testing.assert_allclose(drawn[0].get_xydata(), [[0, 0], [4, 50], [10, 50]])


def test_the_curve_counts_the_missed_faces_and_says_that_a_mean_lies_beyond(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("kp_export.pictures._saved", lambda figure, path: drawn.extend(figure.axes))
    result = evaluate(oracle(source, ModelSpec("x", SIZE), error_px=2.0), source.faces)
    far = dataclasses.replace(result.accuracy, faces=8, nme=0.2)
    error_curve(dataclasses.replace(result, missed=6, accuracy=far), "a model", Path("x"))
    error_curve(result, "a model", Path("x"))
    missed, found = drawn
    assert "14 faces, 6 of them missed" in missed.get_title()
    assert "mean 20.00% →" in [text.get_text() for text in missed.texts]
    assert "missed" not in found.get_title()
    assert not any("→" in text.get_text() for text in found.texts)


def test_the_worst_faces_come_first_with_green_labels_and_red_predictions(source: Source, tmp_path: Path) -> None:
    result = evaluate(oracle(source, ModelSpec("x", SIZE)), source.faces)
    worst = np.arange(24) == 5
    shown = dataclasses.replace(result, errors=worst * 0.5, predicted=result.predicted + 30)
    blue, green, red = cv2.imread(str(worst_faces(shown, tmp_path / "a.png", most=1))).astype(int).transpose(2, 0, 1)
    alone = dataclasses.replace(shown, faces=shown.faces[5:6], predicted=shown.predicted[5:6], errors=np.array([0.5]))
    assert worst_faces(alone, tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    places = [np.argwhere(colour - np.maximum(blue, other) > 60) for colour, other in ((green, red), (red, green))]
    labels, predictions = ((place.min(axis=0) + place.max(axis=0)) / 2 for place in places)
    assert labels == pytest.approx([111.5, 111.5], abs=3)  # the middle of the sheet's one cell
    assert (predictions > labels + 20).all()
    right = dataclasses.replace(result, predicted=np.stack([face.xy for face in result.faces]))
    blue, green, red = cv2.imread(str(worst_faces(right, tmp_path / "c.png", most=1))).astype(int).transpose(2, 0, 1)
    assert (red - np.maximum(blue, green) > 60).any()
    assert (green - np.maximum(blue, red) > 60).any()  # labels are seen under predictions


def test_the_list_beside_the_sheet_says_which_photo_each_face_is(source: Source, tmp_path: Path) -> None:
    result = evaluate(oracle(source, ModelSpec("x", SIZE)), source.faces)
    names = [f"a_name_as_long_as_that_of_others_写真_{i}.png" for i in range(len(result.faces))]
    faces = tuple(
        dataclasses.replace(face, image=face.image.rename(tmp_path / name))
        for face, name in zip(result.faces, names, strict=True)
    )
    errors = np.linspace(0.01, 0.2, len(faces))
    worst_faces(dataclasses.replace(result, faces=faces, errors=errors), tmp_path / "worst.png", most=3)
    with (tmp_path / "worst.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert [Path(row["image"]) for row in rows] == [face.image for face in faces[:-4:-1]]
    assert [float(row["nme"]) for row in rows] == pytest.approx(errors[:-4:-1], abs=1e-5)
    box = [float(rows[0][side]) for side in ("x0", "y0", "x1", "y1")]
    assert box == pytest.approx([*faces[-1].xy.min(axis=0), *faces[-1].xy.max(axis=0)], abs=1e-3)


@pytest.mark.parametrize("grey", [0, 110, 140, 170, 255])
def test_answers_have_a_black_edge_on_any_grey(grey: int, source: Source, tmp_path: Path) -> None:
    result = evaluate(oracle(source, ModelSpec("x", SIZE)), source.faces)
    plain = tmp_path / "plain.png"
    cv2.imwrite(str(plain), np.full((SIZE, SIZE), grey, np.uint8))
    faces = tuple(dataclasses.replace(face, image=plain) for face in result.faces)
    away = dataclasses.replace(result, faces=faces, predicted=result.predicted - SIZE / 3)  # from the labels
    sheet = cv2.imread(str(worst_faces(away, tmp_path / "worst.png", most=1))).astype(int)
    red = (sheet[:, :, 2] - sheet[:, :, :2].max(axis=2)) > 120
    darkest = cv2.erode(sheet.max(axis=2).astype(np.uint8), np.ones((5, 5), np.uint8))
    assert red.any()
    assert (darkest[red] < 100).mean() > 0.9


def test_the_numbers_of_the_worst_faces_are_read_on_white(source: Source, tmp_path: Path) -> None:
    result = evaluate(oracle(source, ModelSpec("x", SIZE)), source.faces)
    white = tmp_path / "white.png"
    white.write_bytes(cv2.imencode(".png", np.full((SIZE, SIZE, 3), 255, np.uint8))[1].tobytes())
    faces = tuple(dataclasses.replace(face, image=white) for face in result.faces)
    sheet = cv2.imread(str(worst_faces(dataclasses.replace(result, faces=faces), tmp_path / "worst.png", most=1)), 0)
    assert (sheet[-20:, :60] == 0).sum() > 20


@pytest.mark.parametrize("draw", [error_curve, point_error_map])
@pytest.mark.parametrize("name", ["run_$a$_$b_{$", "a_long_name_" * 12])
def test_a_name_stands_in_a_picture_as_it_is(
    draw: Callable[[Evaluation, str, Path], Path], name: str, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("kp_export.pictures._saved", lambda figure, path: figures.append(figure))
    draw(evaluate(oracle(source, ModelSpec("x", SIZE), error_px=2.0), source.faces), name, Path("x"))
    (figure,) = figures
    figure.draw_without_rendering()
    title = figure.axes[0].title if draw is error_curve else figure.findobj(lambda part: part is figure._suptitle)[0]
    assert title.get_text().replace("\n", "").startswith(name)
    box = title.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= figure.bbox.y1


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes on POSIX alone")
def test_a_worst_face_may_have_a_name_that_is_no_text(source: Source, tmp_path: Path) -> None:
    """At such a text OpenCV ends the process."""
    result = evaluate(oracle(source, ModelSpec("x", SIZE), error_px=2.0), source.faces)
    odd = tmp_path / os.fsdecode(b"caf\xe9.png")
    shutil.copyfile(result.faces[0].image, odd)
    named = dataclasses.replace(result, faces=tuple(dataclasses.replace(face, image=odd) for face in result.faces))
    assert worst_faces(named, tmp_path / "worst.png", most=1).stat().st_size


@pytest.mark.filterwarnings("error")
def test_a_curve_of_a_model_that_knows_nothing(source: Source, tmp_path: Path) -> None:
    result = evaluate(oracle(source, ModelSpec("x", SIZE), error_px=40.0), source.faces)
    assert result.accuracy.nme > 0.15
    curve = cv2.imread(str(error_curve(result, "a model", tmp_path / "curve.png")))
    dark = np.flatnonzero((curve < 250).any(axis=(0, 2)))  # the plot reaches as far as that of a good model
    assert np.ptp(dark) > 0.9 * curve.shape[1]


def test_the_map_of_errors_shows_each_point_and_takes_both_sides_alike(source: Source, tmp_path: Path) -> None:
    result = evaluate(oracle(source, ModelSpec("x", SIZE)), source.faces)
    assert len(set(np.sign(turns(np.stack([face.xy for face in result.faces]))))) == 2, "faces look to both sides"

    def drawn(points: slice, sign: int = 1) -> bytes:
        """The map where these points are 3 px off; of the mirrored faces where `sign` is -1."""
        predicted = result.predicted.copy()
        predicted[:, points, 1] += 3
        order = MIRROR if sign < 0 else np.arange(68)
        faces = tuple(dataclasses.replace(face, xy=face.xy[order] * (sign, 1)) for face in result.faces)
        shown = dataclasses.replace(result, faces=faces, predicted=predicted[:, order] * (sign, 1))
        return point_error_map(shown, "a model", tmp_path / "map.png").read_bytes()

    assert drawn(slice(8)) == drawn(slice(8), -1)
    jaw, mouth = (cv2.imdecode(np.frombuffer(drawn(p), np.uint8), 0) for p in (slice(17), slice(48, 68)))
    assert jaw.shape == mouth.shape
    assert (jaw != mouth).mean() > 0.005
    alone = dataclasses.replace(result, faces=result.faces[:1], predicted=result.predicted[:1] + 2)
    picture = cv2.imread(str(point_error_map(alone, "a model", tmp_path / "alone.png")), 0)
    inked = np.flatnonzero((picture < 250).any(axis=0))  # faces of one turn leave no empty half
    assert inked[0] < 0.2 * picture.shape[1]


def test_the_map_of_errors_is_an_upright_face_of_an_eye_distance(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its circles are as large as the errors in it: one that errs by a tenth has a tenth of that distance as radius."""
    axes: list[Any] = []
    monkeypatch.setattr("kp_export.pictures._saved", lambda figure, path: axes.append(figure.axes[0]))
    result = evaluate(oracle(source, ModelSpec("x", SIZE)), source.faces)
    xy = np.stack([face.xy for face in result.faces])
    off = 0.1 * np.linalg.norm(xy[:, 45] - xy[:, 36], axis=1)
    point_error_map(dataclasses.replace(result, predicted=xy + off[:, None, None] * (0.6, 0.8)), "a model", tmp_path)
    (circles,) = axes[0].collections
    places = np.asarray(circles.get_offsets())
    np.testing.assert_allclose(places[[36, 45]], [[-0.5, 0], [0.5, 0]], atol=1e-6)
    assert places[8, 1] > 0.5  # the chin, and down is down
    assert axes[0].get_ylim()[0] > axes[0].get_ylim()[1]
    np.testing.assert_allclose(circles.get_widths(), 0.2, rtol=1e-5)
    np.testing.assert_allclose(circles.get_heights(), 0.2, rtol=1e-5)
    np.testing.assert_allclose(circles.get_array(), 10, rtol=1e-5)  # percent


def test_plots_need_matplotlib_and_the_worst_faces_do_not(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = evaluate(oracle(source, ModelSpec("x", SIZE)), source.faces)
    for draw in (error_curve, point_error_map):
        with pytest.raises(MissingExtraError, match="drawing the plots of kp eval needs the package matplotlib"):
            draw(result, "a model", tmp_path / "plot.png")
    assert worst_faces(result, tmp_path / "worst.png").stat().st_size
