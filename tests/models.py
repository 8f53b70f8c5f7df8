"""Tiny ONNX graphs with the contract's input and output, for tests that need an engine, not faces.

`tiny_bundle` writes a bundle whose network answers, for each crop, the mean shape moved by the
crop's mean grey level, and unless it has no `lost_limit` a quarter of that level: `tiny_keypoints` and `tiny_scores`
are the same in numpy, so tests know what must come out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kp_runtime.frame import Frame
from kp_runtime.geometry import matrices_from_boxes
from kp_runtime.golden import GOLDEN_NAME
from kp_runtime.manifest import Manifest, file_entry
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.spec import ModelSpec
from kp_train.synthetic import golden_face, mean_shape

SIZE, LOST_LIMIT = 64, 0.5


def some_crops(rng: np.random.Generator, n: int) -> np.ndarray:
    """Noise, `(n, 1, SIZE, SIZE)` uint8."""
    return rng.integers(0, 256, (n, 1, SIZE, SIZE), dtype=np.uint8)


def tiny_keypoints(crops: np.ndarray) -> np.ndarray:
    """`(n, 1, size, size)` uint8 to `(n, 68, 2)` float32: what the tiny graph computes."""
    size = crops.shape[-1]
    base = (mean_shape() * 0.3 + 0.5) * size
    level = crops.astype(np.float64).mean(axis=(1, 2, 3)) / 255
    return (base[None] + level[:, None, None]).astype(np.float32)


def tiny_scores(crops: np.ndarray) -> np.ndarray:
    """Likewise to `(n,)` float32: a quarter of the crop's mean grey level, 0 to 0.25."""
    return (crops.astype(np.float64).mean(axis=(1, 2, 3)) / 255 / 4).astype(np.float32)


def tiny_outputs(crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both, as the graph's outputs: `(n, 68, 2)` and `(n, 1)`."""
    return tiny_keypoints(crops), tiny_scores(crops)[:, None]


def tiny_graph(size: int = SIZE, *, scores: bool = True) -> onnx.ModelProto:
    """The graph: cast, mean, scale, add the mean shape; and a quarter of the scaled mean as the lost score."""
    base = ((mean_shape() * 0.3 + 0.5) * size).astype(np.float32)[None]
    weights = [
        numpy_helper.from_array(base, "base"),
        numpy_helper.from_array(np.array(1 / 255, np.float32), "scale"),
        numpy_helper.from_array(np.array([1, 2, 3], np.int64), "axes"),
        numpy_helper.from_array(np.array([-1, 1, 1], np.int64), "shape"),
    ]
    nodes = [
        helper.make_node("Cast", ["crops"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
        helper.make_node("Mul", ["mean", "scale"], ["level"]),
        helper.make_node("Reshape", ["level", "shape"], ["flat"]),
        helper.make_node("Add", ["flat", "base"], ["keypoints"]),
    ]
    outputs = [helper.make_tensor_value_info("keypoints", TensorProto.FLOAT, ["batch", 68, 2])]
    if scores:
        weights.append(numpy_helper.from_array(np.array([-1, 1], np.int64), "column"))
        weights.append(numpy_helper.from_array(np.array(0.25, np.float32), "quarter"))
        nodes.append(helper.make_node("Reshape", ["level", "column"], ["levels"]))
        nodes.append(helper.make_node("Mul", ["levels", "quarter"], ["lost_score"]))
        outputs.append(helper.make_tensor_value_info("lost_score", TensorProto.FLOAT, ["batch", 1]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("crops", TensorProto.UINT8, ["batch", 1, size, size])],
        outputs,
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def tiny_bundle(
    folder: Path,
    size: int = SIZE,
    *,
    golden: bool = True,
    image: bool = False,
    margin: float = 1.3,
    box: str = "keypoints",
    lost_limit: float | None = LOST_LIMIT,
    precision: str = "fp32",
) -> Path:
    """Writes a bundle with `model.fp32.onnx` and, unless told otherwise, a golden crop: of noise, or of an image.

    A file of another precision holds the same graph.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = ModelSpec("tiny", size=size, margin=margin, box=box, lost_limit=lost_limit)
    model = folder / f"model.{precision}.onnx"
    model.write_bytes(tiny_graph(size, scores=lost_limit is not None).SerializeToString())
    files = {model.name: file_entry(model, "onnx", precision=precision)}
    if golden:
        crops = np.random.default_rng(0).integers(0, 256, (1, 1, size, size), dtype=np.uint8)
        source = {}
        if image:
            source = dict(zip(("image", "box_xyxy"), golden_face(size, margin), strict=True))
            matrices = matrices_from_boxes(source["box_xyxy"][None], size, margin)
            crops = crops_from_frame(Frame(source["image"], "bgr"), matrices, size)
        outputs = dict(zip(spec.outputs, tiny_outputs(crops), strict=False))
        np.savez(folder / GOLDEN_NAME, crops=crops, **outputs, **source)
        files[GOLDEN_NAME] = file_entry(folder / GOLDEN_NAME, "golden")
    Manifest(spec=spec, files=files).write(folder)
    return folder
