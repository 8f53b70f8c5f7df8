"""The committed default model: parity on real crops, a real portrait, and real test rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kp_export.bundle import export_bundle
from kp_export.evaluate import evaluate, open_model
from kp_runtime import HaarDetector, image_from_file, load
from kp_runtime.manifest import Manifest
from kp_train.data import read_source
from tests.tolerances import FP16_PX, FP32_PX

ENGINES = Path(__file__).resolve().parents[1] / "engines"
DEFAULT = ENGINES / "resnet18-68"

# read off the picture by eye, enlarged, within about 2 px: outer eye corners, tip of the nose, mouth corners, chin
PORTRAIT = {36: (193, 100), 45: (258, 104), 30: (224, 127), 48: (202, 139), 54: (244, 140), 8: (223, 177)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("default") / "resnet18-68"
    report = export_bundle(DEFAULT, bundle, precisions=("fp32", "fp16"))
    most = {"fp32": FP32_PX, "fp16": FP16_PX}
    for measured in report.parity:
        assert measured.faces == 128
        assert measured.max_px <= most[measured.precision], measured
        assert measured.score is not None
        assert measured.score <= 1e-3, measured
    return bundle


@pytest.mark.skipif(not (ENGINES.parent / ".git").exists(), reason="this is no checkout")
def test_a_checkout_on_windows_changes_no_line_end(tmp_path: Path) -> None:
    """There core.autocrlf is true as a rule, and the files' hashes would hold no longer."""
    names = ["engines/resnet18-68/parity.json", "scripts/check"]
    git = ["git", "-C", str(ENGINES.parent), "-c", "core.autocrlf=true"]
    subprocess.run([*git, "checkout-index", f"--prefix={tmp_path}/", "--", *names], check=True)
    assert [name for name in names if b"\r" in (tmp_path / name).read_bytes()] == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_real_portrait(exported: Path, astronaut: Path, precision: str) -> None:
    image = image_from_file(astronaut)
    boxes = HaarDetector()(image)
    assert len(boxes) == 1
    xy = load(exported, precision=precision)(image, boxes).xy[0]
    for point, place in PORTRAIT.items():
        assert np.linalg.norm(xy[point] - place) < 6, f"point {point} at {xy[point]}, seen at {place}"


@pytest.mark.slow
def test_many_boxes_are_each_as_alone(exported: Path, astronaut: Path) -> None:
    image, model = image_from_file(astronaut), load(exported)
    boxes = np.array([180.0, 90, 262, 182]) + np.random.default_rng(0).uniform(-4, 4, (5, 4))
    together = model(image, boxes).xy
    alone = np.concatenate([model(image, box[None]).xy for box in boxes])
    assert np.abs(together - alone).max() < FP32_PX


MODELS = sorted(path.parent for path in ENGINES.glob("resnet18-68*/manifest.json"))
each_model = pytest.mark.parametrize("bundle", MODELS, ids=[bundle.name for bundle in MODELS])


@each_model
def test_a_portrait_has_a_face_and_other_pictures_have_none(bundle: Path, astronaut: Path) -> None:
    """By its int8 file: in the face's box and ones that are off by a tenth, then in those of anything else."""
    model, image = load(bundle, "ort-cpu"), image_from_file(astronaut)
    limit, box = model.spec.lost_limit, np.array([180.0, 90, 262, 182])
    assert limit is not None
    near = box + 8 * np.array([[0, 0, 0, 0], [1, 1, 1, 1], [-1, 0, -1, 0], [1, 1, -1, -1], [-1, -1, 1, 1]])
    other = box + np.array(
        [[-150, 0, -150, 0], [150, 20, 150, 20], [0, 200, 0, 200], [60, 0, 60, 0], [-90, 260, 90, 330]]
    )
    noise = np.random.default_rng(0).integers(0, 256, image.shape, np.uint8)
    lost = [(image, other), *((picture, box[None]) for picture in (noise, np.full_like(image, 90), image[::-1].copy()))]
    for picture, boxes, is_face in [(image, near, True), *((picture, boxes, False) for picture, boxes in lost)]:
        score = model(picture, boxes).lost_score
        assert score is not None
        assert ((score < limit) == is_face).all(), score


@each_model
def test_the_manifest_holds_and_tells_where_it_is_from(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    for name in manifest.files:
        manifest.check_file(bundle, name)
    assert {"checkpoint.safetensors", "model.int8.onnx", "golden.npz", "parity.json"} <= set(manifest.files)
    assert manifest.spec.name == bundle.name
    assert {"code", "weights", "data"} <= set(manifest.licence)
    for name in ("manifest.json", "parity.json"):  # photos' names are people's
        assert ".jpg" not in (bundle / name).read_text(encoding="utf-8")
    assert all(source["sha256"] for source in manifest.training["sources"])
    assert manifest.accuracy


@each_model
def test_the_golden_crop_is_cut_here_as_where_it_was_made(bundle: Path) -> None:
    assert load(bundle, "ort-cpu", threads=1).backend.check_crops() == 0


def test_the_models_are_of_the_sizes_that_they_say() -> None:
    sizes = {bundle.name: Manifest.read(bundle).spec.size for bundle in MODELS}
    assert sizes == {"resnet18-68": 224, "resnet18-68-lite": 112}


@each_model
def test_a_checkout_predicts_without_torch(bundle: Path, astronaut: Path) -> None:
    """The int8 file lies in the checkout: numpy, OpenCV and onnxruntime are enough."""
    code = (
        "import sys, json; sys.modules['torch'] = None; sys.modules['onnx'] = None; import kp_runtime as kp\n"
        "image = kp.image_from_file(sys.argv[2]); model = kp.load(sys.argv[1])\n"
        "assert model.backend.report.precision == 'int8'\n"
        "print(json.dumps(model(image, kp.HaarDetector()(image)).xy[0].tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle), str(astronaut)], capture_output=True, text=True, check=True
    )
    xy = np.array(json.loads(done.stdout))
    for point, place in PORTRAIT.items():
        assert np.linalg.norm(xy[point] - place) < 6, f"point {point} at {xy[point]}, seen at {place}"


@pytest.mark.slow
@each_model
def test_the_recorded_accuracy_is_reproduced(bundle: Path, shared_data: Path) -> None:
    rows = read_source(shared_data / "youtube_faces_68" / "test_frames_keypoints.csv")
    recorded = Manifest.read(bundle).accuracy["youtube_faces_68 test rows, boxes from keypoints"]
    measured = evaluate(open_model(bundle), rows.faces).accuracy
    assert measured.faces == 385
    assert measured.nme < 0.046
    assert measured.nme == pytest.approx(recorded["nme"], abs=2e-5)
    assert measured.smooth_l1 == pytest.approx(recorded["smooth_l1"], rel=1e-2)
    int8 = evaluate(open_model(bundle / "model.int8.onnx"), rows.faces).accuracy
    assert int8.nme - measured.nme < 0.001
