"""The first convolution laid out for ONNX Runtime: the same keypoints to the bit, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

import kp_export.int8_from_onnx as quantiser
from kp_export.first_convolution import fold_first_convolution, round_first_convolution, unfold_first_convolution
from kp_export.int8_from_onnx import Int8Choice, int8_from_onnx
from kp_export.parity import FaceSet
from kp_runtime.spec import ModelSpec
from kp_train.model import KeypointNet
from tests.test_export import known_graph

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def quantised(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    size: int = 64,
    reduce: int = 1,
    white: int = 255,
    scale: float = 1.0,
    floats: int = 0,
    seed: int = 0,
) -> onnx.ModelProto:
    """The plain int8 graph of a network with random weights, calibrated on noise up to `white`.

    `scale` multiplies the image's, as another quantiser may choose it.
    """
    torch.manual_seed(seed or size + reduce)
    net = KeypointNet(size, reduce)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # those of the sums begin at 0
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    spec = ModelSpec("small", size)
    fp32 = folder / "fp32.onnx"
    known_graph(net.eval(), spec, fp32, precision="fp32", checkpoint_sha256=f"{size} {reduce} {seed}")
    monkeypatch.setattr(quantiser, "fold_first_convolution", lambda model: False)
    out = folder / "int8.onnx"
    faces = FaceSet(("noise",) * 8, noise(8, size, white), "noise")
    int8_from_onnx(fp32, out, precision="int8", calibration=faces, choice=Int8Choice("minmax", floats))
    model = onnx.load(out)
    quantise = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    constant = next(constant for constant in model.graph.initializer if constant.name == quantise.input[1])
    constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant) * np.float32(scale), constant.name))
    return model


def noise(count: int, size: int, white: int = 255) -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, white + 1, (count, 1, size, size), dtype=np.uint8)


def keypoints(model: onnx.ModelProto, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["keypoints"], {"crops": crops})[0]  # type: ignore[no-any-return]


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type != "DequantizeLinear"]


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(model.SerializeToString())


@pytest.mark.parametrize(
    ("settings", "begins"),
    [
        ({"size": 64}, ["Reshape", "Transpose", "Conv"]),
        ({"size": 112}, ["Reshape", "Transpose", "Conv"]),
        ({"size": 64, "reduce": 2}, ["Cast", "Div", "AveragePool", "QuantizeLinear", "Reshape", "Transpose", "Conv"]),
        ({"size": 64, "white": 200}, ["Reshape", "Transpose", "Conv"]),
        ({"size": 64, "scale": 0.8}, ["Cast", "Div", "QuantizeLinear", "Reshape", "Transpose", "Conv"]),
    ],
)
def test_no_bit_of_the_keypoints_changes(
    settings: dict[str, Any], begins: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = quantised(tmp_path, monkeypatch, **settings)
    folded = copy(plain)
    assert fold_first_convolution(folded)
    onnx.checker.check_model(folded, full_check=True)
    crops = noise(5, settings["size"])
    wanted = keypoints(plain, crops)
    assert np.ptp(wanted, axis=0).max() > 0.1  # the network tells the crops apart
    np.testing.assert_array_equal(keypoints(folded, crops), wanted)
    np.testing.assert_array_equal(keypoints(folded, crops[:1]), wanted[:1])
    assert operators(folded)[: len(begins)] == begins

    assert unfold_first_convolution(folded)
    onnx.checker.check_model(folded, full_check=True)
    np.testing.assert_array_equal(keypoints(folded, crops), wanted)
    weights = {c.name: numpy_helper.to_array(c) for c in plain.graph.initializer if len(c.dims) == 4}
    for constant in folded.graph.initializer:
        if constant.name in weights:
            np.testing.assert_array_equal(numpy_helper.to_array(constant), weights[constant.name])
    assert not unfold_first_convolution(folded)


@pytest.mark.parametrize("settings", [{"floats": 1}, {"size": 80, "reduce": 40}, {"size": 112, "reduce": 8}])
def test_graphs_that_stay_as_they_are(
    settings: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = quantised(tmp_path, monkeypatch, **settings)
    tried = copy(plain)
    assert not fold_first_convolution(tried)
    assert tried == plain


def test_an_export_folds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = quantised(tmp_path, monkeypatch)
    monkeypatch.undo()
    out = tmp_path / "folded.onnx"
    faces = FaceSet(("noise",) * 8, noise(8, 64), "noise")
    int8_from_onnx(tmp_path / "fp32.onnx", out, precision="int8", calibration=faces, choice=Int8Choice("minmax"))
    folded = onnx.load(out)
    assert operators(folded)[:3] == ["Reshape", "Transpose", "Conv"]
    np.testing.assert_array_equal(keypoints(folded, noise(3, 64)), keypoints(plain, noise(3, 64)))


def test_weights_are_rounded_by_what_the_filters_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over windows like those that were shown the sums are nearer to the exact ones than by rounding to the nearest."""
    monkeypatch.setattr(quantiser, "round_first_convolution", lambda *_: False)
    nearest = quantised(tmp_path, monkeypatch)
    fp32 = onnx.load(tmp_path / "fp32.onnx")
    rng = np.random.default_rng(7)
    smooth = np.stack([cv2.GaussianBlur(crop[0], (0, 0), 2.0)[None] for crop in noise(16, 64)])
    shown, others = smooth[:8], smooth[8:] + rng.integers(0, 9, (8, 1, 64, 64), dtype=np.uint8)
    better = copy(nearest)
    assert round_first_convolution(better, fp32, shown)
    exact = numpy_helper.to_array(next(c for c in fp32.graph.initializer if c.dims[2:] == [7, 7]))

    def missed(model: onnx.ModelProto) -> float:
        conv = next(node for node in model.graph.node if node.op_type == "Conv")
        dequantise = next(node for node in model.graph.node if conv.input[1] in node.output)
        constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
        weights, scales = (constants[name] for name in dequantise.input[:2])
        assert weights.dtype == np.int8
        assert np.abs(weights.astype(int)).max() <= 64, "pairs of products fit 16 bits"
        error = torch.from_numpy(weights * scales[:, None, None, None] - exact)
        return float(torch.conv2d(torch.from_numpy(others).float(), error).square().mean().sqrt())

    assert missed(better) < 0.5 * missed(nearest)
    assert operators(better) == operators(nearest)

    (constant,) = [c for c in fp32.graph.initializer if c.dims[2:] == [7, 7]]
    constant.CopyFrom(numpy_helper.from_array(2 * exact, constant.name))
    over = copy(nearest)  # whose scales do not reach so far
    assert round_first_convolution(over, fp32, shown)
    (rounded,) = [numpy_helper.to_array(c) for c in over.graph.initializer if c.dims[2:] == [7, 7]]
    assert np.abs(rounded.astype(int)).max() == 64


