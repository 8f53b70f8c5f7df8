"""The last layer solved anew: the algebra by known answers, the command on drawn faces."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from kp_cli.options import CHECKOUT_DETECTOR
from kp_runtime.errors import BundleError, DataError, InputError, KpError
from kp_runtime.files import sha256_of_file
from kp_runtime.frame import Frame
from kp_runtime.geometry import boxes_from_points
from kp_runtime.manifest import Manifest
from kp_runtime.spec import ModelSpec
from kp_train.augment import Augment
from kp_train.bar import no_bar
from kp_train.checkpoint import check_start, load_checkpoint, save_checkpoint
from kp_train.config import TrainConfig
from kp_train.data import Face, Source, is_held_out, luma_from_file, read_source
from kp_train.dataset import FaceDataset
from kp_train.lost_score import LIMIT, VIEWS, elsewhere
from kp_train.metrics import nme_unit
from kp_train.model import KeypointNet
from kp_train.refit import Refit, _errors, _Looker, _Seen, refit, solved_head
from kp_train.synthetic import mean_shape, write_csv_source
from tests.test_cli import kp

TRAINING = {"config": dataclasses.asdict(TrainConfig(size=64)), "held_out": {"val_fraction": 0.3}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return read_source(write_csv_source(tmp_path_factory.mktemp("faces"), people=30, each=2))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that answers the mean face, whatever it sees."""
    torch.manual_seed(1)
    net = KeypointNet(64).eval()
    net.start_from_mean(torch.from_numpy(mean_shape() * 22 + 32).float())
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder, net, Manifest(ModelSpec("x", size=64), training=TRAINING, licence={"code": "MIT"}))
    return folder


