"""Measures how well cheap scores tell a lost face from a face, and draws their ROC curves.

    python scripts/lost_faces.py BUNDLE --data DATA … --yunet MODEL.onnx [--most N] [--plot docs/lost_faces.svg]

DATA as for `kp train`; the faces are those of people that the bundle's model was never trained on. A face is
seen in its own box and in one that is up to 10% off, as a tracker's are. What is no face: places of the same
photos where YuNet finds none (even at a score of 0.3) and scikit-image's pictures of other things, noise and
flat grey; and badly placed boxes: more than 40% off the face and overlapping it by less than 0.3, or of less
than half or more than 1.9 times its size.

The scores, each growing as the face gets lost:
    box        1 - overlap of the points' own box with the one they were looked for in; costs nothing
    shape      what a point distribution model of 24 components, fitted here on the other faces of DATA, leaves over
    shifted    mean distance to the points of a second look, 7% to the right and down; in longer sides of the box
    larger     the same, the second box 12% larger
    both       the same, shifted and larger: `kp_runtime.track.disagreement`, by which the tracker judges a model that
               does not say itself
    own        the model's own lost score, where it has one

The last table shows the held-out faces in ever worse boxes and pictures, and how many both scores give up.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import skimage
from rich.progress import track

from kp_cli.report import one_line_errors, print_table
from kp_export.evaluate import held_out_faces
from kp_runtime.detect import YuNetDetector
from kp_runtime.errors import InputError
from kp_runtime.files import writing
from kp_runtime.frame import Frame
from kp_runtime.geometry import boxes_from_points, moved_box, overlaps
from kp_runtime.manifest import Manifest
from kp_runtime.pipeline import Model, load
from kp_runtime.track import LOST, disagreement, second_looks
from kp_train.data import Face, evenly_spread, luma_from_file, parse_source
from kp_train.metrics import point_errors

OTHER_THINGS = ("brick", "grass", "gravel", "coffee", "chelsea", "coins", "page", "text", "horse", "moon", "ihc")
FACES = ("face", "face, box off")
COMPONENTS = 24
WORSE = (
    "off 10%", "off 20%", "off 30%", "off 50%", "box 0.5x", "box 0.7x", "box 1.4x", "box 1.6x", "box 2x", "turned 20°",
    "turned 40°", "turned 60°", "turned 90°", "covered 10%", "covered 20%", "covered 40%", "noise 20", "noise 40",
    "darker 0.3x", "darker 0.1x",
)  # fmt: skip
"""How faces are shown otherwise: by how much of its longer side the box is off, times its size, degrees, a grey patch
on so much of the box, the noise's standard deviation in grey levels, times the grey levels."""
_STYLES = (
    ("#1f77b4", "-"), ("#c05a00", "--"), ("#227a22", ":"), ("#d62728", "-."), ("#9467bd", "-"), ("#444444", "--"),
)  # fmt: skip
"""A colour and a dash for each score; the dash tells apart what eyes for two colours see alike."""


@dataclass(frozen=True)
class View:
    """A box on a grey photo, what lies in it, and the true points where it is a face."""

    luma: np.ndarray
    box: np.ndarray
    kind: str
    truth: np.ndarray | None = None


