"""From a checkpoint to a bundle: graphs, types, metadata, and nothing lost on failure."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import kp_export.bundle
import kp_runtime
from kp_export.bundle import answer_from_net, export_bundle
from kp_export.evaluate import open_model
from kp_export.onnx_from_checkpoint import check_fits_half, onnx_from_checkpoint
from kp_export.parity import LIMITS, Limit, bundled_faces
from kp_runtime.backend_by_name import GOLDEN_TOLERANCE_PX, open_backend
from kp_runtime.errors import BackendError, BundleError, ExportError, InputError, IntegrityError, ParityError
from kp_runtime.geometry import apply_matrix, crop_plan, invert_matrix, matrices_from_boxes
from kp_runtime.manifest import Manifest, file_entry
from kp_runtime.pipeline import load
from kp_runtime.spec import ModelSpec
from kp_train.checkpoint import CHECKPOINT_NAME, load_checkpoint, save_checkpoint
from kp_train.model import KeypointNet
from tests.tolerances import FP16_PX, FP32_PX

SIZE = 64


def small_checkpoint(folder: Path) -> Path:
    """An untrained network whose head is loud, so that its keypoints depend on the picture."""
    torch.manual_seed(0)
    net = KeypointNet(SIZE)
    torch.nn.init.normal_(net.backbone.fc.weight, std=0.05)
    for _ in range(3):  # batch norm sees some data, as in training
        net.train()(torch.randint(0, 256, (8, 1, SIZE, SIZE), dtype=torch.uint8))
    save_checkpoint(folder, net, Manifest(spec=ModelSpec("small", SIZE)))
    return folder


GRAPHS: dict[tuple[str, str], bytes] = {}


def known_graph(net: KeypointNet, spec: ModelSpec, path: Path, *, precision: str, checkpoint_sha256: str) -> None:
    """In the exporter's place, which takes seconds: of the same weights it is asked once."""
    if (key := (checkpoint_sha256, precision)) not in GRAPHS:
        onnx_from_checkpoint(net, spec, path, precision=precision, checkpoint_sha256=checkpoint_sha256)
        GRAPHS[key] = path.read_bytes()
    path.write_bytes(GRAPHS[key])


