"""ONNX files from a checkpoint's network: fp32, and a typed fp16 graph.

The graph's precision is the precision of its tensors, never a flag for a later tool: in the
fp16 file the convolutions' weights and activations are float16; pooling, the last layer and the
output are float32. Batch norm is folded into the convolutions in float32 before anything is
rounded. Both files take `crops` uint8 `(batch, 1, size, size)` and give `keypoints` float32
`(batch, 68, 2)` and, where the contract has one, `lost_score` float32 `(batch, 1)`, `batch` being dynamic.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, ResNet

from kp_runtime.errors import ExportError
from kp_runtime.files import write_file
from kp_runtime.spec import ModelSpec
from kp_train.model import KeypointNet

__all__ = ["IR_VERSION", "OPSET", "check_fits_half", "layer_types", "onnx_from_checkpoint", "write_onnx"]

OPSET = 18
"""The lowest that PyTorch's exporter writes without converting down; every engine reads it."""
IR_VERSION = 9
"""Read by ONNX Runtime from 1.15 and by TensorRT's parser from 8.6 on."""


def onnx_from_checkpoint(
    net: KeypointNet, spec: ModelSpec, path: Path, *, precision: str, checkpoint_sha256: str
) -> None:
    """Writes one ONNX file.

    Args:
        net: the network, float32, in evaluation mode; not changed.
        spec: its contract, written into the file's metadata.
        path: where to write.
        precision: `fp32` or `fp16`.
        checkpoint_sha256: of the weights' file, written into the metadata.

    Raises:
        ExportError: the graph is not valid.
    """
    metadata = {
        "kp.spec": json.dumps(dataclasses.asdict(spec)),
        "kp.precision": precision,
        "kp.checkpoint_sha256": checkpoint_sha256,
    }
    write_onnx(
        _TypedNet(net, half=precision == "fp16"),
        torch.zeros(2, 1, spec.size, spec.size, dtype=torch.uint8),
        path,
        names=("crops", *spec.outputs),
        dynamic={0: torch.export.Dim("batch", min=1, max=4096)},
        graph="keypoints",
        metadata=metadata,
    )


def write_onnx(
    module: nn.Module,
    example: Tensor,
    path: Path,
    *,
    names: tuple[str, ...],
    dynamic: dict[int, Any],
    graph: str,
    metadata: dict[str, str],
) -> None:
    """Writes a module of one input as an ONNX file; the same module gives the same bytes.

    Args:
        module: in evaluation mode.
        example: an input.
        path: where to write.
        names: of the input and the outputs.
        dynamic: the input's dimensions that may have other sizes, by `torch.export.Dim`.
        graph: its name.
        metadata: stored in the file.

    Raises:
        ExportError: the graph is not valid.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations say nothing to a user
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            input_names=[names[0]],
            output_names=list(names[1:]),
            dynamic_shapes=(dynamic,),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # dynamo=True always returns one
    model = program.model_proto
    _clean(model, graph)
    onnx.helper.set_model_props(model, metadata)
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported graph of {path.name} is not valid ONNX: {error}") from error
    write_file(path, model.SerializeToString(deterministic=True))


def check_fits_half(net: KeypointNet, crops: NDArray[np.uint8]) -> None:
    """Fails where weights, or activations on these crops, do not fit float16.

    Within a layer sums are float32, as in PyTorch and cuDNN; TensorRT may choose kernels that sum in float16, which
    nothing here sees.

    Args:
        net: the network, float32.
        crops: `(n, 1, size, size)` uint8, real faces.

    Raises:
        ExportError: names each layer and the range that it reaches.
    """
    typed = _TypedNet(net, half=False)
    features = typed.features
    reached = {f"weights of {name}": float(value.detach().abs().max()) for name, value in features.named_parameters()}
    hooks = []

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            key = f"activations of {name}"
            reached[key] = max(reached.get(key, 0.0), float(output.abs().max()))

        return note

    for name, module in features.named_modules():
        if name:
            hooks.append(module.register_forward_hook(watch(name)))
    with torch.inference_mode():
        for start in range(0, len(crops), 32):
            features(typed.normalise(torch.from_numpy(crops[start : start + 32]), torch.float32))
    limit = torch.finfo(torch.float16).max
    if over := [f"{what} reach {value:g}" for what, value in reached.items() if not value <= limit]:
        raise ExportError(
            f"float16 ends at {limit:g}: {'; '.join(over)}; train again with weight decay, or export fp32"
        )


def layer_types(path: Path) -> dict[str, int]:
    """How many convolutions and matrix products of an ONNX file compute in each type."""
    graph = onnx.load(path).graph
    types = {item.name: onnx.TensorProto.DataType.Name(item.data_type).lower() for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            types[node.output[0]] = types.get(node.input[0], "int8")
    names = {"float": "fp32", "float16": "fp16"}
    layers = [types[node.input[1]] for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return dict(Counter(names.get(layer, layer) for layer in layers))


class _TypedNet(nn.Module):
    """The network as it is exported: batch norm folded, each tensor in its own type."""

    def __init__(self, net: KeypointNet, half: bool) -> None:
        super().__init__()
        self.normalise, self.decode = net.normalise, net.decode
        backbone = copy.deepcopy(net.backbone).eval()
        _fold_batch_norm(backbone)
        self.dtype = torch.float16 if half else torch.float32
        names = ("conv1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        self.features = nn.Sequential(OrderedDict((name, getattr(backbone, name)) for name in names))
        self.head = backbone.fc
        self.lost_score = backbone.lost_score if net.scores else None
        if half:
            self.features.half()

    def forward(self, crops: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.features(self.normalise(crops, self.dtype)).float().mean(dim=(2, 3))
        keypoints: Tensor = self.decode(self.head(x))
        return keypoints if self.lost_score is None else (keypoints, self.lost_score(x))


def _fold_batch_norm(backbone: ResNet) -> None:
    backbone.conv1 = fuse_conv_bn_eval(backbone.conv1, backbone.bn1)
    for module in backbone.modules():
        if isinstance(module, BasicBlock):
            module.conv1, module.bn1 = fuse_conv_bn_eval(module.conv1, module.bn1), nn.Identity()
            module.conv2, module.bn2 = fuse_conv_bn_eval(module.conv2, module.bn2), nn.Identity()
            if module.downsample is not None:
                conv, norm = module.downsample[0], module.downsample[1]
                module.downsample = nn.Sequential(fuse_conv_bn_eval(conv, norm))


def _clean(model: Any, name: str) -> None:
    """Drops what tells of this machine or differs from run to run: traces, notes, types in between."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "kp-edge", ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name = name
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        item.doc_string = ""
        if hasattr(item, "metadata_props"):
            del item.metadata_props[:]