@pytest.fixture(autouse=True)
def few_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of each face that the lost score is told from: over half of the time, and the subject of two tests."""
    monkeypatch.setattr("kp_train.refit.VIEWS", 1)


SCORE = ("backbone.lost_score.weight", "backbone.lost_score.bias")


def changed(old: KeypointNet, new: KeypointNet) -> set[str]:
    """The tensors that are new or others."""
    before = old.state_dict()
    return {
        name for name, value in new.state_dict().items() if name not in before or not torch.equal(value, before[name])
    }


class Detector:
    """Boxes of the points, off a little; of every tenth photo none."""

    def __init__(self, source: Source) -> None:
        self._boxes = {luma_from_file(f.image).tobytes(): boxes_from_points(f.xy) for f in source.faces[1:]}
        self.asked = 0

    def __call__(self, frame: Frame) -> np.ndarray:
        self.asked += 1
        box = self._boxes.get(frame.data.tobytes())
        return np.empty((0, 4)) if box is None or self.asked % 10 == 0 else np.stack([box + 2, box + 500])


def seen(features: torch.Tensor, xy: torch.Tensor) -> _Seen:
    one = torch.ones(len(features), dtype=torch.float64)
    return _Seen(torch.cat([features, one[:, None]], dim=1), xy, 20 * one, one)


def test_a_linear_map_is_found() -> None:
    """From points that are one, whatever the weights began with; a strong pull leaves these as they were."""
    torch.manual_seed(0)
    net = KeypointNet(64)
    truth, old = torch.randn(2, 136, 13, dtype=torch.float64)
    data = seen(features := torch.randn(200, 12, dtype=torch.float64), torch.empty(0))
    data = seen(features, net.decode(data.features @ truth.T))
    assert torch.allclose(solved_head(net, old, [data], 1e-9), truth, atol=1e-5)
    assert (solved_head(net, old, [data], 1e9) - old).abs().max() < 1e-6


def test_faces_that_are_labelled_wrongly_hardly_count() -> None:
    """A tenth of the faces lies far off: least squares would go a tenth of the way."""
    torch.manual_seed(0)
    net = KeypointNet(64)
    truth, old = torch.randn(136, 4, dtype=torch.float64), torch.zeros(136, 4, dtype=torch.float64)
    features = torch.randn(400, 3, dtype=torch.float64)
    right = net.decode(seen(features, torch.empty(0)).features @ truth.T)
    wrong = right.clone()
    wrong[::10] += 30
    found = solved_head(net, old, [seen(features, wrong)], 1e-9)
    off = (net.decode(seen(features, right).features @ found.T) - right).norm(dim=-1)
    assert off.max() < 1.5


@pytest.mark.parametrize(("count", "low", "high"), [(80, 35, 50), (50, 0, 15)])
def test_it_is_the_mean_nme_that_falls(count: int, low: float, high: float) -> None:
    """Of one answer for all: faces of double size stand against 30.

    80 of them would lose were distances squared, 50 would win were they not counted in the face's own size.
    """
    torch.manual_seed(0)
    net = KeypointNet(64)
    near, far = torch.zeros(30, 68, 2, dtype=torch.float64), torch.full((count, 68, 2), 50.0, dtype=torch.float64)
    ones = torch.ones(30 + count, 1, dtype=torch.float64)
    unit = torch.cat([torch.full((30,), 10.0), torch.full((count,), 20.0)]).double()
    data = _Seen(torch.cat([0 * ones, ones], dim=1), torch.cat([near, far]), unit, ones[:, 0])
    old = torch.zeros(136, 2, dtype=torch.float64)
    found = net.decode(data.features[:1] @ solved_head(net, old, [data], 1e-9).T)
    assert low < found.mean() < high  # towards the more of 30 / 10 and count / 20


@pytest.mark.parametrize("points", [5, 68])
def test_a_turned_face_counts_as_an_upright_one(tmp_path: Path, points: int) -> None:
    """Own points' NME is counted in their box's longer side, which changes with the turn."""
    torch.manual_seed(0)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((200, 200), np.uint8))
    xy = (mean_shape() * 60 + 100)[np.linspace(0, 67, points).astype(int)].astype(np.float32)
    spec = ModelSpec("x", 64, points=points, scheme="ibug68" if points == 68 else "own")
    looker = _Looker(KeypointNet(64, points=points), Manifest(spec), None, None, lambda text: no_bar)
    turned = FaceDataset([Face(tmp_path / "a.png", xy)], spec, Augment(0.1, 0.2, 0.2, 30, None, v2.Identity()))
    seen = looker._features(turned, [(0, seed) for seed in range(8)], [1.0] * 8, "turned")
    scale = (seen.xy[:, 0] - seen.xy[:, -1]).norm(dim=-1).numpy() / np.linalg.norm(xy[0] - xy[-1])
    np.testing.assert_allclose(seen.unit.numpy(), scale * nme_unit(xy[None])[0], rtol=1e-4)


def test_held_out_people_gain(source: Source, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at, look = [], _Looker.seen

    def noted(looker: _Looker, kind: str, faces: list[tuple[Face, float]]) -> _Seen:
        looked_at.append((kind, {is_held_out(face.person, 0.3) for face, _ in faces}))
        return look(looker, kind, faces)

    with monkeypatch.context() as patched:
        patched.setattr(_Looker, "seen", noted)
        result = refit(run, [source], tmp_path / "new", Detector(source))
    # these choose, those are solved on
    assert looked_at == [(kind, {held}) for held in (True, False) for kind in ("keypoints", "jittered", "detector")]
    assert all(result.after[kind] < 0.9 * result.before[kind] for kind in ("keypoints", "detector", "jittered"))
    old, new = load_checkpoint(run), load_checkpoint(tmp_path / "new")
    assert changed(old[0], new[0]) == {"backbone.fc.weight", "backbone.fc.bias"}
    held_out = sum(is_held_out(face.person, 0.3) for face in source.faces)
    assert (result.faces, result.held_out["keypoints"]) == (len(source.faces) - held_out, held_out)
    assert not result.lost_score.is_of_use, "this network finds no face"
    assert new[1].spec.lost_limit is None
    record = new[1].training["refit"]
    assert record["start_sha256"] == old[1].files["checkpoint.safetensors"].sha256
    assert record["strength"] == result.strength
    assert new[1].licence == {"code": "MIT"}
    assert {k: v for k, v in new[1].training.items() if k != "refit"} == old[1].training
    refit(run, [source], tmp_path / "again", Detector(source))
    again = load_checkpoint(tmp_path / "again")[0].backbone.fc
    assert torch.allclose(again.weight, new[0].backbone.fc.weight, atol=1e-4)  # threads add in any order
    assert result.held_out.keys() == result.after.keys()
    with pytest.raises(KpError, match="already holds a bundle; name another folder"):
        refit(run, [source], tmp_path / "new", Detector(source))


def test_a_lost_score_that_is_of_no_use_is_left_out(
    source: Source, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kp_train.refit.VIEWS", VIEWS)
    monkeypatch.setattr("kp_cli.training.open_detector", lambda name, threads: Detector(source))
    words = ("refit", run, "--data", source.path, "--out")
    printed = kp(capsys, *words, tmp_path / "a")[1]
    assert re.search(r"lost score: .* taken for a face; left out: the model does not find faces well enough", printed)
    status, _, error = kp(capsys, *words, tmp_path / "b", "--score-only")
    assert status == 1
    assert re.search(
        r"^kp: the lost score is of no use on the held-out faces \(.*\); nothing was written$", error, re.M
    )
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_the_lost_score_alone_moves_no_keypoint(
    source: Source, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kp_train.refit.VIEWS", VIEWS)
    monkeypatch.setattr("kp_train.lost_score.MOST_WRONG", 1.0)
    measured = dataclasses.replace(
        Manifest.read(run),
        training=TRAINING | {"refit": {"strength": 0.1}},
        accuracy={"x": {"nme": 0.1, "given_up": 0.5}, "note": "mine", "int8": {"nme": 0.1, "sha256": "0" * 64}},
    )
    measured.write(shutil.copytree(run, tmp_path / "run"))
    result = refit(tmp_path / "run", [source], tmp_path / "a", Detector(source), score_only=True)
    (old, _), (new, manifest) = load_checkpoint(run), load_checkpoint(tmp_path / "a")
    assert manifest.accuracy == {"x": {"nme": 0.1}, "note": "mine"}  # another score gives others up
    assert changed(old, new) == set(SCORE)
    crops = torch.randint(0, 256, (3, 1, 64, 64), dtype=torch.uint8)
    keypoints, scores = new.outputs(crops)
    assert torch.equal(keypoints, old(crops))
    assert scores.shape == (3, 1)
    assert (result.strength, result.before) == (0, result.after)
    told = manifest.training["lost_score"]
    assert {key: told[key] for key in vars(result.lost_score)} == vars(result.lost_score)
    assert told["start_sha256"] == Manifest.read(run).files["checkpoint.safetensors"].sha256
    assert manifest.training["refit"] == {"strength": 0.1}  # of the last layer, which is still that one
    assert result.lost_score.lost > 50
    assert manifest.spec.lost_limit == LIMIT


def test_a_last_layer_that_is_the_best_stays_and_gets_a_lost_score(
    source: Source, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kp_train.refit.STRENGTHS", ())
    with pytest.raises(KpError, match="no last layer is better on the held-out faces than the one there is"):
        refit(run, [source], tmp_path / "c", None)  # nor is the lost score of use
    monkeypatch.setattr("kp_train.lost_score.MOST_WRONG", 1.0)
    assert refit(run, [source], tmp_path / "a", None).strength == 0
    assert changed(load_checkpoint(run)[0], load_checkpoint(tmp_path / "a")[0]) == set(SCORE)
    with pytest.raises(KpError, match="no last layer is better on the held-out faces than the one there is"):
        refit(tmp_path / "a", [source], tmp_path / "b", None)
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_what_can_not_be_refitted(source: Source, run: Path, tmp_path: Path) -> None:
    detector, net = Detector(source), load_checkpoint(run)[0]
    with pytest.raises(BundleError, match="there is no checkpoint at"):
        refit(tmp_path / "nowhere", [source], tmp_path / "a", detector)
    save_checkpoint(tmp_path / "frame", net, Manifest(ModelSpec("x", size=64, box="frame"), training=TRAINING))
    with pytest.raises(InputError, match="this model sees whole photos"):
        refit(tmp_path / "frame", [source], tmp_path / "a", detector)
    save_checkpoint(tmp_path / "unknown", net, Manifest(ModelSpec("x", size=64)))
    with pytest.raises(DataError, match="does not say which people were held out"):
        refit(tmp_path / "unknown", [source], tmp_path / "a", detector)
    seen_before = TRAINING | {"start": {"training": {"held_out": {"val_fraction": 1e-9}}}}
    save_checkpoint(tmp_path / "seen", net, Manifest(ModelSpec("x", size=64), training=seen_before))
    with pytest.raises(DataError, match="60 faces to solve on and 0 of held-out people"):
        refit(tmp_path / "seen", [source], tmp_path / "a", detector)
    one = Source(source.path, 1.0, source.faces[:1], source.sha256)
    with pytest.raises(DataError, match="choose by; give all the data that the model was trained on"):
        refit(run, [one], tmp_path / "a", detector)
    learned = TRAINING | {"sources": [{"sha256": source.sha256, "whole": True}]}
    save_checkpoint(tmp_path / "whole", net, Manifest(ModelSpec("x", size=64), training=learned))
    with pytest.raises(DataError, match=r"the model may have seen all of .*: give all the data"):
        refit(tmp_path / "whole", [source], tmp_path / "a", detector)
    with pytest.raises(DataError, match=r"the detector found none of .* leave it out: --boxes keypoints"):
        refit(run, [source], tmp_path / "a", lambda frame: np.empty((0, 4)))
    assert not list((tmp_path / "a").iterdir())


def test_a_packed_bundle_is_not_written_over(source: Source, run: Path, tmp_path: Path) -> None:
    """A bundle without a checkpoint and without a run's state, such as `kp pack` makes."""
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "manifest.json").write_text("kept")
    with pytest.raises(KpError, match="already holds a bundle; name another folder"):
        refit(run, [source], packed, Detector(source))
    with pytest.raises(KpError, match="already holds a bundle; name another folder"):
        check_start(packed, resume=False)
    assert (packed / "manifest.json").read_text() == "kept"
    (tmp_path / "file").touch()
    with pytest.raises(KpError, match=r"can't write into .*file: .*; name another folder with --out"):
        refit(run, [source], tmp_path / "file", Detector(source))


