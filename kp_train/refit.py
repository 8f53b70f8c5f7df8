"""The last layer of a trained network solved anew, in closed form, on boxes as they come in use.

Training sees boxes that err by more than most detectors' do, and its last layer answers for all of them. Here the
layers below stay as they are, and the last one becomes the best linear map from their 512 features to the points:
ridge regression (Hoerl and Kennard 1970) towards the weights that training found, re-weighted a few times so
that it is the mean distance that falls and not its square (iteratively re-weighted least squares). Half a minute of
looking at each face does what epochs of small steps did not. Beside it the lost score is solved (`lost_score`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kp_runtime.errors import DataError, InputError, KpError
from kp_runtime.frame import Frame
from kp_runtime.geometry import box_of_face
from kp_runtime.manifest import Manifest
from kp_train.augment import face_augment, mirror_from_pairs
from kp_train.bar import Bar, no_bar
from kp_train.checkpoint import CHECKPOINT_NAME, check_no_bundle, has_begun, load_checkpoint, save_checkpoint
from kp_train.data import Face, Source, evenly_spread, is_held_out, luma_of_face
from kp_train.dataset import FaceDataset
from kp_train.label_bias import source_biases, with_bias
from kp_train.lost_score import FACES, LIMIT, VIEWS, AnyPlace, ScoreQuality, elsewhere, score_quality, solved_score
from kp_train.metrics import nme_unit
from kp_train.model import KeypointNet
from kp_train.run_record import ancestry, learned_whole, unseen_fraction

__all__ = ["NothingGainedError", "Refit", "refit", "solved_head", "training_config"]

Boxes = Callable[[Frame], NDArray[np.float64]]
EXACT, JITTERED, SHAKEN, FOUND = "keypoints", "jittered", "shaken", "detector"
"""Boxes that a face is seen in: of its points, jittered as by `--augment faces`, jittered all as widely as four in ten
there, and the detector's."""

ALIKE = {EXACT: 1.0, JITTERED: 1.0, FOUND: 1.0}
"""How much each of them counts where nothing else is said."""

STRENGTHS = (1e-1, 1e-2, 1e-3)
"""Pulls towards the old weights, in mean squares of the features; held-out faces choose."""

_ROUNDS = 6
_LEAST = 0.01  # an NME under which a face counts no more
_BATCH = 64


class NothingGainedError(KpError):
    """A refit wrote nothing, as the model is as good without."""


@dataclass(frozen=True)
class Refit:
    """What a refit did.

    Attributes:
        strength: that was chosen; 0 where the last layer stayed as it was.
        boxes: how much each kind counted.
        faces: that it was solved on, each in all of these.
        held_out: held-out faces, by kind of box, exact ones in any case; the detector's are without those it missed.
        before: NME of held-out faces with the old last layer, by kind of box, a fraction.
        after: the same with the new one.
        lost_score: how well held-out faces are told from what is none; the model has it where that is of use.
    """

    strength: float
    boxes: dict[str, float]
    faces: int
    held_out: dict[str, int]
    before: dict[str, float]
    after: dict[str, float]
    lost_score: ScoreQuality


@dataclass(frozen=True)
class _Seen:
    """Faces in one kind of box: features `(n, 513)` float64, the last one 1; points `(n, k, 2)` px of the crop."""

    features: Tensor
    xy: Tensor
    unit: Tensor
    weight: Tensor


def _joined(seen: Sequence[_Seen]) -> _Seen:
    return _Seen(*(torch.cat(tensors) for tensors in zip(*(vars(s).values() for s in seen), strict=True)))


