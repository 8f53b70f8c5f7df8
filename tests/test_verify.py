"""`kp verify`: files of a bundle against PyTorch, what counts as passed, and the page."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from kp_export.parity import FaceSet, bundled_faces, faces_from_sources
from kp_export.verify import FileVerdict, Verification, check_verification, verification_json, verify_bundle
from kp_export.verify_page import verification_page
from kp_runtime.backend import Backend
from kp_runtime.backend_by_name import open_backend
from kp_runtime.errors import BundleError, DataError, IntegrityError, MissingExtraError, ParityError
from kp_runtime.geometry import apply_matrix, boxes_from_points, crop_from_luma, frame_box, matrices_from_boxes
from kp_runtime.manifest import FileEntry, Manifest, file_entry
from kp_runtime.spec import ModelSpec
from kp_train.data import luma_of_face, read_source
from kp_train.synthetic import write_csv_source
from tests.test_export import SIZE, small_checkpoint

FP32, FP16, PLAN = "model.fp32.onnx", "model.fp16.onnx", "model.fp16.sm_87.plan"
ROOT = Path(__file__).parents[1]
NASTY = 'photos/<img src=x onerror=alert(1)>&"face"\''


class Tags(HTMLParser):
    """Every tag of a page with its attributes, as a browser reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("name", ["resnet18-68", "resnet18-68-lite"])
def test_the_shipped_models_pass_on_the_faces_that_come_with_it(name: str) -> None:
    bundle = Path(__file__).parents[1] / "engines" / name
    verified = verify_bundle(bundle, bundled_faces(Manifest.read(bundle).spec))
    check_verification(verified)
    (file,) = verified.files
    assert file.parity is not None
    assert file.parity.faces == 28  # int8 is not judged by faces of 25 px
    assert file.parity.worst_face.startswith("astronaut_")


@pytest.mark.parametrize(
    ("files", "passed"),
    [
        ([("onnx", "passed"), ("plan", "not run")], True),
        ([("onnx", "passed"), ("plan", "failed")], False),
        ([("onnx", "not run"), ("plan", "passed")], False),
        ([("plan", "passed")], True),
        ([("plan", "not run")], False),
    ],
)
def test_what_counts_as_passed(files: list[tuple[str, str]], passed: bool) -> None:
    """ONNX files run on every machine; of plans, what was run counts."""
    entry = FileEntry("0" * 64, 1, "onnx", "fp16")
    verdicts = tuple(
        FileVerdict(f"{i}", dataclasses.replace(entry, kind=kind), verdict, "far off", kind == "onnx")  # type: ignore[arg-type]
        for i, (kind, verdict) in enumerate(files)
    )
    faces = FaceSet((), np.empty((0, 1, SIZE, SIZE), np.uint8), "")
    result = Verification(Path("x"), ModelSpec("x", SIZE), "", faces, np.empty((0, 68, 2), np.float32), verdicts)
    assert result.passed == passed
    if ("plan", "failed") in files:
        with pytest.raises(ParityError, match=r"^far off; what to do: docs/parity\.md$"):
            check_verification(result)


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def faces(exported: Path) -> FaceSet:
    """Two batches' worth of faces whose names would break a page."""
    found = bundled_faces(Manifest.read(exported).spec)
    names = tuple(f"{NASTY} {i}" for i in range(40))
    return FaceSet(names, found.crops[-40:], "<a source> & another\x1b\udcff")


def replace(bundle: Path, name: str, **fields: object) -> None:
    """Puts the file, as it now lies there, into the manifest."""
    manifest = Manifest.read(bundle)
    known = manifest.files.get(name)
    kept = {} if known is None else {"kind": known.kind, "precision": known.precision, "made": known.made}
    entry = file_entry(bundle / name, **{**kept, **fields})  # type: ignore[arg-type]
    dataclasses.replace(manifest, files={**manifest.files, name: entry}).write(bundle)


def damage(bundle: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes the weights of a graph's last matrix, hashes and all."""
    model = onnx.load(bundle / name)
    (head,) = [node for node in model.graph.node if node.op_type == "Gemm"]
    (weights,) = [w for w in model.graph.initializer if w.name == head.input[1]]
    weights.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weights)), weights.name))
    (bundle / name).write_bytes(model.SerializeToString())
    replace(bundle, name)


def test_all_files_pass(exported: Path, faces: FaceSet) -> None:
    batches = []

    def bar(items: object) -> object:
        batches.append(len(items))  # type: ignore[arg-type]
        return items

    result = verify_bundle(exported, faces, bar=bar)  # type: ignore[arg-type]
    assert result.passed
    check_verification(result)
    assert batches == [2, 2, 2]  # PyTorch and two files, 40 faces
    assert [(f.file, f.verdict, f.reason) for f in result.files] == [(FP32, "passed", ""), (FP16, "passed", "")]
    for file in result.files:
        assert file.parity is not None
        assert file.keypoints is not None
        distance = np.linalg.norm(file.keypoints.astype(np.float64) - result.reference, axis=-1)
        assert file.parity.max_px == pytest.approx(distance.max())
        assert file.parity.worst_face == faces.names[int(distance.max(axis=1).argmax())]


