"""Pictures of an evaluation: the cumulative error curve, and the worst faces."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from kp_export.evaluate import Evaluation
from kp_runtime.errors import MissingExtraError
from kp_runtime.files import writing
from kp_runtime.frame import Frame
from kp_runtime.geometry import apply_matrix, matrices_from_boxes
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_train.data import luma_from_file
from kp_train.metrics import FAILURE

__all__ = ["error_curve", "worst_faces"]


def error_curve(evaluation: Evaluation, title: str, path: Path) -> Path:
    """Writes the cumulative error curve as a PNG: share of faces against NME.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "export", "the plot of kp eval") from error
    measured = evaluation.accuracy
    errors = np.sort(evaluation.errors) * 100
    share = np.arange(1, len(errors) + 1) / len(errors) * 100
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.step(np.concatenate([[0], errors]), np.concatenate([[0], share]), where="post", color="#1f6f8b", linewidth=2)
    axes.axvline(FAILURE * 100, color="#999999", linestyle="--", linewidth=1)
    axes.text(FAILURE * 100, 3, f" failures {measured.failures:.1%}", color="#666666")
    axes.axvline(measured.nme * 100, color="#c8553d", linewidth=1)
    axes.text(measured.nme * 100, 96, f" mean {measured.nme:.2%}", color="#c8553d", va="top")
    axes.set(xlim=(0, 10), ylim=(0, 100), xlabel="NME, % of the outer eye corner distance", ylabel="faces, %")
    axes.set_title(f"{title}: {measured.faces} faces, AUC at 8% {measured.auc:.3f}", fontsize=10)
    axes.grid(alpha=0.25)
    with writing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def worst_faces(evaluation: Evaluation, path: Path, most: int = 24, cell: int = 224) -> Path:
    """Writes a sheet of the worst faces as a PNG: truth in green, prediction in red, NME below."""
    order = np.argsort(-evaluation.errors)[:most]
    cells = []
    for i in order.tolist():
        face = evaluation.faces[i]
        box = np.concatenate([face.xy.min(axis=0), face.xy.max(axis=0)])
        matrix = matrices_from_boxes(box[None], cell, 1.5)
        canvas = cv2.cvtColor(
            crops_from_frame(Frame(luma_from_file(face.image), "gray"), matrix, cell)[0, 0], cv2.COLOR_GRAY2BGR
        )
        for xy, color in ((face.xy, (90, 220, 90)), (evaluation.predicted[i], (70, 70, 250))):
            for x, y in np.clip(np.rint(apply_matrix(matrix[0], xy) * 16), -(2**20), 2**20).astype(int).tolist():
                cv2.circle(canvas, (x, y), 24, color, -1, cv2.LINE_AA, 4)
        label = f"{evaluation.errors[i]:.1%} {face.image.stem[:24]}"
        cv2.putText(canvas, label, (4, cell - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
        cells.append(canvas)
    columns = min(6, len(cells))
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    sheet = np.concatenate([np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)])
    with writing(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", sheet)[1].tobytes())
    return path
