"""INT8 graphs for both engines: placement and types of Q/DQ nodes, the gate, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

import kp_export.int8_from_onnx as module
from kp_export.bundle import export_bundle
from kp_export.int8_from_onnx import CHOICES, check_calibration
from kp_export.operators import operator_problems
from kp_export.parity import LIMITS, FaceSet, Limit, Parity, check_parity, faces_from_sources
from kp_runtime.backend import Answer
from kp_runtime.backend_by_name import open_backend
from kp_runtime.errors import DataError, ExportError, ParityError
from kp_runtime.manifest import Manifest
from kp_runtime.spec import ModelSpec
from kp_train.checkpoint import save_checkpoint
from kp_train.data import Source, is_held_out, read_source
from kp_train.dataset import FaceDataset
from kp_train.model import KeypointNet
from kp_train.run_record import sha256_of_names
from kp_train.synthetic import write_csv_source
from tests.test_export import known_graph

SIZE = 64
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def known_graphs() -> Iterator[None]:
    """The fp32 graph, which all of int8 begin at, is made once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kp_export.bundle.onnx_from_checkpoint", known_graph)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return read_source(write_csv_source(tmp_path_factory.mktemp("faces"), people=80, turn_deg=4))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, source: Source) -> Path:
    """A network near the mean face, moved a little by what it sees."""
    torch.manual_seed(0)
    net, spec = KeypointNet(SIZE), ModelSpec("small", SIZE)
    crops, xy = (torch.stack(part) for part in zip(*FaceDataset(source.faces, spec), strict=True))
    net.start_from_mean(xy.mean(dim=0))
    for _ in range(3):
        net.train()(crops[:32])
    folder = tmp_path_factory.mktemp("int8") / "run"
    save_checkpoint(folder, net, Manifest(spec=spec))
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path, source: Source) -> Path:
    bundle = checkpoint.parent / "bundle"
    export_bundle(checkpoint, bundle, precisions=("int8", "int8-trt"), calibration=[source])
    return bundle


def graph(bundle: Path, precision: str) -> onnx.ModelProto:
    return onnx.load(bundle / f"model.{precision}.onnx")


def zero_points(model: onnx.ModelProto, operator: str) -> list[np.ndarray]:
    constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    return [constants[n.input[2]] for n in model.graph.node if n.op_type == operator]


def test_the_cpu_graph_has_uint8_activations_and_7_bit_weights_a_channel(exported: Path) -> None:
    model = graph(exported, "int8")
    assert {str(z.dtype) for z in zero_points(model, "QuantizeLinear")} == {"uint8"}
    weights = [c for c in model.graph.initializer if c.data_type == TensorProto.INT8 and len(c.dims) == 4]
    assert len(weights) == 20
    assert max(int(np.abs(numpy_helper.to_array(w).astype(int)).max()) for w in weights) <= 64
    scales = {c.name: tuple(c.dims) for c in model.graph.initializer}
    per_channel = [
        n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in {w.name for w in weights}
    ]
    assert all(len(scales[n.input[1]]) == 1 and scales[n.input[1]][0] > 1 for n in per_channel)


def test_the_tensorrt_graph_is_symmetric_and_fuses_its_sums(exported: Path) -> None:
    model = graph(exported, "int8-trt")
    assert operator_problems(exported / "model.int8-trt.onnx") == ()
    for operator in ("QuantizeLinear", "DequantizeLinear"):
        assert all(z.dtype == np.int8 and not z.any() for z in zero_points(model, operator))
    producers = {name: node for node in model.graph.node for name in node.output}
    sums = [node for node in model.graph.node if node.op_type == "Add" and len(node.input) == 2]
    residual = [n for n in sums if all(name in producers for name in n.input)]
    kinds = [
        sorted(producers[name].op_type for name in node.input) for node in residual if node.output[0] != "keypoints"
    ]
    blocks = [k for k in kinds if "Conv" in k]
    # each block sums a bare convolution and a shortcut that is quantised
    assert blocks == [["Conv", "DequantizeLinear"]] * 8