def test_a_damaged_file_fails_with_its_name_and_worst_face(copied: Path, faces: FaceSet, tmp_path: Path) -> None:
    damage(copied, FP32, lambda weights: weights * np.float32(1.2))
    result = verify_bundle(copied, faces)
    bad, good = result.files
    assert (bad.verdict, good.verdict, result.passed) == ("failed", "passed", False)
    assert bad.parity is not None
    assert bad.parity.worst_face in bad.reason
    with pytest.raises(ParityError, match=r"^model.fp32.onnx is too far from PyTorch: worst point .* photos/") as error:
        check_verification(result)
    assert "\n" not in str(error.value)
    assert FP16 not in str(error.value)
    page = verification_page(result, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<span class=failed>failed</span>" in page


def test_a_file_that_answers_nan_fails_and_stays_json(copied: Path, faces: FaceSet, tmp_path: Path) -> None:
    damage(copied, FP32, lambda weights: weights * np.float32("nan"))
    result = verify_bundle(copied, faces, files=[FP32])
    assert result.files[0].verdict == "failed"
    (file,) = verification_json(result)["files"]
    assert file["parity"]["max_px"] is None
    json.dumps(verification_json(result), allow_nan=False)
    verification_page(result, tmp_path / "page.html")


def test_only_the_files_that_were_asked_for(copied: Path, faces: FaceSet) -> None:
    damage(copied, FP32, lambda weights: weights * 2)
    result = verify_bundle(copied, faces, files=[FP16, FP16])
    assert [file.file for file in result.files] == [FP16]
    assert result.passed


@pytest.mark.parametrize("name", ["model.int8.onnx", "golden.npz", "../model.fp32.onnx"])
def test_an_unknown_file_lists_what_there_is(exported: Path, faces: FaceSet, name: str) -> None:
    with pytest.raises(BundleError, match=rf"no model file {re.escape(name)}; it has: {FP32}, {FP16}"):
        verify_bundle(exported, faces, files=[name])


def test_a_bundle_without_models_says_how_to_make_them(tmp_path: Path, faces: FaceSet) -> None:
    with pytest.raises(BundleError, match=r"holds no model file; make them with: kp export '.*/a bundle'$"):
        verify_bundle(small_checkpoint(tmp_path / "a bundle"), faces)


def test_a_file_of_another_hash_is_refused(copied: Path, faces: FaceSet) -> None:
    content = bytearray((copied / FP16).read_bytes())
    content[-1] ^= 1
    (copied / FP16).write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model\.fp16\.onnx has sha256"):
        verify_bundle(copied, faces)
    assert verify_bundle(copied, faces, files=[FP32]).passed


def test_a_plan_that_can_not_run_here_never_passes(
    copied: Path, faces: FaceSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kp_runtime.backend_by_name.has_driver", lambda: False)
    (copied / PLAN).write_bytes(b"a plan")
    replace(copied, PLAN, kind="plan", precision="fp16")
    everything = verify_bundle(copied, faces)
    plan = everything.files[-1]
    assert (plan.file, plan.verdict, plan.parity) == (PLAN, "not run", None)
    assert plan.reason.startswith("not run: this machine has no NVIDIA driver")
    assert everything.passed  # the ONNX files are what could be compared
    alone = verify_bundle(copied, faces, files=[PLAN])
    assert not alone.passed
    with pytest.raises(ParityError, match=r"\.plan was not run: this machine has no NVIDIA driver"):
        check_verification(alone)
    manifest = Manifest.read(copied)
    files = {name: entry for name, entry in manifest.files.items() if entry.kind != "onnx"}
    dataclasses.replace(manifest, files=files).write(copied)
    with pytest.raises(ParityError, match=r"no file of .* could be compared on this machine"):
        check_verification(verify_bundle(copied, faces))


def test_an_onnx_file_needs_onnxruntime_and_a_plan_may_go_without_tensorrt(
    copied: Path, faces: FaceSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(path: Path, name: str, **_: object) -> Backend:
        raise MissingExtraError(name, "ort", "running models")

    monkeypatch.setattr("kp_export.verify.open_backend", absent)
    (copied / PLAN).write_bytes(b"a plan")
    replace(copied, PLAN, kind="plan", precision="fp16")
    (plan,) = verify_bundle(copied, faces, files=[PLAN]).files
    assert plan.verdict == "not run"
    with pytest.raises(MissingExtraError, match="ort-cpu"):
        verify_bundle(copied, faces)


@pytest.mark.parametrize(("precision", "limits"), [("fp16", "fp16"), ("int8", "int8-trt")])
def test_a_plan_that_runs_is_held_to_its_limits(
    copied: Path, faces: FaceSet, monkeypatch: pytest.MonkeyPatch, precision: str, limits: str
) -> None:
    """ONNX Runtime stands for the plan's engine: what is tested is which engine is asked for, and the verdict."""
    opened = []

    def engine(path: Path, name: str, *, golden: bool) -> Backend:
        opened.append((path.name, name, golden))
        return open_backend(copied / FP32, "ort-cpu", golden=golden)

    monkeypatch.setattr("kp_export.verify.open_backend", engine)
    (copied / PLAN).write_bytes(b"a plan")
    replace(copied, PLAN, kind="plan", precision=precision)
    good = verify_bundle(copied, faces, files=[PLAN])
    assert opened == [(PLAN, "tensorrt", False)]
    assert good.passed
    assert good.files[0].parity is not None
    assert good.files[0].parity.precision == limits
    damage(copied, FP32, lambda weights: weights * np.float32(1.5))
    assert verify_bundle(copied, faces, files=[PLAN]).files[0].verdict == "failed"


def test_an_onnx_file_that_can_not_be_run_is_no_pass(copied: Path, faces: FaceSet) -> None:
    (copied / FP32).write_bytes(b"no graph")
    replace(copied, FP32)
    replace(copied, FP16, precision=None)
    result = verify_bundle(copied, faces)
    assert [file.verdict for file in result.files] == ["not run", "not run"]
    with pytest.raises(ParityError, match=r"fp32.onnx was not run: ONNX Runtime .*; model.fp16.onnx was not run: no l"):
        check_verification(result)


def test_faces_must_be_of_the_bundles_size(exported: Path, faces: FaceSet) -> None:
    for crops in (faces.crops[:0], faces.crops[..., 1:]):
        with pytest.raises(DataError, match=f"at least one crop of 1x{SIZE}x{SIZE}"):
            verify_bundle(exported, dataclasses.replace(faces, crops=crops))


def test_labels_give_the_rise(exported: Path, tmp_path: Path) -> None:
    source = read_source(write_csv_source(tmp_path, people=3))
    result = verify_bundle(exported, faces_from_sources([source], ModelSpec("small", SIZE)), files=[FP32])
    assert result.passed
    assert result.files[0].parity is not None
    assert result.files[0].parity.rise is not None
    assert "no labels" not in verification_page(result, tmp_path / "page.html").read_text(encoding="utf-8")


def test_of_many_faces_a_few_are_compared_from_the_first_to_the_last(tmp_path: Path) -> None:
    source = read_source(write_csv_source(tmp_path, people=3))
    found = faces_from_sources([source], ModelSpec("x", SIZE), most=2)
    assert [Path(name).name for name in found.names] == [source.faces[i].image.name for i in (0, -1)]


@pytest.mark.parametrize(("box", "margin"), [("frame", 1.0), ("keypoints", 1.3)])
def test_a_model_is_compared_on_the_crops_that_it_is_given_in_use(tmp_path: Path, box: str, margin: float) -> None:
    source = read_source(write_csv_source(tmp_path, people=1))
    found = faces_from_sources([source], ModelSpec("x", SIZE, margin=margin, box=box))
    assert found.xy_crop is not None
    for face, crop, xy in zip(source.faces, found.crops, found.xy_crop, strict=True):
        luma = luma_of_face(face)
        seen = frame_box((luma.shape[0], luma.shape[1])) if box == "frame" else boxes_from_points(face.xy)
        matrix = matrices_from_boxes(seen[None], SIZE, margin)[0]
        np.testing.assert_array_equal(crop[0], crop_from_luma(luma, matrix, SIZE))
        np.testing.assert_allclose(xy, apply_matrix(matrix, face.xy))


def test_beside_a_face_is_a_square_as_large_that_does_not_reach_it(tmp_path: Path) -> None:
    source = read_source(write_csv_source(tmp_path, people=2))
    assert faces_from_sources([source], ModelSpec("x", SIZE)).beside is None
    found = faces_from_sources([source], ModelSpec("x", SIZE, lost_limit=0.5)).beside
    assert found is not None
    for face, crop in zip(source.faces, found, strict=True):
        luma, box = luma_of_face(face), boxes_from_points(face.xy)
        room = {(-1.0, 0.0): box[0], (0.0, -1.0): box[1]}
        room |= {(1.0, 0.0): luma.shape[1] - box[2], (0.0, 1.0): luma.shape[0] - box[3]}
        matrix = matrices_from_boxes(box[None], SIZE, 1.3, shift=max(room, key=lambda way: room[way]))[0]
        np.testing.assert_array_equal(crop[0], crop_from_luma(luma, matrix, SIZE))


def test_a_file_that_takes_no_face_for_one_fails(tmp_path: Path) -> None:
    """Its scores of faces are right, and all others near them."""
    bundle = Path(shutil.copytree(ROOT / "engines" / "resnet18-68-lite", tmp_path / "lite"))
    found = bundled_faces(Manifest.read(bundle).spec)
    assert found.beside is not None
    few = FaceSet(found.names[-3:], found.crops[-3:], found.origin, None, 0, found.beside[:3], 0.5)
    right = verify_bundle(bundle, few)
    assert right.passed
    assert right.reference.shape == right.files[0].keypoints.shape == (3, 68, 2)  # type: ignore[union-attr]
    model = onnx.load(bundle / "model.int8.onnx")
    (head,) = [node for node in model.graph.node if node.op_type == "Gemm" and node.output[0] == "lost_score"]
    for weights in model.graph.initializer:
        if weights.name in head.input[1:]:
            less = numpy_helper.to_array(weights) * 0.2 + 0.12 * (weights.name == head.input[2])
            weights.CopyFrom(numpy_helper.from_array(less.astype(np.float32), weights.name))
    (bundle / "model.int8.onnx").write_bytes(model.SerializeToString())
    replace(bundle, "model.int8.onnx")
    assert verify_bundle(bundle, dataclasses.replace(few, beside=None)).passed
    with pytest.raises(ParityError, match=r"too far from PyTorch: lost score 0\.[67]\d* away"):
        check_verification(verify_bundle(bundle, few))


def test_the_page_stands_alone(copied: Path, faces: FaceSet, tmp_path: Path) -> None:
    (copied / PLAN).write_bytes(b"a plan")
    replace(copied, PLAN, kind="plan", precision="fp16")
    manifest = Manifest.read(copied)
    dataclasses.replace(manifest, spec=dataclasses.replace(manifest.spec, name="<script>x</script>")).write(copied)
    result = verify_bundle(copied, faces)
    path = verification_page(result, tmp_path / "out" / "verify.html")
    assert [p.name for p in path.parent.iterdir()] == ["verify.html"]
    page = path.read_text(encoding="utf-8")
    for nasty in ("<script", "<img src=x", "<a source>"):
        assert nasty not in page
    assert "<br>photos/&lt;img src=x onerror=alert(1)&gt;&amp;&quot;face&quot;&#x27;" in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert "&lt;a source&gt; &amp; another\ufffd\ufffd" in page
    for file in result.files:
        assert file.file in page
        assert file.entry.sha256 in page
    assert result.checkpoint_sha256 in page
    assert not re.search(r"https?://|url\(|@import", page)
    tags = Tags()
    tags.feed(page)
    assert {"script", "link", "iframe", "object", "form", "a"}.isdisjoint(tag for tag, _ in tags.found)
    assert {key for _, attributes in tags.found for key in attributes}.isdisjoint(
        {"href", "srcset", "style", "onerror"}
    )
    images = [attributes["src"] or "" for tag, attributes in tags.found if "src" in attributes]
    assert len(images) == sum(tag == "img" for tag, _ in tags.found) == 24  # 12 of each ONNX file, none of the plan
    told = {attributes["alt"] for tag, attributes in tags.found if tag == "img"}
    assert len(told) == 24
    assert "title" not in {key for _, attributes in tags.found for key in attributes}  # which a finger does not show
    assert {attributes.get("scope") for tag, attributes in tags.found if tag == "th"} == {"col", "row"}
    for image in images:
        assert image.startswith("data:image/jpeg;base64,")
    encoded = np.frombuffer(base64.b64decode(images[0].partition(",")[2]), np.uint8)
    blue, green, red = cv2.imdecode(encoded, cv2.IMREAD_COLOR).astype(int).transpose(2, 0, 1)
    assert ((green - red > 60) & (green - blue > 60)).sum() > 68
    assert ((red - green > 60) & (red - blue > 60)).sum() > 68


def test_a_verification_is_json(exported: Path, faces: FaceSet) -> None:
    result = verify_bundle(exported, faces, files=[FP16])
    read = json.loads(json.dumps(verification_json(result), allow_nan=False))
    assert read["passed"] is True
    assert read["faces"] == 40
    (file,) = read["files"]
    assert (file["file"], file["verdict"], file["precision"]) == (FP16, "passed", "fp16")
    assert file["parity"]["rise"] is None
    assert file["parity"]["max_px"] > 0
    assert file["sha256"] == Manifest.read(exported).files[FP16].sha256
