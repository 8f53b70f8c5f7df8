"""float16 graphs on a CPU, computed as a GPU does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kp_export import bundle, verify
from kp_export.bundle import answer_from_net, export_bundle
from kp_export.half_on_cpu import half_on_cpu
from kp_export.onnx_from_checkpoint import _TypedNet
from kp_export.parity import FaceSet, bundled_faces
from kp_export.verify import verify_bundle
from kp_runtime.errors import ParityError
from kp_runtime.manifest import Manifest
from kp_train.checkpoint import load_checkpoint
from tests.test_export import known_graph

FP16 = "model.fp16.onnx"


def answer_of(graph: bytes, **inputs: NDArray[np.generic]) -> list[NDArray[np.generic]]:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    answer: list[NDArray[np.generic]] = session.run(None, inputs)
    return answer


def sums_graph(path: Path, weights: NDArray[np.float16]) -> Path:
    """x times weights in float16, and the product times a hundredth."""
    names = ("weights", "small")
    values = (weights, np.full(1, 0.01, np.float16))
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
            helper.make_node("MatMul", ["half", "weights"], ["product"]),
            helper.make_node("Mul", ["product", "small"], ["less"]),
            helper.make_node("Cast", ["less"], ["y"], to=TensorProto.FLOAT),
        ],
        "sums",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, len(weights)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, weights.shape[1]])],
        [numpy_helper.from_array(value, name) for name, value in zip(names, values, strict=True)],
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])
    path.write_bytes(model.SerializeToString())
    return path


def test_each_result_is_rounded_and_a_sum_is_not(tmp_path: Path) -> None:
    path = sums_graph(tmp_path / FP16, np.array([[2048, 2048], [1, 1], [1, 0]], np.float16))
    # 2050 = 2048 + 1 + 1 has 11 bits, and 2049 has not; the hundredth is rounded twice
    hundredth = float(np.float16(0.01))
    expected = np.float16(np.float32([2050, 2048]) * np.float32(hundredth))
    (got,) = answer_of(half_on_cpu(path), x=np.ones((1, 3), np.float32))
    assert got.tolist() == [expected.tolist()]


def test_what_overflows_on_a_gpu_does_here(tmp_path: Path) -> None:
    path = sums_graph(tmp_path / FP16, np.full((4, 1), 100, np.float16))
    x = np.full((1, 4), 1000, np.float32)
    (plain,) = answer_of(path.read_bytes(), x=x)
    assert np.isfinite(plain).all(), "ONNX Runtime's CPU provider rounds between layers by itself now"
    (got,) = answer_of(half_on_cpu(path), x=x)
    assert np.isinf(got).all()


def test_a_network_answers_as_pytorch_does_in_float16(exported: Path) -> None:
    net, manifest = load_checkpoint(exported)
    crops = bundled_faces(manifest.spec).crops[-2:]
    with torch.inference_mode():
        wanted = _TypedNet(net, half=True)(torch.from_numpy(crops))
    keypoints = (wanted if isinstance(wanted, torch.Tensor) else wanted[0]).numpy()
    got = answer_of(half_on_cpu(exported / FP16), crops=crops)[0]
    plain = answer_of((exported / FP16).read_bytes(), crops=crops)[0]
    exact = answer_from_net(net)(crops).keypoints
    assert np.abs(got - exact).max() > np.abs(plain - exact).max()  # the rounding that a CPU leaves out
    assert np.abs(got - keypoints).max() < np.abs(got - exact).max()


def test_export_and_verify_judge_float16_by_it(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that strays only where its results are rounded fails both."""

    def far_off(path: Path) -> bytes:
        model = onnx.load_from_string(half_on_cpu(path))
        (last,) = (node for node in model.graph.node if "keypoints" in node.output)
        last.output[0] = "near"
        model.graph.initializer.append(numpy_helper.from_array(np.float32(3), "three"))
        model.graph.node.append(helper.make_node("Add", ["near", "three"], ["keypoints"]))
        return model.SerializeToString()

    monkeypatch.setattr(bundle, "onnx_from_checkpoint", known_graph)
    for module in (bundle, verify):
        monkeypatch.setattr(module, "half_on_cpu", far_off)
    with pytest.raises(ParityError, match=r"model\.fp16\.onnx is too far from PyTorch: worst point 4\.2"):
        export_bundle(exported, tmp_path / "again", precisions=("fp16",))
    spec = Manifest.read(exported).spec
    faces = bundled_faces(spec)
    few = FaceSet(faces.names[-2:], faces.crops[-2:], faces.origin)
    verdicts = {file.file: file.verdict for file in verify_bundle(exported, few).files}
    assert verdicts == {"model.fp32.onnx": "passed", FP16: "failed"}