@pytest.mark.parametrize("precision", ["int8", "int8-trt"])
def test_the_head_stays_in_float(exported: Path, precision: str) -> None:
    (head,) = [n for n in graph(exported, precision).graph.node if n.op_type == "Gemm"]
    weights = {c.name: c.data_type for c in graph(exported, precision).graph.initializer}
    assert weights[head.input[1]] == TensorProto.FLOAT
    nodes = list(graph(exported, precision).graph.node)
    assert {p.key: p.value for p in graph(exported, precision).metadata_props}["kp.precision"] == precision
    behind = {node.op_type for node in nodes[[node.op_type for node in nodes].index("ReduceMean") :]}
    assert not behind & {"QuantizeLinear", "DequantizeLinear"}


def test_the_manifest_tells_what_was_chosen_and_on_which_images(exported: Path, source: Source) -> None:
    entry = Manifest.read(exported).files["model.int8.onnx"]
    assert entry.made["choice"] in [{"method": c.method, "float_layers": c.float_layers} for c in CHOICES]
    names = [f"training/{face.image.name}" for face in source.faces if not is_held_out(face.person, 0.5)]
    made = entry.made["calibration"]
    assert (made["images"], made["images_sha256"]) == (len(names), sha256_of_names(names[::-1]))
    assert entry.precision == "int8"
    assert entry.made["layers"] == {"int8": 20, "fp32": 1}


def test_no_photo_is_named_in_a_bundle(exported: Path, source: Source) -> None:
    """It goes to devices, and a photo's name may be a person's."""
    for file in ("manifest.json", "parity.json"):
        text = (exported / file).read_text(encoding="utf-8")
        assert not [face.image.name for face in source.faces if face.image.stem in text or face.person in text]


