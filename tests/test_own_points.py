"""Another number of points than 68, from the labels to the results; docs/own_points.md goes the whole way."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import kp_runtime
from kp_runtime.errors import BundleError, DataError, InputError, KpError
from kp_runtime.interchange import faces_to_file
from kp_runtime.labelled_face import LabelledFace
from kp_runtime.manifest import Manifest
from kp_runtime.pts import pts_text
from kp_runtime.scheme68 import MIRROR, mean_of_mirrored
from kp_runtime.spec import ModelSpec
from kp_train.augment import augment_from_name, mirror_from_pairs
from kp_train.checkpoint import load_checkpoint, save_checkpoint
from kp_train.config import TrainConfig
from kp_train.data import parse_source, read_source
from kp_train.metrics import accuracy, nme_unit
from kp_train.model import KeypointNet
from kp_train.run_record import stored_record
from tests.test_cli import kp

FIVE = np.array([[40.0, 40], [60, 40], [50, 55], [42, 70], [58, 70]], np.float32)


@pytest.mark.parametrize(("points", "scheme"), [(5, "ibug68"), (68, "own"), (1, "own"), (1001, "own"), (5.0, "own")])
def test_a_contract_of_other_points_says_so(points: int, scheme: str) -> None:
    assert ModelSpec("five", points=5, scheme="own").points == 5
    with pytest.raises(BundleError, match="points"):
        ModelSpec("five", points=points, scheme=scheme)


def test_labels_have_the_number_that_was_asked_for(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a_0.png"), np.zeros((90, 90), np.uint8))
    (tmp_path / "faces.csv").write_text("a_0.png," + ",".join(map(str, FIVE.ravel())))
    (tmp_path / "a_0.pts").write_text(pts_text(FIVE))
    for source in (tmp_path, tmp_path / "faces.csv"):
        (face,) = read_source(source, points=5).faces
        np.testing.assert_array_equal(face.xy, FIVE)
        np.testing.assert_array_equal(parse_source(f"{source}=2", 5).faces[0].xy, FIVE)
        with pytest.raises(DataError, match="68 points, got"):
            read_source(source)
        with pytest.raises(DataError, match="98 points, got"):
            read_source(source, points=98)


def test_points_on_one_line_have_a_size_and_on_one_spot_none(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a_0.png"), np.zeros((90, 90), np.uint8))
    (tmp_path / "a_0.pts").write_text(pts_text(np.array([[20.0, 30], [44, 30]])))
    (face,) = read_source(tmp_path, points=2).faces
    assert nme_unit(face.xy[None]).tolist() == [24]
    (tmp_path / "a_0.pts").write_text(pts_text(np.array([[20.0, 30], [20, 30]])))
    with pytest.raises(DataError, match=r"a_0\.pts: all points lie within one pixel"):
        read_source(tmp_path, points=2)


def test_pairs_say_how_a_face_is_mirrored() -> None:
    assert mirror_from_pairs("", 68) is MIRROR
    assert mirror_from_pairs("", 5) is None
    order = mirror_from_pairs("0-1,3-4", 5)
    assert order is not None
    assert order.tolist() == [1, 0, 2, 4, 3]
    assert augment_from_name("light", order).mirror.order.tolist() == order.tolist()  # type: ignore[union-attr]
    assert augment_from_name("light", None).mirror is None  # type: ignore[union-attr]
    for wrong in ("0-1,1-2", "0-5", "0", "a-b", "0-1-2", "-1-0"):
        with pytest.raises(KpError, match="pairs must"):
            mirror_from_pairs(wrong, 5)


def test_the_error_is_counted_in_the_longer_side_of_the_box() -> None:
    truth = FIVE[None]
    assert nme_unit(truth).tolist() == [30]
    found = accuracy(truth + np.array([3, 4]), truth, np.array([[90, 90]]))
    assert found.nme == pytest.approx(5 / 30)
    assert found.regions == {}


def test_a_checkpoint_brings_its_number_of_points(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = KeypointNet(64, points=5).eval()
    config = asdict(TrainConfig(size=64, points=5))
    manifest = Manifest(ModelSpec("five", 64, points=5, scheme="own"), training={"config": config})
    save_checkpoint(tmp_path, net, manifest)
    again, _ = load_checkpoint(tmp_path)
    crops = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        assert again(crops).shape == (2, 5, 2)
    stored = Manifest.read(tmp_path)
    replace(stored, spec=ModelSpec("six", 64, points=6, scheme="own")).write(tmp_path)
    with pytest.raises(BundleError, match=r"ResNet-18 with 12 outputs, the first is fc"):
        load_checkpoint(tmp_path)


def test_results_of_other_points(tmp_path: Path) -> None:
    keypoints = kp_runtime.Keypoints(FIVE[None], np.array([[40.0, 40, 60, 70]]), np.zeros((1, 2, 3)), (90, 90))
    assert len(keypoints.to_json()["faces"][0]["keypoints_xy"]) == 5
    with pytest.raises(InputError, match="this model has 5"):
        mean_of_mirrored(keypoints.xy)
    assert "n_points: 5" in keypoints.to_pts(0)
    with pytest.raises(InputError, match="no region 'eyes'; the regions of 5 points: none"):
        keypoints.region("eyes")
    drawn = kp_runtime.draw_keypoints(np.zeros((90, 90, 3), np.uint8), keypoints.xy)
    assert drawn[40, 40].tolist() == [208, 224, 64]  # of so small a face in the lines' colour, without an edge
    assert not drawn[40, 50].any()  # no line between the eyes
    with pytest.raises(InputError, match=r"\(n, 68, 2\)"):
        kp_runtime.open_effect("sunglasses")(drawn, keypoints.xy)
    face = LabelledFace("a.png", FIVE.astype(np.float64), None, (90, 90))
    faces_to_file([face], tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().startswith("image,point_0_x,point_0_y,point_1_x")
    with pytest.raises(InputError, match="68 points alone, not of 5"):
        faces_to_file([face], tmp_path / "a.json")


def test_a_run_that_began_without_the_settings_goes_on(tmp_path: Path) -> None:
    config = TrainConfig(lr=1e-3)
    old = {key: value for key, value in asdict(config).items() if key not in ("points", "pairs")}
    (tmp_path / "run.json").write_text(json.dumps({"config": old, "sources": []}))
    assert stored_record(tmp_path, [], config)["config"] == old
    with pytest.raises(KpError, match="points 68 -> 5"):
        stored_record(tmp_path, [], replace(config, points=5))


@pytest.mark.parametrize(("command", "module"), [("filter", "faces"), ("run", "video")])
def test_effects_are_for_68_points(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, astronaut: Path, command: str, module: str
) -> None:
    opened = SimpleNamespace(spec=ModelSpec("five", 64, points=5, scheme="own"), check_boxes=lambda: None)
    monkeypatch.setattr(f"kp_cli.{module}.load_model", lambda *_: opened)
    told = "kp: effects hang on the 68 points of a face; this model has 5 of its own\n"
    assert kp(capsys, command, astronaut, "--effect", "hat") == (1, "", told)


def test_coco_is_refused_before_a_photo_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, astronaut: Path, tmp_path: Path
) -> None:
    opened = SimpleNamespace(spec=ModelSpec("five", 64, points=5, scheme="own"))
    monkeypatch.setattr("kp_cli.faces.load_model", lambda *_: opened)
    told = "kp: COCO files are of the 68 points alone, not of 5; write json or csv\n"
    assert kp(capsys, "predict", astronaut, "--format", "coco", "--out", tmp_path / "o") == (1, "", told)
    assert not (tmp_path / "o").exists()


def test_what_the_nme_is_counted_in_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path, KeypointNet(64, points=5), Manifest(ModelSpec("five", 64, points=5, scheme="own")))
    cv2.imwrite(str(tmp_path / "a_0.png"), np.zeros((90, 90), np.uint8))
    (tmp_path / "a_0.pts").write_text(pts_text(FIVE))
    assert kp(capsys, "eval", tmp_path, "--data", tmp_path, "--record", "mine")[0] == 0
    assert Manifest.read(tmp_path).accuracy["mine"]["nme_unit"] == "longer side"


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_whose_boxes_a_detector_gives_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    save_checkpoint(tmp_path, KeypointNet(64, points=5), Manifest(ModelSpec("five", 64, points=5, scheme="own")))
    cv2.imwrite(str(tmp_path / "a_0.png"), np.zeros((90, 90), np.uint8))
    (tmp_path / "a_0.pts").write_text(pts_text(FIVE))
    words = {
        "eval": (tmp_path, "--data", tmp_path, "--boxes", "detector"),
        "predict": (tmp_path, "--model", tmp_path, "--ray", "local", "--out", tmp_path / "o"),
    }
    status, _, told = kp(capsys, command, *words[command], "--detector", "haar")
    assert status == 1
    assert told.startswith("detectors give the tight box of 68 points, this model wants that of its own 5")