def moved_anyhow(
    box: np.ndarray, near: float, far: float, scales: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A box moved in any direction by `near` to `far` of its longer side."""
    angle, way = rng.uniform(0, 2 * np.pi), rng.uniform(near, far)
    return moved_box(box, way * np.cos(angle), way * np.sin(angle), rng.uniform(*scales))


def views_of_face(face: Face, yunet: YuNetDetector, rng: np.random.Generator) -> list[View]:
    """A labelled face's own views, badly placed ones, and a place of its photo without a face if there is one."""
    luma, box = luma_from_file(face.image), boxes_from_points(face.xy)
    off = moved_anyhow(box, 0, 0.1, (0.92, 1.08), rng)
    views = [View(luma, box, FACES[0], face.xy), View(luma, off, FACES[1], face.xy)]
    for _ in range(50):
        far = moved_anyhow(box, 0.4, 1.0, (0.8, 1.25), rng)
        if overlaps(far[None], box[None])[0, 0] < 0.3:
            views.append(View(luma, far, "box far off"))
            break
    scale = float(rng.choice([rng.uniform(0.35, 0.5), rng.uniform(1.9, 2.6)]))
    views.append(View(luma, moved_box(box, 0, 0, scale), "box of wrong size"))
    found = np.concatenate([yunet(cv2.cvtColor(luma, cv2.COLOR_GRAY2BGR)), box[None]])
    for _ in range(60):
        side = rng.uniform(0.6, 1.4) * (box[2:] - box[:2]).max()
        if side < min(luma.shape):
            place = square(luma, side, rng)
            if overlaps(found, place[None]).max() < 0.02:
                return [*views, View(luma, place, "no face")]
    return views


def square(luma: np.ndarray, side: float, rng: np.random.Generator) -> np.ndarray:
    """A square box anywhere on an image."""
    x, y = rng.uniform(0, luma.shape[1] - side), rng.uniform(0, luma.shape[0] - side)
    return np.array([x, y, x + side, y + side])


def views_of_things(rng: np.random.Generator) -> list[View]:
    """Pictures of other things, noise, and flat grey."""
    views, each = [], 8
    for name in OTHER_THINGS:
        luma = luma_from_file(Path(skimage.__file__).parent / "data" / f"{name}.png")
        views += [View(luma, square(luma, rng.uniform(60, 0.8 * min(luma.shape)), rng), "texture") for _ in range(each)]
    middle = np.array([40.0, 40, 160, 160])
    for _ in range(2 * each):
        views.append(View(rng.integers(0, 256, (200, 200), np.uint8), middle, "texture"))
        views.append(View(np.full((200, 200), rng.integers(256), np.uint8), middle, "texture"))
    return views


class ShapeModel:
    """Point distribution model (Cootes et al. 1995): mean shape and main components of aligned shapes."""

    def __init__(self, shapes: np.ndarray) -> None:
        shapes = self._normalised(shapes)
        self._mean = shapes[0]
        for _ in range(5):
            self._mean = self._normalised(self._aligned(shapes).mean(axis=0))
        flat = (self._aligned(shapes) - self._mean).reshape(len(shapes), -1)
        self._components = np.linalg.svd(flat, full_matrices=False)[2][:COMPONENTS]

    def residual(self, shapes: np.ndarray) -> np.ndarray:
        """What the components leave over of each shape, `(n,)`."""
        flat = (self._aligned(self._normalised(shapes)) - self._mean).reshape(len(shapes), -1)
        return np.linalg.norm(flat - flat @ self._components.T @ self._components, axis=1)

    @staticmethod
    def _normalised(shapes: np.ndarray) -> np.ndarray:
        centred = shapes - shapes.mean(axis=-2, keepdims=True)
        return centred / np.linalg.norm(centred, axis=(-2, -1), keepdims=True)

    def _aligned(self, shapes: np.ndarray) -> np.ndarray:
        """Turned and scaled onto the mean; as complex numbers that is one factor."""
        z, mean = shapes[..., 0] + 1j * shapes[..., 1], self._mean[..., 0] + 1j * self._mean[..., 1]
        turned = z * (z.conj() * mean).sum(-1, keepdims=True) / (np.abs(z) ** 2).sum(-1, keepdims=True)
        return np.stack([turned.real, turned.imag], axis=-1)


def shown_otherwise(
    luma: np.ndarray, box: np.ndarray, how: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A photo and a face's box, made worse in one of the ways of `WORSE`."""
    what, _, much = how.partition(" ")
    amount = float(much.rstrip("%°x")) / (100 if much.endswith("%") else 1)
    if what == "off":
        return luma, moved_anyhow(box, amount, amount, (1, 1), rng)
    if what == "box":
        return luma, moved_box(box, 0, 0, amount)
    if what == "turned":
        middle = (box[:2] + box[2:]) / 2
        turn = cv2.getRotationMatrix2D(middle.tolist(), amount * rng.choice([-1, 1]), 1)
        return cv2.warpAffine(luma, turn, luma.shape[::-1], borderMode=cv2.BORDER_REPLICATE), box
    if what == "covered":
        side = box[2:] - box[:2]
        corner = box[:2] + rng.uniform(0, 1, 2) * (1 - amount**0.5) * side
        (x0, y0), (x1, y1) = np.maximum(corner, 0).astype(int), (corner + amount**0.5 * side).astype(int)
        luma = luma.copy()
        luma[y0:y1, x0:x1] = 127
        return luma, box
    if what == "noise":
        return np.clip(luma + rng.normal(0, amount, luma.shape), 0, 255).astype(np.uint8), box
    return (luma * amount).astype(np.uint8), box  # darker


def given_up_otherwise(model: Model, faces: Sequence[Face], rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """The share of faces that two looks, and the model itself, give up in each of the ways of `WORSE`."""
    limit, rows = float(model.spec.lost_limit or 0), []
    for how in track(WORSE, "showing otherwise"):
        both, own = [], []
        for face in faces:
            luma, box = shown_otherwise(luma_from_file(face.image), boxes_from_points(face.xy), how, rng)
            found = model(Frame(luma, "gray"), np.stack([box, *second_looks(box[None])]))
            both.append(disagreement(found.xy[:1], found.xy[1:], box[None])[0] > LOST)
            own.append(found.lost_score is not None and found.lost_score[0] > limit)
        rows.append((how, f"{np.mean(both):.1%}", f"{np.mean(own):.1%}"))
    return rows


def auc(face: np.ndarray, other: np.ndarray) -> float:
    """Area under the ROC curve: how often a face scores below what is none."""
    return float((face[:, None] < other[None]).mean() + 0.5 * (face[:, None] == other[None]).mean())


def plot(path: Path, title: str, scores: dict[str, np.ndarray], is_face: np.ndarray) -> None:
    """The ROC curves: what is no face and noticed, against faces wrongly given up; the left end, where they differ."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "kp"
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for (color, dashes), (name, score) in zip(_STYLES, scores.items(), strict=False):
        limits = np.sort(score[is_face])[::-1][: 1 + int(0.1 * is_face.sum())]
        given_up = [(score[is_face] > limit).mean() * 100 for limit in limits]
        noticed = [(score[~is_face] > limit).mean() * 100 for limit in limits]
        axes.step(given_up, noticed, where="post", label=name, color=color, linestyle=dashes,
                  linewidth=2 if name in ("both", "own") else 1)  # fmt: skip
    axes.set(xlim=(0, 10), ylim=(40, 100.5), xlabel="faces given up, %", ylabel="lost faces noticed, %")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False)
    with writing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def main() -> None:
    """Measures, prints the tables and draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--yunet", type=Path, required=True)
    parser.add_argument("--most", type=int, default=150, help="faces of each source, evenly spread")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.most < 1:
        raise InputError("--most must be 1 or more")
    rng = np.random.default_rng(68)
    yunet = YuNetDetector(args.yunet, score=0.3)
    model, manifest = load(args.bundle, threads=1), Manifest.read(args.bundle)
    views, others, faces = views_of_things(rng), [], []
    for source in map(parse_source, args.data):
        held_out = held_out_faces([source], manifest)
        people = {face.person for face in held_out}
        others += [face.xy for face in source.faces if face.person not in people]
        faces += [held_out[i] for i in evenly_spread(len(held_out), args.most)]
    for face in track(faces, "photos"):
        views += views_of_face(face, yunet, rng)
    points, own_scores = [], []
    for view in track(views, "looking"):
        box = view.box[None]
        looks = np.stack(
            [view.box, moved_box(view.box, 0.07, 0.07, 1), moved_box(view.box, 0, 0, 1.12), *second_looks(box)]
        )
        found = model(Frame(view.luma, "gray"), looks)
        points.append(found.xy.astype(np.float64))
        own_scores.append(None if found.lost_score is None else found.lost_score[0])
    first, *seconds = np.stack(points).swapaxes(0, 1)
    boxes, kinds = np.stack([view.box for view in views]), np.array([view.kind for view in views])
    own = boxes_from_points(first)
    scores = {
        "box": 1 - np.array([overlaps(a[None], b[None])[0, 0] for a, b in zip(own, boxes, strict=True)]),
        "shape": ShapeModel(np.stack(others).astype(np.float64)).residual(first),
    }
    for name, second in zip(("shifted", "larger", "both"), seconds, strict=True):
        scores[name] = disagreement(first, second, boxes)
    is_face = np.isin(kinds, FACES)
    if model.spec.lost_limit is not None:
        scores["own"] = np.array(own_scores, np.float64)
    rest = [kind for kind in dict.fromkeys(kinds.tolist()) if kind not in FACES]
    rows = []
    for name, score in scores.items():
        limit = np.quantile(score[is_face], 0.99)
        areas = [f"{auc(score[is_face], score[kinds == kind]):.4f}" for kind in rest]
        total, missed = auc(score[is_face], score[~is_face]), (score[~is_face] <= limit).mean()
        rows.append((name, f"{total:.4f}", *areas, f"{missed:.1%}"))
    counts = ", ".join(f"{(kinds == kind).sum()} {kind}" for kind in dict.fromkeys(kinds.tolist()))
    print(counts)
    print_table(f"AUC, {manifest.spec.name}", ("score", "all", *rest, "missed where 1% of faces are given up"), rows)
    tried = {"both": (LOST, 0.035, 0.04, 0.045, 0.05, 0.06), "own": (0.3, 0.4, 0.5, 0.6, 0.7)}
    for name in [name for name in tried if name in scores]:
        face, lost = scores[name][is_face], scores[name][~is_face]
        rows = [(f"{k:g}", f"{(face > k).mean():.2%}", f"{(lost <= k).mean():.2%}") for k in tried[name]]
        print_table(f"{name}, by limit", ("limit", "faces given up", "lost faces missed"), rows)
    truth = np.stack([view.truth for view in views if view.truth is not None])
    for name, xy in (("first look", first), ("mean of both", (first + seconds[-1]) / 2)):
        print(f"NME of the faces, {name}: {point_errors(xy[is_face], truth).mean():.2%}")
    if model.spec.lost_limit is not None:
        print_table(f"{len(faces)} faces, given up", ("shown", "both", "own"), given_up_otherwise(model, faces, rng))
    if args.plot:
        plot(args.plot, f"{manifest.spec.name}: {is_face.sum()} faces, {(~is_face).sum()} others", scores, is_face)


if __name__ == "__main__":
    with one_line_errors("lost_faces"):
        main()