def refit(
    bundle: Path,
    sources: Sequence[Source],
    run: Path,
    detector: Boxes | None,
    *,
    boxes: Mapping[str, float] = ALIKE,
    strength: float | None = None,
    score_only: bool = False,
    made: dict[str, str] | None = None,
    bar: Callable[[str], Bar] = lambda text: no_bar,
) -> Refit:
    """Solves the last layer of a bundle's checkpoint anew, and its lost score, and writes a run's checkpoint.

    Args:
        bundle: what was trained; people whom it and what it began at held out are not solved on, and choose the
            strength.
        sources: labelled faces, counted by their weights.
        run: the folder to write.
        detector: finds boxes `(n, 4)` of 68 points on a grey frame; None leaves that view out, as for a model of points
            that lie in another box.
        boxes: the kinds that each face is seen in, of `EXACT`, `JITTERED`, `SHAKEN` and `FOUND`, and how much each
            counts, in what is solved and in what held-out people choose.
        strength: of the pull towards the old weights, in mean squares of the features; held-out people choose one of
            `STRENGTHS` when None, or that the layer stays.
        score_only: leave the last layer as it is, so that no keypoint moves, and solve the lost score alone.
        made: what the manifest says of the detector.
        bar: gives a text's wrapper of long loops.

    Raises:
        BundleError, IntegrityError: no checkpoint there.
        InputError: the model sees whole photos, no such kind of boxes or one that counts nothing, or such a strength.
        DataError: no faces to solve on or to choose by, or an image can't be read.
        NothingGainedError: no strength is better than the old weights, and the model gives a lost score already or
            can't give one that is of use.
        KpError: `run` holds a run or a bundle.
    """
    net, manifest = load_checkpoint(bundle)
    if manifest.spec.box != "keypoints":
        raise InputError("this model sees whole photos, not face boxes; kp refit is for models of face crops")
    weights = {kind: float(weight) for kind, weight in boxes.items() if kind != FOUND or detector is not None}
    _check_boxes(weights)
    if strength is not None and not (math.isfinite(strength) and strength > 0):
        raise InputError(f"the strength must be a number over 0, got {strength:g}")
    if strength is not None and score_only:
        raise InputError("a strength is of the last layer, which stays where the score alone is solved: leave one out")
    fraction = unseen_fraction(manifest)
    pairs = training_config(manifest).get("pairs", "")
    if has_begun(run):
        raise KpError(f"{run} already holds a run; name another folder with --out")
    check_no_bundle(run)
    mirror = mirror_from_pairs(pairs, net.points)
    runs = ancestry(manifest.training)
    sources = learned_whole(sources, runs)
    look = bar("measuring how the labels lie")  # half of the varied faces are mirrored
    biases = source_biases(net.eval(), sources, fraction, manifest.spec, mirror, runs, look)
    known = [(f, s) for s, bias in zip(sources, biases, strict=True) for f in with_bias(s.faces, bias)]
    unseen = [not source.whole and is_held_out(face.person, fraction) for face, source in known]
    faces = [(face, source.weight) for (face, source), new in zip(known, unseen, strict=True) if not new]
    others = [(face, 1.0) for (face, _), new in zip(known, unseen, strict=True) if new]
    if not faces or not others:
        whole = [str(source.path) for source in sources if source.whole]
        raise DataError(
            f"{len(faces)} faces to solve on and {len(others)} of held-out people to choose by; "
            + (f"the model may have seen all of {', '.join(whole)}: " if whole else "")
            + "give all the data that the model was trained on"
        )
    looker = _Looker(net, manifest, mirror, detector, bar)
    chosen_by = {kind: looker.seen(kind, others) for kind in {EXACT: 0.0, **weights}}  # exact ones to compare models by
    old = torch.cat([net.backbone.fc.weight, net.backbone.fc.bias[:, None]], dim=1).detach().double()
    before = {kind: _nme(net, seen, old) for kind, seen in chosen_by.items()}
    best, taken, after = old, 0.0, before
    if not score_only:
        solved_on = [looker.seen(kind, [(f, w * weight) for f, w in faces]) for kind, weight in weights.items()]
        for tried in STRENGTHS if strength is None else (strength,):
            new = solved_head(net, old, solved_on, tried)
            nme = {kind: _nme(net, seen, new) for kind, seen in chosen_by.items()}
            if strength is not None or sum(weights[kind] * (nme[kind] - after[kind]) for kind in weights) < 0:
                best, taken, after = new, tried, nme
    views = looker.anywhere(faces)
    score = solved_score(views.features, _errors(net, views, best))
    shown = _joined([*chosen_by.values(), looker.anywhere(others)])
    quality = score_quality(shown.features @ score, _errors(net, shown, best))
    if score_only and not quality.is_of_use:
        raise NothingGainedError(f"the lost score is of no use on the held-out faces ({quality}); nothing was written")
    if not score_only and best is old and (net.scores or not quality.is_of_use):
        raise NothingGainedError(
            "no last layer is better on the held-out faces than the one there is; nothing was written"
        )
    solved = KeypointNet(net.size, net.reduce, net.points, scores=quality.is_of_use)
    solved.backbone.load_state_dict(net.backbone.state_dict(), strict=False)
    with torch.no_grad():
        _fill(solved.backbone.fc, best)
        if solved.scores:
            _fill(solved.backbone.lost_score, score[None])
    counts = {kind: len(seen.xy) for kind, seen in chosen_by.items()}
    result = Refit(taken, weights, len(faces), counts, before, after, quality)
    start = {"start_sha256": manifest.files[CHECKPOINT_NAME].sha256, **(made or {})}
    training = _records(manifest.training, start, sources, biases, result)
    spec = dataclasses.replace(manifest.spec, lost_limit=LIMIT if solved.scores else None)
    accuracy = _without_given_up(manifest.accuracy) if best is old else {}  # no keypoint has moved
    save_checkpoint(run, solved, Manifest(spec, training=training, accuracy=accuracy, licence=manifest.licence))
    return result