def test_the_manifest_counts_the_images_that_percentile_uses(
    checkpoint: Path, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    class Counts(module._Reader):
        def __init__(self, crops: np.ndarray, alike: bool) -> None:
            read.append(len(crops))
            super().__init__(crops, alike)

    monkeypatch.setattr(module, "_Reader", Counts)
    monkeypatch.setattr(module, "CHOICES", (module.Int8Choice("percentile", 0),))
    export_bundle(checkpoint, tmp_path / "b", precisions=("int8",), sources=[source], calibration=[source])
    made = Manifest.read(tmp_path / "b").files["model.int8.onnx"].made
    assert made["choice"]["method"] == "percentile"
    assert made["calibration"]["images"] == read[-1] < len(source.faces)
    assert made["calibration"]["also_measured"] == made["calibration"]["images"]  # all faces were measured


@pytest.mark.parametrize(("faces", "size", "used"), [(256, 112, 64), (256, 224, 64), (256, 1024, 4), (32, 448, 8)])
def test_percentile_is_shown_no_more_of_large_crops_than_memory_holds(faces: int, size: int, used: int) -> None:
    """It keeps all activations, which grow with the pixels."""
    crops = np.broadcast_to(np.uint8(0), (faces, 1, size, size))
    minmax, percentile = (len(crops[:: module.calibration_stride(choice, crops)]) for choice in CHOICES[:2])
    assert (minmax, percentile) == (faces, used)


def test_int8_is_what_a_cpu_takes_by_itself(exported: Path) -> None:
    report = open_backend(exported).report
    assert (report.file, report.precision) == ("model.int8.onnx", "int8")
    assert report.golden_error_px is not None
    assert report.golden_error_px > 0


def test_quantising_twice_gives_the_same_bytes(
    exported: Path, checkpoint: Path, source: Source, tmp_path: Path
) -> None:
    export_bundle(checkpoint, tmp_path / "b", precisions=("int8",), calibration=[source])
    assert (tmp_path / "b" / "model.int8.onnx").read_bytes() == (exported / "model.int8.onnx").read_bytes()


def test_each_way_is_tried_and_the_reasons_are_told(
    checkpoint: Path, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHOICES", CHOICES[:3:2])
    monkeypatch.setitem(LIMITS, "int8", Limit(rise=-100.0))
    with pytest.raises(ParityError, match=r"minmax, 0 in float32: .*rise of the NME.*minmax, 1 in float32"):
        export_bundle(checkpoint, tmp_path / "b", precisions=("int8",), calibration=[source])
    assert list(tmp_path.iterdir()) == []


def test_the_first_way_within_the_limits_is_kept_with_why_those_before_were_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "int8_from_onnx", lambda *_, **__: None)
    rises = iter((1.0, 0.01))

    def check(file: Path) -> Parity:
        report = Parity(file.name, "int8", 1, "x", 0.1, 0.1, 0.1, 0.1, 0.1, next(rises), {}, "a face")
        check_parity(report, SIZE)
        return report

    none = FaceSet((), np.empty((0, 1, SIZE, SIZE), np.uint8), "x")
    found = module.search_int8(tmp_path / "a", tmp_path / "b", precision="int8", calibration=none, check=check)
    assert (found.choice, found.parity.rise) == (CHOICES[1], 0.01)
    assert len(found.rejected) == 1
    assert found.rejected[0].startswith("minmax, 0 in float32: b is too far from PyTorch: rise of the NME 1 percentage")


def test_a_way_that_misses_the_golden_crop_is_passed_over(
    checkpoint: Path, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is over its limits on faces is."""
    off = iter((None, "puts a golden keypoint 9 px off", None))  # fp32 and the two ways
    monkeypatch.setattr("kp_export.bundle.golden_distance", lambda *_: (0.0, next(off)))
    monkeypatch.setattr(module, "CHOICES", CHOICES[:3:2])
    export_bundle(checkpoint, tmp_path / "b", precisions=("int8",), calibration=[source])
    made = Manifest.read(tmp_path / "b").files["model.int8.onnx"].made
    assert made["choice"] == dataclasses.asdict(CHOICES[2])
    told = "model.int8.onnx is within its limits on faces, but puts a golden keypoint 9 px off"
    assert made["rejected"] == [f"minmax, 0 in float32: {told}"]


def test_no_room_for_the_quantiser_is_not_the_bundle_s_fault(
    checkpoint: Path, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", full)
    level = logging.getLogger().level
    told = "can't write the quantiser's temporary files: No space left on device; .*TMPDIR"
    with pytest.raises(ExportError, match=told):
        export_bundle(checkpoint, tmp_path / "b", precisions=("int8",), calibration=[source])
    assert logging.getLogger().level == level  # the quantiser alone is to be quiet


def test_no_folder_for_the_quantiser(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(ExportError, match=r"temporary files: No usable temporary directory found; .*TMPDIR"):
        module._temporary_folder().__enter__()


@pytest.mark.parametrize(
    ("method", "wanted", "options", "batches"),
    [("minmax", "MinMax", {}, {32, 16}), ("percentile", "Percentile", {"CalibPercentile": 99.99}, {20})],
)
def test_ranges_are_found_as_was_asked(
    method: str,
    wanted: str,
    options: dict[str, float],
    batches: set[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def quantise(fp32: str, out: str, reader: Any, **rest: Any) -> None:
        asked.update(rest, batches={len(batch["crops"]) for batch in iter(reader.get_next, None)})
        raise RuntimeError("seen")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", quantise)
    net, spec = KeypointNet(SIZE).eval(), ModelSpec("x", SIZE)
    known_graph(net, spec, tmp_path / "a.onnx", precision="fp32", checkpoint_sha256="ranges")
    faces = FaceSet(("x",) * 80, np.zeros((80, 1, SIZE, SIZE), np.uint8), "x")
    choice = module.Int8Choice(method)
    with pytest.raises(ExportError, match=r"quantiser fails on a\.onnx: seen"):
        module.int8_from_onnx(tmp_path / "a.onnx", tmp_path / "b", precision="int8", calibration=faces, choice=choice)
    assert asked["calibrate_method"].name == wanted
    assert {key: value for key, value in asked["extra_options"].items() if key.startswith("Calib")} == options
    assert asked["batches"] == batches  # onnxruntime's percentile takes batches of one size alone


@pytest.mark.parametrize("reduce", [1, 2])
@pytest.mark.parametrize(("precision", "scale"), [("int8", 1 / 255), ("int8-trt", 1 / 127)])
def test_dark_calibration_faces_clip_no_bright_ones(reduce: int, precision: str, scale: float, tmp_path: Path) -> None:
    """The image's range is that of grey levels, whatever was shown."""
    fp32, out = tmp_path / "a.onnx", tmp_path / "b.onnx"
    net, spec = KeypointNet(SIZE, reduce).eval(), ModelSpec("x", SIZE)
    torch.nn.init.ones_(net.backbone.bn1.bias)  # as trained, the first convolution has a bias
    known_graph(net, spec, fp32, precision="fp32", checkpoint_sha256=f"dark {reduce}")
    dark = FaceSet(("x",) * 4, np.random.default_rng(1).integers(9, 99, (4, 1, SIZE, SIZE), dtype=np.uint8), "x")
    module.int8_from_onnx(fp32, out, precision=precision, calibration=dark, choice=CHOICES[0])
    model = onnx.load(out)
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    image = next(node for node in model.graph.node if conv.input[0] in node.output)
    constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    assert image.op_type == "DequantizeLinear"
    assert [constants[name] for name in image.input[1:]] == [np.float32(scale), 0]


def test_int8_without_faces_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="give --calibration"):
        export_bundle(checkpoint, tmp_path / "b", precisions=("int8",))


@pytest.mark.parametrize(
    ("faces", "measured", "told"),
    [
        (5, True, "32 or more faces, .* gives 5; give more"),
        (20, False, "32 or more faces, .* gives [0-9]+; give more .without --data, half of the people measure"),
    ],
)
def test_an_export_refuses_too_few_faces(
    checkpoint: Path, source: Source, tmp_path: Path, faces: int, measured: bool, told: str
) -> None:
    few = dataclasses.replace(source, faces=source.faces[:faces])
    with pytest.raises(DataError, match=told):
        export_bundle(checkpoint, tmp_path / "b", precisions=("int8",), sources=[source] * measured, calibration=[few])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [True, False])
