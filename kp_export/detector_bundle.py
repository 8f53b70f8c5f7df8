"""The face detector's bundle: from the checkpoint to an ONNX file that is proved to give PyTorch's cells."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from kp_export.onnx_from_checkpoint import IR_VERSION, OPSET, write_onnx
from kp_export.staging import mend, staging
from kp_runtime import __version__
from kp_runtime.center_detector import MODEL_NAME, CenterDetector
from kp_runtime.files import writing
from kp_runtime.golden import GOLDEN_NAME
from kp_runtime.manifest import DetectorManifest, file_entry
from kp_train.checkpoint import CHECKPOINT_NAME, load_detector
from kp_train.detector_net import ConvLayer, DetectorNet
from kp_train.synthetic import drawn_face

__all__ = ["export_detector"]


def export_detector(bundle: Path, score: float | None = None) -> Path:
    """Fills a detector's bundle from its checkpoint; on an error it stays as it was.

    Args:
        bundle: a folder of `kp_train.train_detector`.
        score: from which score on a cell counts; the checkpoint's when None.

    Returns:
        The path of the ONNX file.

    Raises:
        BundleError, IntegrityError: as `load_detector`.
        ExportError: another export is at work there, or the graph is not valid.
        BackendError: ONNX Runtime gives other cells than PyTorch.
    """
    mend(bundle)
    net, manifest = load_detector(bundle)
    spec = manifest.spec if score is None else dataclasses.replace(manifest.spec, score=score)
    checkpoint = manifest.files[CHECKPOINT_NAME]
    with staging(bundle.resolve()) as stage:
        model, golden = stage / MODEL_NAME, stage / GOLDEN_NAME
        write_onnx(
            _folded(net),
            torch.zeros(1, 1, 96, 128, dtype=torch.uint8),
            model,
            names=("image", "cells"),
            dynamic={2: torch.export.Dim("height", min=9, max=8192), 3: torch.export.Dim("width", min=9, max=8192)},
            graph="face_detector",
            metadata={
                "kp.spec": json.dumps(dataclasses.asdict(spec)),
                "kp.precision": "fp32",
                "kp.checkpoint_sha256": checkpoint.sha256,
            },
        )
        image = _golden_image()
        with writing(golden) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, image=image, cells=_cells(net, image))
        made = {"by": "detector_bundle", "opset": OPSET, "ir_version": IR_VERSION, "torch": torch.__version__}
        made |= {"kp": __version__, "onnx": onnx.__version__}
        files = {
            CHECKPOINT_NAME: checkpoint,
            MODEL_NAME: file_entry(model, "onnx", precision="fp32", parent_sha256=checkpoint.sha256, made=made),
            GOLDEN_NAME: file_entry(golden, "golden", parent_sha256=checkpoint.sha256),
        }
        accuracy = manifest.accuracy if spec == manifest.spec else {}  # at another score it finds other faces
        DetectorManifest(spec, files, manifest.training, accuracy, manifest.licence).write(stage)
        CenterDetector(stage, threads=1)  # compares the golden cells
    return bundle / MODEL_NAME


def _golden_image() -> NDArray[np.uint8]:
    """A drawn face of a size that the network finds, on a picture of odd height and width."""
    image, _ = drawn_face(np.random.default_rng(68), (101, 93))
    return np.ascontiguousarray(image[:, :, 0])


def _cells(net: DetectorNet, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.inference_mode():
        cells: NDArray[np.float32] = net(torch.from_numpy(image)[None, None])[0].numpy()
    return cells


def _folded(net: DetectorNet) -> nn.Module:
    """The network with batch norm folded into the convolutions."""
    net = copy.deepcopy(net).eval()
    for layer in net.modules():
        if isinstance(layer, ConvLayer) and isinstance(layer.norm, nn.BatchNorm2d):
            layer.conv, layer.norm = fuse_conv_bn_eval(layer.conv, layer.norm), nn.Identity()
    return net
