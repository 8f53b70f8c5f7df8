"""Pictures of an evaluation: the cumulative error curve, the error of each point, and the worst faces with a list."""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kp_export.evaluate import Evaluation
from kp_export.robustness import turns
from kp_runtime.errors import MissingExtraError
from kp_runtime.files import write_file, writing
from kp_runtime.frame import Frame
from kp_runtime.geometry import apply_matrix, matrices_from_boxes
from kp_runtime.labelled_face import ODD, rounded
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.scheme68 import CONTOURS, EYE_CORNERS, MIRROR, POINTS
from kp_train.data import luma_of_face
from kp_train.metrics import FAILURE, point_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["error_curve", "point_error_map", "worst_faces"]

_TURNED = ((0.0, 0.15, "frontal"), (0.15, 0.5, "turned"), (0.5, np.inf, "turned far"))
"""Turns of the head from, up to, and their name."""
_TITLE: dict[str, Any] = {"fontsize": 10, "parse_math": False}  # dollars in a model's name are no formula
_LINE = 60  # letters of a title that stand side by side in the narrowest picture


def error_curve(evaluation: Evaluation, title: str, path: Path) -> Path:
    """Writes the cumulative error curve as a PNG: share of faces, the missed ones among them, against NME.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    measured = evaluation.accuracy
    errors = np.sort(evaluation.errors) * 100
    share = np.arange(len(errors) + 1) / (len(errors) + evaluation.missed) * 100
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    x, y = np.array([0, *errors, max(10, errors[-1])]), np.array([*share, share[-1]])  # level to the right edge
    axes.step(x, y, where="post", color="#1f6f8b", linewidth=2)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}  # the mean's line may cross it
    axes.axvline(FAILURE * 100, color="#999999", linestyle="--", linewidth=1)
    axes.text(FAILURE * 100, 3, f" failures {measured.failures:.1%}", color="#666666", clip_on=True, bbox=paper)
    axes.axvline(measured.nme * 100, color="#b8452e", linewidth=1)
    at = np.clip(measured.nme * 100, 1.8, 10)  # left of the line, where a curve seldom is
    beyond = "→" if measured.nme > 0.1 else ""
    axes.text(at, 96, f"mean {measured.nme:.2%} {beyond}", color="#b8452e", va="top", ha="right")
    unit = "outer eye corner distance" if evaluation.predicted.shape[1] == POINTS else "longer side of the points' box"
    axes.set(xlim=(0, 10), ylim=(0, 100), xlabel=f"NME, % of the {unit}", ylabel="faces, %")
    missed = f", {evaluation.missed} of them missed" if evaluation.missed else ""
    told = f"{measured.faces + evaluation.missed} faces{missed}, AUC at 8% {measured.auc:.3f}"
    axes.set_title(f"{textwrap.fill(title, _LINE)}\n{told}", **_TITLE)
    axes.grid(alpha=0.25)
    return _saved(figure, path)


def point_error_map(evaluation: Evaluation, title: str, path: Path) -> Path:
    """Writes where a model of the 68 points errs as a PNG: mean faces by turn, a circle at each point.

    Its radius is the point's mean error, in the scale of the face. Faces that look to the picture's left are mirrored.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    truth = np.stack([face.xy for face in evaluation.faces]).astype(np.float64)
    errors, turn = point_errors(evaluation.predicted, truth), turns(truth)
    to_left = turn < 0
    truth[to_left], errors[to_left] = truth[to_left][:, MIRROR] * (-1, 1), errors[to_left][:, MIRROR]
    shapes, turn = _between_the_eyes(truth), np.abs(turn)
    found = [(name, (turn >= low) & (turn < high)) for low, high, name in _TURNED]
    panels = [
        (f"{name}: {errors[inside].mean():.2%}, {inside.sum()} faces", shapes[inside].mean(0), errors[inside].mean(0))
        for name, inside in found
        if inside.any()
    ]
    figure = _figure(max(5.5, 1 + 3 * len(panels)), 4.2)
    from matplotlib.collections import EllipseCollection

    worst = max(size.max() for _, _, size in panels)
    low, high = (edge(np.concatenate([s for _, s, _ in panels]), axis=0) for edge in (np.min, np.max))
    (left, top), (right, bottom) = low - 2 * worst, high + 2 * worst
    for axes, (text, shape, size) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for contour in CONTOURS.values():
            axes.plot(*shape[list(contour)].T, color="#bbbbbb", linewidth=1)
        circles = EllipseCollection(
            2 * size, 2 * size, np.zeros(len(size)), units="xy", offsets=shape, offset_transform=axes.transData,
            cmap="viridis_r", alpha=0.8,
        )  # fmt: skip
        circles.set_array(size * 100)
        circles.set_clim(0, worst * 100)
        axes.add_collection(circles)
        axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
        axes.set_axis_off()
        axes.set_title(text, fontsize=10)
    figure.colorbar(circles, ax=figure.axes, shrink=0.8, label="mean error, % of the outer eye corner distance")
    figure.suptitle(textwrap.fill(title, _LINE), **_TITLE)
    return _saved(figure, path)