def test_a_single_face_does_not_judge_int8(checkpoint: Path, source: Source, tmp_path: Path, data: bool) -> None:
    """Given with --data, or all that the half of the people have which measures."""
    calibrating = tuple(face for face in source.faces if not is_held_out(face.person, 0.5))
    one = next(face for face in source.faces if is_held_out(face.person, 0.5))
    given = dataclasses.replace(source, faces=calibrating if data else (*calibrating, one))
    measured = [dataclasses.replace(source, faces=(one,))] if data else []
    with pytest.raises(DataError, match=r"int8 is judged on 32 or more faces, .* gives 1; give more with --data"):
        export_bundle(checkpoint, tmp_path / "b", precisions=("int8",), sources=measured, calibration=[given])
    assert list(tmp_path.iterdir()) == []


def test_noise_few_faces_and_no_labels_are_refused(source: Source, rng: np.random.Generator) -> None:
    spec = ModelSpec("x", SIZE)
    faces = faces_from_sources([source], spec)
    assert faces.xy_crop is not None
    answers = dict(zip([crop.tobytes() for crop in faces.crops], faces.xy_crop, strict=True))

    def knows(crops: np.ndarray) -> Answer:
        """The truth for the faces; for anything else a face of its own."""
        found = [answers.get(crop.tobytes(), faces.xy_crop[0] + 30) for crop in crops]
        return Answer(np.stack(found).astype(np.float32))

    check_calibration(faces, knows)
    for missed, taken in ((len(faces.names) // 5, True), (len(faces.names) // 5 + 1, False)):
        crops = faces.crops.copy()
        crops[:missed] = 255 - crops[:missed]
        some = FaceSet(faces.names, crops, "some", faces.xy_crop)
        told = r"misses 2\d% of them by an NME of over 15%;"  # of own points it is no share of the eye distance
        with contextlib.nullcontext() if taken else pytest.raises(DataError, match=told):
            check_calibration(some, knows)
    noise = FaceSet(faces.names, rng.integers(0, 256, faces.crops.shape, dtype=np.uint8), "noise", faces.xy_crop)
    with pytest.raises(DataError, match="noise does not look like faces"):
        check_calibration(noise, knows)
    with pytest.raises(DataError, match="32 or more faces"):
        check_calibration(FaceSet(faces.names[:5], faces.crops[:5], "few", faces.xy_crop[:5]), knows)
    with pytest.raises(DataError, match="int8 needs faces with labels, none has none"):
        check_calibration(FaceSet(faces.names, faces.crops, "none"), knows)