@pytest.fixture
def copied(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle to change, whose graphs are not made anew: what is tested is what becomes of the files."""
    monkeypatch.setattr(kp_export.bundle, "onnx_from_checkpoint", known_graph)
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_bundle_holds_what_its_manifest_names(exported: Path) -> None:
    manifest = Manifest.read(exported)
    assert set(manifest.files) == {
        CHECKPOINT_NAME, "model.fp32.onnx", "model.fp16.onnx", "golden.npz", "parity.json",
    }  # fmt: skip
    for name in manifest.files:
        manifest.check_file(exported, name)
    checkpoint = manifest.files[CHECKPOINT_NAME].sha256
    assert manifest.files["model.fp16.onnx"].parent_sha256 == checkpoint
    backend = load(exported, threads=1).backend
    assert backend.check_crops() == 0
    golden, spec = backend.golden, backend.spec
    assert golden is not None
    assert golden.image is not None
    assert golden.box_xyxy is not None
    (matrix,) = matrices_from_boxes(golden.box_xyxy[None], spec.size, spec.margin)
    assert crop_plan(matrix, spec.size, golden.image.shape[:2]).block == 3
    first, last = apply_matrix(invert_matrix(matrix), np.array([[0, 0], [1, 1]]) * (spec.size - 1))
    assert first.max() < -9, "edges are repeated on all sides"
    assert (last - golden.image.shape[1::-1]).min() > 9
    assert [p.name for p in exported.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_contract_and_the_metadata_of_a_graph(exported: Path, precision: str) -> None:
    model = onnx.load(exported / f"model.{precision}.onnx")
    onnx.checker.check_model(model, full_check=True)
    ((opset,), ir) = ([o.version for o in model.opset_import], model.ir_version)
    made = Manifest.read(exported).files[f"model.{precision}.onnx"].made
    assert (made["opset"], made["ir_version"]) == (opset, ir) == (18, 9)
    assert made["kp"] == kp_runtime.__version__, "which release to update to where an older one can't read it"
    (crops,), (keypoints,) = model.graph.input, model.graph.output
    assert crops.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert keypoints.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (crops, keypoints)]
    assert shapes == [["batch", 1, SIZE, SIZE], ["batch", 68, 2]]
    metadata = {p.key: p.value for p in model.metadata_props}
    assert json.loads(metadata["kp.spec"])["size"] == SIZE
    assert metadata["kp.precision"] == precision
    text = str(model.graph.node)
    assert "/" + "usr" not in text
    assert ".py" not in text


def test_fp16_is_typed_and_its_head_is_float32(exported: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(exported / "model.fp16.onnx"))
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    weights = {w.name: w.data_type for w in model.graph.initializer}
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    assert len(convolutions) == 20
    for node in convolutions:
        assert {weights[name] for name in node.input[1:]} == {onnx.TensorProto.FLOAT16}
        assert types[node.output[0]] == onnx.TensorProto.FLOAT16
    (head,) = [n for n in model.graph.node if n.op_type == "Gemm"]
    assert weights[head.input[1]] == onnx.TensorProto.FLOAT
    assert types[head.output[0]] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(("precision", "most"), [("fp32", FP32_PX), ("fp16", FP16_PX)])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_every_file_predicts_what_pytorch_does_on_real_crops(
    exported: Path, precision: str, most: float, batch: int
) -> None:
    net, manifest = load_checkpoint(exported)
    crops = bundled_faces(manifest.spec).crops[-batch:]
    ask = answer_from_net(net)
    wanted = ask(crops).keypoints
    assert float(np.ptp(ask(bundled_faces(manifest.spec).crops).keypoints[:, 0, 0])) > 1, "faces must differ"
    got = open_backend(exported, precision=precision).infer(crops)
    assert np.linalg.norm(got - wanted, axis=-1).max() <= most * SIZE / 224


def test_exporting_twice_gives_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    export_bundle(exported, tmp_path / "again", precisions=("fp32", "fp16"))
    again = contents(tmp_path / "again")
    for name in ("model.fp32.onnx", "model.fp16.onnx", "golden.npz"):
        assert again[name] == (exported / name).read_bytes(), name


def test_an_export_keeps_what_it_does_not_make(copied: Path) -> None:
    (copied / "MODEL_CARD.md").write_text("a card")
    before = contents(copied)
    export_bundle(copied, precisions=("fp32",))
    after = contents(copied)
    assert after["MODEL_CARD.md"] == b"a card"
    assert after["model.fp16.onnx"] == before["model.fp16.onnx"]
    assert "model.fp16.onnx" in Manifest.read(copied).files


def test_too_far_from_pytorch_fails_and_the_old_bundle_stays(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(copied)
    monkeypatch.setitem(LIMITS, "fp32", Limit(rise=0.0, max_px=-1.0))
    with pytest.raises(ParityError, match=r"model.fp32.onnx is too far .* the worst face is (lfw|astronaut)_\d+"):
        export_bundle(copied)
    assert contents(copied) == before
    assert [p.name for p in copied.parent.iterdir()] == ["bundle"]


def test_a_failed_export_into_another_bundle_leaves_that_one(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(copied)
    net, manifest = load_checkpoint(copied)
    with torch.no_grad():
        net.backbone.fc.bias += 1
    save_checkpoint(tmp_path / "other", net, manifest)
    monkeypatch.setitem(LIMITS, "fp32", Limit(rise=0.0, max_px=-1.0))
    with pytest.raises(ParityError):
        export_bundle(tmp_path / "other", copied)
    assert contents(copied) == before


def test_an_export_replaces_no_checkpoint_of_a_run(exported: Path, tmp_path: Path) -> None:
    run = small_checkpoint(tmp_path / "run")
    net, manifest = load_checkpoint(run)
    with torch.no_grad():
        net.backbone.fc.bias += 1
    save_checkpoint(run, net, manifest)
    before = contents(run)
    with pytest.raises(ExportError, match="run holds another checkpoint, which may be the only copy; name another"):
        export_bundle(exported, run)
    assert contents(run) == before


def test_a_damaged_bundle_that_would_be_filled_is_named(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/manifest.json").write_text("{}")
    with pytest.raises(BundleError, match=re.escape(f"{tmp_path / 'old/manifest.json'} has no schema number")):
        export_bundle(small_checkpoint(tmp_path / "run"), tmp_path / "old")


def test_a_read_only_bundle_is_said(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ExportError, match="bundle is read-only; make it writable, or work on a copy"):
        export_bundle(copied)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_the_old_bundle(
    copied: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = contents(copied)

    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(kp_export.bundle, "_write_parity", stop)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ExportError
    with pytest.raises(expected):
        export_bundle(copied)
    assert contents(copied) == before
    assert [p.name for p in copied.parent.iterdir()] == ["bundle"]


def test_an_export_killed_between_its_last_moves_is_mended(copied: Path) -> None:
    before = contents(copied)
    copied.rename(copied.with_name(".bundle.old"))
    export_bundle(copied)
    assert contents(copied)["model.fp16.onnx"] == before["model.fp16.onnx"]
    assert [p.name for p in copied.parent.iterdir()] == ["bundle"]


def test_two_exports_at_once_are_refused(copied: Path) -> None:
    with open(copied.with_name(".bundle.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ExportError, match="another command is at work"):
            export_bundle(copied)


def test_weights_over_float16_are_named(tmp_path: Path) -> None:
    net, manifest = load_checkpoint(small_checkpoint(tmp_path / "run"))
    with torch.no_grad():
        net.backbone.layer2[0].conv1.weight[0, 0, 0, 0] = 1e6
        net.backbone.layer2[0].bn1.weight[0] = 10
    save_checkpoint(tmp_path / "loud", net, manifest, half=False)
    with pytest.raises(ExportError, match=r"float16 ends at 65504: .*weights of layer2\.0\.conv1\.weight reach"):
        export_bundle(tmp_path / "loud", precisions=("fp16",))


def test_activations_over_float16_are_named(tmp_path: Path) -> None:
    net, manifest = load_checkpoint(small_checkpoint(tmp_path / "run"))
    with torch.no_grad():
        net.backbone.layer3[1].bn1.bias[7] = 1e5
    crops = bundled_faces(manifest.spec).crops[:2]
    with pytest.raises(ExportError, match=r"activations of layer3\.1\.conv1 reach 1000\d\d"):
        check_fits_half(net, crops)
    net.backbone.layer3[1].bn1.bias.data[7] = 1e3
    check_fits_half(net, crops)


def test_the_layers_types_are_counted(exported: Path) -> None:
    files = Manifest.read(exported).files
    assert files["model.fp32.onnx"].made["layers"] == {"fp32": 21}
    assert files["model.fp16.onnx"].made["layers"] == {"fp16": 20, "fp32": 1}


@pytest.mark.slow
def test_a_killed_export_leaves_the_old_bundle(copied: Path) -> None:
    before = contents(copied)
    command = [sys.executable, "-m", "kp_cli", "export", str(copied), "--fp16", "--engine", "never"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("ONNX fp16"):
            break
    process.kill()
    process.communicate()
    assert contents(copied) == before
    export_bundle(copied)
    assert [p.name for p in copied.parent.iterdir()] == ["bundle"]


def test_a_reducing_network_is_exported_in_every_type(tmp_path: Path) -> None:
    net, manifest = load_checkpoint(small_checkpoint(tmp_path / "run"))
    net.reduce = 2
    save_checkpoint(tmp_path / "r", net, dataclasses.replace(manifest, training={"config": {"reduce": 2}}))
    export_bundle(tmp_path / "r", precisions=("fp32", "fp16"))  # its parity is checked inside
    assert "AveragePool" in {node.op_type for node in onnx.load(tmp_path / "r" / "model.fp16.onnx").graph.node}


def test_an_export_elsewhere_brings_along_what_the_bundle_has_of_the_same_weights(copied: Path, tmp_path: Path) -> None:
    made = Manifest.read(copied)
    other = export_bundle(copied, tmp_path / "other").manifest
    assert set(other.files) == set(made.files) >= {"model.fp16.onnx", "model.fp32.onnx"}
    assert other.files["model.fp16.onnx"] == made.files["model.fp16.onnx"]
    rows = json.loads((tmp_path / "other" / "parity.json").read_text())
    assert {row["file"] for row in rows} == {"model.fp16.onnx", "model.fp32.onnx"}
    for name in other.files:
        other.check_file(tmp_path / "other", name)


def test_a_parity_report_that_says_nothing_is_none(tmp_path: Path) -> None:
    """It is the manifest's, and yet nested without end, no list, or of no file."""
    report, manifest = tmp_path / "parity.json", Manifest(ModelSpec("x", SIZE))
    assert kp_export.bundle._known_of(tmp_path, manifest) == {}
    for text in ("[" * 100_000, "3", '[3, {}, {"file": []}, {"file": "other"}]'):
        report.write_text(text)
        manifest.files["parity.json"] = file_entry(report, "report")
        assert kp_export.bundle._known_of(tmp_path, manifest) == {}


@pytest.mark.parametrize("damage", ["altered", "cut off", "gone"])
def test_a_parity_report_that_is_not_the_manifests_is_not_kept(copied: Path, damage: str) -> None:
    """Its numbers of a kept file would get a new hash and count as proven."""
    report = copied / "parity.json"
    text = report.read_text()
    if damage == "gone":
        report.unlink()
    else:
        report.write_text(text.replace('"rise": null', '"rise": -1.0') if damage == "altered" else text[:-20])
    before = contents(copied)
    with pytest.raises(IntegrityError, match=re.escape(str(report)) + ".*; it is read for the files that this export"):
        export_bundle(copied)
    assert contents(copied) == before
    export_bundle(copied, precisions=("fp32", "fp16"))
    assert {row["file"] for row in json.loads(report.read_text())} == {"model.fp16.onnx", "model.fp32.onnx"}


def test_an_export_into_a_bundle_that_has_more_keeps_what_is_known_of_it(copied: Path, tmp_path: Path) -> None:
    source = small_checkpoint(tmp_path / "run")
    export_bundle(source)
    before = {row["file"]: row for row in json.loads((copied / "parity.json").read_text())}
    manifest = export_bundle(source, copied).manifest
    assert "model.fp16.onnx" in manifest.files
    after = {row["file"]: row for row in json.loads((copied / "parity.json").read_text())}
    assert after["model.fp16.onnx"] == before["model.fp16.onnx"]
    assert set(after) == {"model.fp16.onnx", "model.fp32.onnx"}


def test_an_export_keeps_what_was_measured_of_the_same_weights(copied: Path, tmp_path: Path) -> None:
    source = small_checkpoint(tmp_path / "run")
    there = Manifest.read(copied)
    of_file = {"nme": 0.04, "precision": "fp32", "sha256": there.files["model.fp32.onnx"].sha256}
    accuracy = {"weights": {"nme": 0.03}, "fp32": of_file, "another int8": of_file | {"sha256": "0" * 64}}
    dataclasses.replace(there, accuracy=accuracy).write(copied)
    assert export_bundle(source, copied).manifest.accuracy == {"weights": {"nme": 0.03}, "fp32": of_file}
    net, manifest = load_checkpoint(source)
    with torch.no_grad():
        net.backbone.fc.bias += 1
    save_checkpoint(source, net, manifest)
    assert export_bundle(source, copied).manifest.accuracy == {}


def test_files_of_other_weights_go(copied: Path) -> None:
    """Programs that take a file by its name would run the old weights."""
    plan = copied / "model.fp16.sm87.trt10.3.0.plan"
    plan.write_bytes(b"of the weights before")
    (copied / "model.mine.onnx").write_bytes(b"a user's own")
    net, manifest = load_checkpoint(copied)
    with torch.no_grad():
        net.backbone.fc.bias += 1
    save_checkpoint(copied, net, dataclasses.replace(manifest, files={}))
    (copied / "extra.onnx").write_bytes(b"of other weights, and in the manifest")
    new = Manifest.read(copied)
    entry = file_entry(copied / "extra.onnx", "onnx", precision="fp32", parent_sha256="0" * 64)
    dataclasses.replace(new, files=new.files | {"extra.onnx": entry}).write(copied)
    export_bundle(copied)
    assert not (copied / "extra.onnx").exists()
    assert not plan.exists()
    assert not (copied / "model.fp16.onnx").exists()
    assert (copied / "model.mine.onnx").exists()


@pytest.mark.parametrize(
    ("precision", "what"),
    [
        ("fp32", "is within its limits on faces, but puts a golden keypoint [^;]*"),  # and no machine is to blame
        ("fp16", "would be kept, as its switch was not given, and yet could not be opened: .* golden keypoint .*"),
    ],
)
def test_a_file_that_misses_the_golden_crop_is_no_export(
    copied: Path, precision: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(copied)
    monkeypatch.setitem(GOLDEN_TOLERANCE_PX, precision, -1.0)
    with pytest.raises(ParityError, match=rf"^model\.{precision}\.onnx {what}; nothing was"):
        export_bundle(copied)
    assert contents(copied) == before


def test_a_file_that_no_program_could_open_is_no_export(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BackendError("refused")

    before = contents(copied)
    monkeypatch.setattr(kp_export.bundle, "load", refused)
    told = r"model\.fp32\.onnx is within its limits, and yet could not be opened: refused; nothing was replaced"
    with pytest.raises(ParityError, match=told):
        export_bundle(copied)
    assert contents(copied) == before


def test_a_precision_that_is_not_there(copied: Path) -> None:
    with pytest.raises(ExportError, match="no precision 'bf16'; choose from fp32, fp16, int8, int8-trt"):
        export_bundle(copied, precisions=("bf16",))


def test_a_graph_that_a_parser_would_refuse_is_no_export(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> None:
        raise ExportError(f"TensorRT's ONNX parser would refuse {path.name}")

    before = contents(copied)
    monkeypatch.setattr("kp_export.bundle.check_operators", refused)
    with pytest.raises(ExportError, match=r"would refuse model\.fp32\.onnx"):
        export_bundle(copied)
    assert contents(copied) == before


def test_a_checkpoint_is_measured_on_as_many_threads_as_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for path in (small_checkpoint(tmp_path), tmp_path / CHECKPOINT_NAME):
        assert open_model(path, 1).name == f"small {CHECKPOINT_NAME} (PyTorch)"
        open_model(path)
    assert asked == [1, 1]
    with pytest.raises(InputError, match="threads must be 1 to"):
        open_model(tmp_path, 0)