def _check_boxes(weights: dict[str, float]) -> None:
    kinds = (EXACT, JITTERED, SHAKEN, FOUND)
    for kind, weight in weights.items():
        if kind not in kinds:
            raise InputError(f"there are no boxes {kind!r}; choose from {', '.join(kinds)}")
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"the weight of the boxes {kind} must be a number over 0, got {weight:g}")
    if not weights:
        raise InputError("there are no boxes to solve on: a detector's are not for this model")


def _records(
    training: dict[str, Any],
    start: dict[str, Any],
    sources: Sequence[Source],
    biases: Sequence[NDArray[np.float64] | None],
    result: Refit,
) -> dict[str, Any]:
    """The manifest's record with what became of the last layer and of the lost score."""
    rest = {key: value for key, value in training.items() if key != "lost_score"}
    named = [{"name": source.name, "sha256": source.sha256} for source in sources]
    if result.strength:
        of_layer = {key: value for key, value in vars(result).items() if key != "lost_score"}
        weighed = [
            one | {"weight": source.weight, "label_bias": None if bias is None else bias.tolist()}
            for one, source, bias in zip(named, sources, biases, strict=True)
        ]
        rest["refit"] = start | {"sources": weighed, **of_layer}
    if result.lost_score.is_of_use:
        rest["lost_score"] = start | {"sources": named, **vars(result.lost_score)}
    return rest


def _without_given_up(accuracy: dict[str, Any]) -> dict[str, Any]:
    """What was measured without what the lost score that there was said of it."""
    return {
        name: {key: value for key, value in one.items() if key != "given_up"} if isinstance(one, dict) else one
        for name, one in accuracy.items()
    }


def _fill(layer: nn.Linear, weights: Tensor) -> None:
    """Weights, and the bias behind them, `(outputs, 513)`."""
    layer.weight.copy_(weights[:, :-1])
    layer.bias.copy_(weights[:, -1])


def solved_head(net: KeypointNet, old: Tensor, seen: Sequence[_Seen], strength: float) -> Tensor:
    """Weights and bias `(2 * points, 513)` float64 that bring the mean NME down.

    Args:
        net: whose units the weights answer in.
        old: weights that the new ones are pulled to.
        seen: what to solve on.
        strength: of the pull, times the mean square of a feature.
    """
    joined = _joined(seen)
    features, xy, unit, weight = joined.features, joined.xy, joined.unit, joined.weight
    missing, count = net.encode(xy) - features @ old.T, len(features)
    share, new = weight / unit**2, old
    for _ in range(_ROUNDS):
        share = share / share.mean()
        weighted = (features * share[:, None]).T
        square = weighted @ features / count
        pull = strength * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
        new = old + torch.linalg.solve(square + pull, weighted @ missing / count).T
        # a squared distance over the distance is the distance: faces that never will fit count less
        share = weight / unit**2 / (_distances(net, features, xy, new) / unit + _LEAST)
    return new


def _distances(net: KeypointNet, features: Tensor, xy: Tensor, weights: Tensor) -> Tensor:
    """Mean distance of each face's points, px of the crop."""
    distances: Tensor = (net.decode(features @ weights.T) - xy).norm(dim=-1).mean(dim=1)
    return distances


def _errors(net: KeypointNet, seen: _Seen, weights: Tensor) -> Tensor:
    """NME of each face, a fraction."""
    return _distances(net, seen.features, seen.xy, weights) / seen.unit