def _between_the_eyes(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Faces `(n, 68, 2)` moved, turned and scaled until their outer eye corners are (-0.5, 0) and (0.5, 0)."""
    across = xy[..., 0] + 1j * xy[..., 1]
    left, right = (across[:, [corner]] for corner in EYE_CORNERS)
    level = (across - (left + right) / 2) / (right - left)
    return np.stack([level.real, level.imag], axis=-1)


def _figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "export", "drawing the plots of kp eval") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _saved(figure: Figure, path: Path) -> Path:
    with writing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def worst_faces(evaluation: Evaluation, path: Path, most: int = 24, cell: int = 224) -> Path:
    """Writes a sheet of the worst faces as a PNG, and which they are as a CSV beside it.

    Truth is green and large, the prediction red and on top of it; below stand the rank and the NME. The CSV has rank,
    NME, the photo and the box of the labels in its pixels.
    """
    order = np.argsort(-evaluation.errors)[:most]
    cells, lines = [], []
    for rank, i in enumerate(order.tolist(), 1):
        face = evaluation.faces[i]
        box = np.concatenate([face.xy.min(axis=0), face.xy.max(axis=0)])
        matrix = matrices_from_boxes(box[None], cell, 1.5)
        crop = crops_from_frame(Frame(luma_of_face(face), "gray"), matrix, cell)[0, 0]
        canvas = cv2.cvtColor(crop, cv2.COLOR_GRAY2BGR)
        for xy, color, radius in ((face.xy, (90, 220, 90), 40), (evaluation.predicted[i], (70, 70, 250), 24)):
            at = np.clip(np.rint(apply_matrix(matrix[0], xy) * 16), -(2**20), 2**20).astype(int).tolist()
            for shade, size in (((0, 0, 0), radius + 12), (color, radius)):  # edged, to be seen on every grey
                for x, y in at:
                    cv2.circle(canvas, (x, y), size, shade, -1, cv2.LINE_AA, 4)
        label = f"{rank}: {evaluation.errors[i]:.1%}"
        lines.append([rank, f"{evaluation.errors[i]:.5f}", face.image, *rounded(box)])
        for grey, width in ((0, 3), (255, 1)):  # edged in black, as the photo may be white
            cv2.putText(canvas, label, (4, cell - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (grey,) * 3, width, cv2.LINE_AA)
        cells.append(canvas)
    columns = min(6, len(cells))
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    sheet = np.concatenate([np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)])
    write_file(path, cv2.imencode(".png", sheet)[1].tobytes())
    table = path.with_suffix(".csv")
    with writing(table) as temporary, temporary.open("w", encoding="utf-8", errors=ODD, newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["rank", "nme", "image", "x0", "y0", "x1", "y1"], *lines])
    return path