def test_a_reducing_network_is_rounded_by_what_its_filters_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is the mean of each two by two pixels: a smaller network that is shown these ends with the same weights."""
    shown = noise(8, 128)
    means = shown.reshape(8, 1, 64, 2, 64, 2).mean(axis=(3, 5))
    weights = []
    for size, reduce, crops in ((128, 2, shown), (64, 1, means)):
        model = quantised(tmp_path, monkeypatch, size=size, reduce=reduce, seed=1)
        assert round_first_convolution(model, onnx.load(tmp_path / "fp32.onnx"), crops)
        quantised_weights = [c for c in model.graph.initializer if c.dims[2:] == [7, 7]]
        weights.append(numpy_helper.to_array(quantised_weights[0]))
    np.testing.assert_array_equal(*weights)


def test_black_crops_tell_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantised(tmp_path, monkeypatch)
    before = model.SerializeToString()
    assert not round_first_convolution(model, onnx.load(tmp_path / "fp32.onnx"), np.zeros((2, 1, 64, 64), np.uint8))
    assert model.SerializeToString() == before


def test_a_first_convolution_in_float32_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantised(tmp_path, monkeypatch, floats=1)
    before = model.SerializeToString()
    assert not round_first_convolution(model, onnx.load(tmp_path / "fp32.onnx"), noise(2, 64))
    assert model.SerializeToString() == before