def _nme(net: KeypointNet, seen: _Seen, weights: Tensor) -> float:
    return float(_errors(net, seen, weights).mean())


def _spread(xy: NDArray[np.floating]) -> NDArray[np.float64]:
    """How far each face's points lie from their middle, `(n,)`, whatever the turn."""
    spread: NDArray[np.float64] = np.linalg.norm(xy - xy.mean(axis=1, keepdims=True), axis=(1, 2))
    return spread


def training_config(manifest: Manifest) -> dict[str, Any]:
    """The settings that a model was trained with; DataError where its manifest does not say."""
    config = manifest.training.get("config")
    if not isinstance(config, dict):
        raise DataError(f"the manifest of {manifest.spec.name} has no training config; take a model of kp train")
    return config


class _Looker:
    """Runs all but the last layer on faces."""

    def __init__(
        self,
        net: KeypointNet,
        manifest: Manifest,
        mirror: NDArray[np.intp] | None,
        detector: Boxes | None,
        bar: Callable[[str], Bar],
    ) -> None:
        self._net, self._spec, self._detector, self._bar = net, manifest.spec, detector, bar
        self._varied = {EXACT: None, JITTERED: face_augment(mirror), SHAKEN: face_augment(mirror, wide=1.0)}

    def seen(self, kind: str, faces: Sequence[tuple[Face, float]]) -> _Seen:
        """In one kind of boxes; how a face is varied depends on its place alone, and the detector may miss some."""
        if kind == FOUND and self._detector is not None:
            return self._found(faces, self._detector)
        varied = self._varied[kind]
        kept = FaceDataset([face for face, _ in faces], self._spec, varied)
        keys = [(i, i) if varied else i for i in range(len(faces))]
        return self._features(kept, keys, [weight for _, weight in faces], kind)

    def _found(self, faces: Sequence[tuple[Face, float]], detector: Boxes) -> _Seen:
        kept, boxes = [], []
        for face, weight in self._bar("finding faces")(faces):
            box = box_of_face(detector(Frame(luma_of_face(face), "gray")), face.xy)
            if box is not None:
                kept.append((face, weight))
                boxes.append(box)
        if not kept:
            raise DataError(
                f"the detector found none of {len(faces)} faces; take another one, or leave it out: --boxes keypoints "
                "--boxes jittered"
            )
        shown = FaceDataset([face for face, _ in kept], self._spec, boxes_xyxy=np.stack(boxes))
        return self._features(shown, range(len(kept)), [weight for _, weight in kept], FOUND)

    def anywhere(self, faces: Sequence[tuple[Face, float]]) -> _Seen:
        """Some of them in squares anywhere about them, and places of their photos that hold no face."""
        some = [faces[i][0] for i in evenly_spread(len(faces), FACES)]
        keys = [(i % len(some), i) for i in range(VIEWS * len(some))]
        around = self._features(FaceDataset(some, self._spec, AnyPlace()), keys, [1.0] * len(keys), "anywhere")
        others, boxes = elsewhere(
            self._bar("finding places without a face")(some), [face for face, _ in faces], self._detector
        )
        if not others:
            return around
        shown = FaceDataset(others, self._spec, boxes_xyxy=boxes)
        return _joined([around, self._features(shown, range(len(others)), [1.0] * len(others), "elsewhere")])

    @torch.inference_mode()
    def _features(
        self, faces: FaceDataset, keys: Sequence[int | tuple[int, int]], weights: Sequence[float], kind: str
    ) -> _Seen:
        features, points = [], []
        for start in self._bar(f"looking, {kind}")(range(0, len(keys), _BATCH)):
            batch = [faces[key] for key in keys[start : start + _BATCH]]
            features.append(self._net.features(torch.stack([crop for crop, _ in batch])).double())
            points.append(torch.stack([xy for _, xy in batch]).double())
        seen, xy = torch.cat(features), torch.cat(points)
        labels = np.stack([faces.faces[key if isinstance(key, int) else key[0]].xy for key in keys])
        # by the label's own size and the view's scale: a box would change with the turn
        unit = torch.from_numpy(nme_unit(labels) * _spread(xy.numpy()) / _spread(labels))
        ones = torch.ones(len(seen), 1, dtype=torch.float64)
        return _Seen(torch.cat([seen, ones], dim=1), xy, unit, torch.tensor(weights, dtype=torch.float64))