def test_without_a_detector_its_boxes_are_left_out(source: Source, run: Path, tmp_path: Path) -> None:
    loops: list[str] = []

    def bar(text: str) -> type[list[Any]]:
        loops.append(text)
        return list

    result = refit(run, [source], tmp_path / "new", None, bar=bar)
    assert result.after.keys() == result.held_out.keys() == {"keypoints", "jittered"}
    looks = ["looking, keypoints", "looking, jittered", "looking, anywhere", "finding places without a face"]
    assert "looking, elsewhere" in loops  # though most drawn faces fill their photos
    loops = [text for text in loops if text != "looking, elsewhere"]
    assert loops == ["measuring how the labels lie", *looks[:2] * 2, *looks[2:] * 2]


def test_the_best_strength_by_the_weights_of_the_boxes_is_taken(
    source: Source, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By made-up NMEs in exact and in shaken boxes: before, and with each strength. The score is of what is taken."""
    told = iter([0.10, 0.10, 0.08, 0.11, 0.12, 0.09, 0.11, 0.094])
    asked: list[torch.Tensor] = []

    def errors(net: KeypointNet, seen: _Seen, weights: torch.Tensor) -> torch.Tensor:
        asked.append(weights)
        return _errors(net, seen, weights)

    monkeypatch.setattr("kp_train.refit._nme", lambda *_: next(told))
    monkeypatch.setattr("kp_train.refit._errors", errors)
    few = dataclasses.replace(source, faces=source.faces[:20])
    result = refit(run, [few], tmp_path / "a", None, boxes={"keypoints": 1, "shaken": 3})
    assert (result.strength, result.after) == (0.01, {"keypoints": 0.12, "shaken": 0.09})
    head = load_checkpoint(tmp_path / "a")[0].backbone.fc
    assert len(asked) == 2
    assert all(torch.allclose(weights[:, :-1].float(), head.weight, atol=1e-3) for weights in asked)


def test_a_strength_that_is_given_is_taken(
    source: Source, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever held-out people gain by it: by made-up NMEs they lose."""
    told, tried = iter([0.10, 0.12]), []
    monkeypatch.setattr("kp_train.refit._nme", lambda *_: next(told))
    monkeypatch.setattr("kp_train.refit.solved_head", lambda net, old, seen, by: tried.append(by) or old + 1)
    few = dataclasses.replace(source, faces=source.faces[:20])
    result = refit(run, [few], tmp_path / "a", None, boxes={"keypoints": 1}, strength=0.03)
    assert (tried, result.strength, result.after) == ([0.03], 0.03, {"keypoints": 0.12})
    for odd in (0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=r"the strength must be a number over 0, got"):
            refit(run, [few], tmp_path / "b", None, strength=odd)
    with pytest.raises(InputError, match="leave one out"):
        refit(run, [few], tmp_path / "b", None, strength=0.1, score_only=True)


def test_labels_are_known_to_lie_to_one_side(
    source: Source, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = np.tile([0.01, 0.0], (68, 1))
    known: list[np.ndarray | None] = []

    def looked_at(looker: _Looker, kind: str, faces: Any) -> None:
        known.extend(face.bias for face, _ in faces)
        raise KeyboardInterrupt

    monkeypatch.setattr("kp_train.refit.source_biases", lambda *_: [bias])
    monkeypatch.setattr("kp_train.refit._Looker.seen", looked_at)
    with pytest.raises(KeyboardInterrupt):
        refit(run, [source], tmp_path / "a", None)
    assert known
    assert all(one is bias for one in known)


def test_shaken_boxes_are_all_off_as_far_as_some_jittered_ones(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((200, 200), np.uint8))
    face = Face(tmp_path / "a.png", (mean_shape() * 60 + 100).astype(np.float32))
    looker = _Looker(KeypointNet(64), Manifest(ModelSpec("x", 64)), None, None, lambda text: no_bar)
    seen = [looker.seen(kind, [(face, 1.0)] * 40).xy.mean(dim=1) for kind in ("jittered", "shaken")]
    jittered, shaken = (float(middle.std(dim=0).mean()) for middle in seen)
    assert shaken > 1.2 * jittered


def test_a_face_is_seen_in_the_box_that_the_detector_found(tmp_path: Path) -> None:
    """A tenth of the face to the right: its points lie so far to the left in the crop."""
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((200, 200), np.uint8))
    face = Face(tmp_path / "a.png", (mean_shape() * 60 + 100).astype(np.float32))
    box = boxes_from_points(face.xy)
    found = box + 0.1 * (box[2:] - box[:2]).max() * np.array([1, 0, 1, 0])
    net, spec = KeypointNet(64), ModelSpec("x", 64)
    looker = _Looker(net, Manifest(spec), None, lambda frame: found[None], lambda text: no_bar)
    exact, off = (looker.seen(kind, [(face, 1.0)]).xy for kind in ("keypoints", "detector"))
    np.testing.assert_allclose(off - exact, np.tile([-0.1 * 64 / spec.margin, 0.0], (1, 68, 1)), atol=1e-3)


def test_boxes_count_as_is_said(source: Source, run: Path, tmp_path: Path) -> None:
    """Alone, or with so much weight that the others are nothing beside them; exact boxes are looked at in any case."""

    def head(name: str, **boxes: float) -> tuple[Refit, torch.Tensor]:
        result = refit(run, [source], tmp_path / name, None, boxes=boxes)
        return result, load_checkpoint(tmp_path / name)[0].backbone.fc.weight

    (alone, shaken), (_, exact) = head("a", shaken=1), head("b", keypoints=1)
    assert alone.after.keys() == {"keypoints", "shaken"}
    assert (alone.boxes, Manifest.read(tmp_path / "a").training["refit"]["boxes"]) == ({"shaken": 1}, {"shaken": 1})
    assert not torch.allclose(shaken, exact, atol=0.01)
    both, mixed = head("c", shaken=1e6, keypoints=1)
    assert both.strength == alone.strength
    assert torch.allclose(mixed, shaken, atol=1e-3)


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        ({"exact": 1}, "there are no boxes 'exact'; choose from keypoints, jittered, shaken, detector"),
        ({"shaken": 0}, "the weight of the boxes shaken must be a number over 0, got 0"),
        ({"shaken": math.nan}, "the weight of the boxes shaken must be a number over 0, got nan"),
        ({"detector": 1}, "there are no boxes to solve on: a detector's are not for this model"),
    ],
)
def test_boxes_that_there_are_not(
    source: Source, run: Path, tmp_path: Path, boxes: dict[str, float], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        refit(run, [source], tmp_path / "a", None, boxes=boxes)


def test_the_command(
    source: Source,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("kp_cli.training.open_detector", lambda name, threads: Detector(source))
    words = ("refit", run, "--data", source.path, "--out")
    status, printed, _ = kp(capsys, *words, tmp_path / "a b")
    assert status == 0
    assert "NME of held-out people" in printed
    assert f"next: kp export '{tmp_path / 'a b'}' --fp16" in printed
    told = r"faces, strength 0\.\d+, boxes keypoints=1.0, jittered=1.0, detector=1.0, detector own\n"
    assert re.search(r"\nlast layer solved anew on \d+ " + told, kp(capsys, "inspect", tmp_path / "a b")[1])
    record = Manifest.read(tmp_path / "a b").training["refit"]
    assert record["detector_sha256"] == sha256_of_file(CHECKOUT_DETECTOR / "manifest.json")
    for odd, line in (
        (("shaken=much",), "--boxes is KIND or KIND=WEIGHT, such as keypoints=2; got 'shaken=much'"),
        (("shaken=",), "--boxes is KIND or KIND=WEIGHT, such as keypoints=2; got 'shaken='"),
        (("shaken", "shaken=2"), "--boxes shaken is given twice; give it once, with its weight"),
    ):
        named = [word for text in odd for word in ("--boxes", text)]
        assert kp(capsys, *words, tmp_path / "b", *named)[2] == f"kp: {line}\n"
    options = ("--json", "--boxes", "shaken=2", "--boxes", "detector", "--strength", "0.02")
    status, printed, _ = kp(capsys, *words, tmp_path / "b", *options)
    assert json.loads(printed)["strength"] == 0.02
    assert json.loads(printed)["boxes"] == {"shaken": 2, "detector": 1}
    assert json.loads(printed)["after"].keys() == {"keypoints", "shaken", "detector"}
    assert json.loads(printed)["lost_score"].keys() == {"faces", "given_up", "lost", "missed"}
    assert kp(capsys, *words, tmp_path / "b")[2] == (
        f"kp: {tmp_path / 'b'} already holds a bundle; name another folder with --out\n"
    )
    assert kp(capsys, "refit", tmp_path / "nowhere", *words[2:], tmp_path / "c")[2] == (
        f"kp: there is no bundle or run at {tmp_path / 'nowhere'}\n"
    )


def test_what_was_measured_of_other_keypoints_is_not_kept(source: Source, run: Path, tmp_path: Path) -> None:
    training = TRAINING | {"lost_score": {"faces": 9}}
    measured = dataclasses.replace(Manifest.read(run), training=training, accuracy={"x": {"nme": 0.1}})
    measured.write(shutil.copytree(run, tmp_path / "run"))
    assert refit(tmp_path / "run", [source], tmp_path / "new", None, boxes={"keypoints": 1}).strength > 0
    new = Manifest.read(tmp_path / "new")
    assert new.accuracy == {}
    assert "lost_score" not in new.training  # it gives none


def test_sources_count_by_their_weights(source: Source, run: Path, tmp_path: Path) -> None:
    def head(name: str, *weights: float) -> torch.Tensor:
        halves = (source.faces[:30], source.faces[30:])
        parts = [dataclasses.replace(source, faces=f, weight=w) for f, w in zip(halves, weights, strict=True)]
        refit(run, parts, tmp_path / name, None, boxes={"keypoints": 1})
        return load_checkpoint(tmp_path / name)[0].backbone.fc.weight

    assert not torch.allclose(head("a", 1e6, 1.0), head("b", 1.0, 1e6), atol=0.01)


def test_a_lost_score_is_judged_by_held_out_faces(
    source: Source, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, detector = [], Detector(source)

    def places(faces: Any, labelled: Any, detector: Any) -> Any:
        asked.append(({is_held_out(face.person, 0.3) for face in faces}, len(faces), len(labelled), detector))
        return elsewhere(faces, labelled, detector)

    monkeypatch.setattr("kp_train.lost_score.MOST_WRONG", 1.0)
    monkeypatch.setattr("kp_train.refit.elsewhere", places)
    monkeypatch.setattr("kp_train.refit.FACES", 10)
    refit(run, [source], tmp_path / "a", detector, score_only=True)
    held_out = sum(is_held_out(face.person, 0.3) for face in source.faces)
    # solved on these, judged by those; no place holds one of the other faces, labelled or not
    assert asked == [({False}, 10, 60 - held_out, detector), ({True}, 10, held_out, detector)]
