"""ONNX files from a checkpoint's network: fp32, and a typed fp16 graph.

The graph's precision is the precision of its tensors, never a flag for a later tool: in the
fp16 file the convolutions' weights and activations are float16; pooling, the last layer and the
output are float32. Batch norm is folded into the convolutions in float32 before anything is
rounded. Both files take `crops` uint8 `(batch, 1, size, size)` and give `keypoints` float32
`(batch, 68, 2)`, `batch` being dynamic.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, ResNet

from kp_runtime.errors import ExportError
from kp_runtime.spec import ModelSpec, writing
from kp_train.model import KeypointNet

__all__ = ["IR_VERSION", "OPSET", "onnx_from_checkpoint"]

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
        ExportError: weights do not fit float16, or the graph is not valid.
    """
    typed = _TypedNet(net, half=precision == "fp16")
    batch = torch.export.Dim("batch", min=1, max=4096)
    example = torch.zeros(2, 1, spec.size, spec.size, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations say nothing to a user
        program = torch.onnx.export(
            typed,
            (example,),
            dynamo=True,
            input_names=["crops"],
            output_names=["keypoints"],
            dynamic_shapes={"crops": {0: batch}},
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # dynamo=True always returns one
    model = program.model_proto
    _clean(model)
    metadata = {
        "kp.spec": json.dumps(dataclasses.asdict(spec)),
        "kp.precision": precision,
        "kp.checkpoint_sha256": checkpoint_sha256,
    }
    onnx.helper.set_model_props(model, metadata)
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported {precision} graph is not valid ONNX: {error}") from error
    with writing(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


class _TypedNet(nn.Module):
    """The network as it is exported: batch norm folded, each tensor in its own type."""

    def __init__(self, net: KeypointNet, half: bool) -> None:
        super().__init__()
        self.decode = net.decode
        backbone = copy.deepcopy(net.backbone).eval()
        _fold_batch_norm(backbone)
        self.dtype = torch.float16 if half else torch.float32
        names = ("conv1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        self.features = nn.Sequential(OrderedDict((name, getattr(backbone, name)) for name in names))
        self.head = backbone.fc
        if half:
            _check_fits_half(self.features)
            self.features.half()

    def forward(self, crops: Tensor) -> Tensor:
        x = self.features(crops.to(self.dtype) / 255).float()
        keypoints: Tensor = self.decode(self.head(x.mean(dim=(2, 3))))
        return keypoints


def _fold_batch_norm(backbone: ResNet) -> None:
    backbone.conv1 = fuse_conv_bn_eval(backbone.conv1, backbone.bn1)
    for module in backbone.modules():
        if isinstance(module, BasicBlock):
            module.conv1, module.bn1 = fuse_conv_bn_eval(module.conv1, module.bn1), nn.Identity()
            module.conv2, module.bn2 = fuse_conv_bn_eval(module.conv2, module.bn2), nn.Identity()
            if module.downsample is not None:
                conv, norm = module.downsample[0], module.downsample[1]
                module.downsample = nn.Sequential(fuse_conv_bn_eval(conv, norm))


def _check_fits_half(features: nn.Module) -> None:
    limit = torch.finfo(torch.float16).max
    for name, weight in features.named_parameters():
        largest = float(weight.detach().abs().max())
        if not largest <= limit:
            raise ExportError(
                f"the weights of {name} reach {largest:g}, float16 ends at {limit:g}; export without --fp16"
            )


def _clean(model: Any) -> None:
    """Drops what tells of this machine or differs from run to run: traces, notes, types in between."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "kp-edge", ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name = "resnet18_68"
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        item.doc_string = ""
        if hasattr(item, "metadata_props"):
            del item.metadata_props[:]
