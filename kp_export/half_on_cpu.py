"""A float16 graph that a CPU computes as PyTorch does on a GPU: ONNX Runtime's CPU provider does not by itself.

It has no float16 convolution. It computes such a graph in float32 from end to end and takes the rounding
between the layers out, so that only the weights are float16: what overflows there stays finite here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["half_on_cpu"]


def half_on_cpu(path: Path) -> bytes:
    """The same graph in float32, each result of a float16 layer rounded to float16 where the layer ends.

    A layer's sums are float32, as PyTorch and cuDNN have them, and its result has 11 bits. A value beyond 65504
    becomes infinite. TensorRT may choose kernels that sum in float16, which nothing here sees: `kp eval` of the plan
    does. The casts are the graph's own, and these ONNX Runtime keeps.

    Args:
        path: an ONNX file whose tensors have their types by shape inference.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    graph = model.graph
    half = {item.name for item in graph.value_info if item.type.tensor_type.elem_type == TensorProto.FLOAT16}
    del graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes = []
    for node in graph.node:
        nodes.append(node)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
        for i, name in enumerate(node.output):
            if name in half:
                node.output[i] = f"{name} unrounded"
                nodes.append(helper.make_node("Cast", [node.output[i]], [f"{name} half"], to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [f"{name} half"], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(model.SerializeToString())
