"""The precision receipt: in which types a TensorRT engine really computes.

It is read off the JSON of TensorRT's EngineInspector, taken with detailed profiling verbosity. The
layout of that JSON is not specified by NVIDIA; 10.x writes a tensor's type and layout as one text
("Format/Datatype": "Channel major FP16 format where channel % 8 == 0", or just "Half"), 11.x
splits them ("DataType"), and a layer with weights tells their type. All of these are read.

How the shares are counted:

- A layer's *type* is the type of its weights; without weights that of its first output, else of its
  first input; else `unknown`.
- *layers*: each layer counts one. Layers that only move data (reformats, shuffles, constants,
  no-ops) are left out of all shares.
- *compute*: multiply-adds times two, for layers that multiply by weights (convolutions, matrix
  products): 2 * weights * output elements / output channels. Other layers count nothing. Dimensions
  that the inspector gives as -1 are taken as the batch size that the engine was tuned for.
- *bytes*: what a layer reads and writes: elements of its inputs, outputs and weights times their size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kp_runtime.errors import ExportError

__all__ = ["LEAST_SHARE", "PrecisionReceipt", "check_receipt", "receipt_from_inspector"]

LEAST_SHARE = {"fp32": 0.9, "fp16": 0.9, "int8": 0.7}
"""Least share of compute in the type that was asked for: a quantised graph keeps its ends in fp16 or fp32."""

DLA_TYPES = ("fp16", "int8")
"""A DLA has no fp32 arithmetic: the graph's fp32 head is on the GPU by design."""

UNKNOWN = "unknown"
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1, "int32": 4, "int64": 8, "uint8": 1, "bool": 1}

_TYPES = (
    ("fp16", r"\b(fp16|half)\b"),
    ("bf16", r"\b(bf16|bfloat16)\b"),
    ("fp32", r"\b(fp32|float|float32)\b"),
    ("fp8", r"\bfp8"),
    ("uint8", r"\buint8\b"),
    ("int8", r"\bint8\b"),
    ("int32", r"\bint32\b"),
    ("int64", r"\bint64\b"),
    ("bool", r"\bbool\b"),
)
_MOVES_DATA = re.compile(r"reformat|shuffle|constant|no-?op|reshape|copy|to nvm|from nvm|signal|wait", re.IGNORECASE)
_MULTIPLIES = re.compile(r"conv|gemm|matrix_?mul|matmul|fully_?connected", re.IGNORECASE)


@dataclass(frozen=True)
class _Layer:
    """One layer of an engine.

    Attributes:
        type: `fp32`, `fp16`, `int8`, …, or `unknown`.
        flops: estimated floating-point or integer operations a batch; 0 without weights.
        bytes: estimated bytes read and written a batch.
        on_dla: whether it runs on the DLA.
    """

    type: str
    flops: float
    bytes: float
    on_dla: bool


@dataclass(frozen=True)
class PrecisionReceipt:
    """In which types an engine computes; shares are 0 to 1, by type, largest first.

    Attributes:
        layers: number of layers that compute.
        batch: batch size that the estimates are for.
        layer_shares: share of layers.
        compute_shares: share of multiply-adds; empty where the inspector gives nothing to count.
        byte_shares: share of bytes read and written; empty likewise.
        gflops: estimated operations a batch, in thousand millions.
        dla_layers: layers on the DLA.
        left_on_gpu: convolutions and matrix products in fp16 or int8 on the GPU: with a DLA they fell back.
    """

    layers: int
    batch: int
    layer_shares: dict[str, float]
    compute_shares: dict[str, float]
    byte_shares: dict[str, float]
    gflops: float
    dla_layers: int
    left_on_gpu: int


def receipt_from_inspector(text: str, batch: int) -> PrecisionReceipt:
    """Reads the inspector's JSON of a whole engine.

    Args:
        text: what `EngineInspector.get_engine_information` returned.
        batch: batch size that stands for a dimension of -1.

    Raises:
        ExportError: it is not JSON, or has no layer with details.
    """
    try:
        return _receipt(json.loads(text), batch)
    except (TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError, RecursionError) as error:
        raise ExportError(
            f"TensorRT's engine inspector gave no JSON that can be read ({str(error)[:200]}): without it nothing "
            "proves the plan's precision"
        ) from error


def _receipt(document: Any, batch: int) -> PrecisionReceipt:
    raw = document.get("Layers") if isinstance(document, Mapping) else None
    layers = [layer for entry in raw or () if isinstance(entry, Mapping) and (layer := _layer(entry, batch))]
    if not layers:
        raise ExportError(
            "TensorRT's engine inspector lists no layer with details: without them nothing proves the plan's "
            "precision; the engine must be built with detailed profiling verbosity"
        )
    return PrecisionReceipt(
        layers=len(layers),
        batch=batch,
        layer_shares=_shares((layer.type, 1.0) for layer in layers),
        compute_shares=_shares((layer.type, layer.flops) for layer in layers),
        byte_shares=_shares((layer.type, layer.bytes) for layer in layers),
        gflops=round(sum(layer.flops for layer in layers) / 1e9, 3),
        dla_layers=sum(layer.on_dla for layer in layers),
        left_on_gpu=sum(layer.flops > 0 and layer.type in DLA_TYPES and not layer.on_dla for layer in layers),
    )


def check_receipt(receipt: PrecisionReceipt, precision: str, *, dla: bool) -> None:
    """Fails when an engine does not compute in the type that was asked for.

    On a GPU the share of compute counts, and the share of bytes where compute can't be estimated.
    With a DLA it counts that every fp16 or int8 convolution is there.

    Args:
        receipt: of the engine.
        precision: `fp32`, `fp16` or `int8`.
        dla: whether the DLA was asked for.

    Raises:
        ExportError: too little is in that type, or on the DLA.
    """
    if dla:
        if receipt.dla_layers == 0 or receipt.left_on_gpu:
            raise ExportError(
                f"the DLA was asked for, but {receipt.left_on_gpu} {' and '.join(DLA_TYPES)} convolutions fell back to "
                f"the GPU and {receipt.dla_layers} layers are on the DLA; build without dla_core, or with a TensorRT "
                "whose DLA takes them"
            )
        return
    shares, measure = receipt.compute_shares, "compute"
    if not shares:
        shares, measure = receipt.byte_shares, "bytes"
    got, least = shares.get(precision, 0.0), LEAST_SHARE[precision]
    if not got >= least:
        found = ", ".join(f"{share:.0%} {name}" for name, share in shares.items()) or "nothing that can be counted"
        raise ExportError(
            f"{precision} was asked for, but only {got:.0%} of the engine's {measure} is {precision} (at least "
            f"{least:.0%} is right); the inspector finds: {found}. Precision lives in the graph: give the "
            f"{precision} ONNX file, and see which layers are not in it in the log"
        )


def _layer(entry: Mapping[str, Any], batch: int) -> _Layer | None:
    """One layer, or None where it only moves data."""
    name, kind = str(entry.get("Name", "")), str(entry.get("LayerType", ""))
    if _MOVES_DATA.search(kind) or name.startswith("Reformatting"):
        return None
    on_dla = "dla" in kind.lower() or ("ForeignNode" in name and "myelin" not in kind.lower())
    inputs, outputs = _tensors(entry, "Inputs"), _tensors(entry, "Outputs")
    weights_type, weights = _weights(entry, f"{kind} {entry.get('ParameterType', '')}", inputs)
    types = [weights_type, *(_tensor_type(tensor) for tensor in (*outputs[:1], *inputs[:1]))]
    moved = sum(_elements(tensor, batch) * BYTES.get(_tensor_type(tensor), 0) for tensor in (*inputs, *outputs))
    return _Layer(
        type=next((found for found in types if found != UNKNOWN), UNKNOWN),
        flops=_flops(weights, outputs, batch),
        bytes=moved + weights * BYTES.get(weights_type, 0) * ("Weights" in entry),
        on_dla=on_dla,
    )


def _tensors(entry: Mapping[str, Any], side: str) -> list[Mapping[str, Any]]:
    listed = entry.get(side)
    return [tensor for tensor in listed if isinstance(tensor, Mapping)] if isinstance(listed, list) else []


def _weights(entry: Mapping[str, Any], kind: str, inputs: list[Mapping[str, Any]]) -> tuple[str, int]:
    """Type and number of the weights that a layer multiplies by; 0 where it has none.

    They stand in "Weights", or, for layers that TensorRT's compiler fused, as the second input.
    """
    weights = entry.get("Weights")
    if isinstance(weights, Mapping) and int(weights.get("Count") or 0) > 0:
        return _type_from_text(str(weights.get("Type", ""))), int(weights["Count"])
    if _MULTIPLIES.search(kind) and len(inputs) >= 2:
        dimensions = _dimensions(inputs[1])
        if len(dimensions) >= 2 and all(size > 0 for size in dimensions):
            return _tensor_type(inputs[1]), math.prod(dimensions)
    return UNKNOWN, 0


def _flops(weights: int, outputs: list[Mapping[str, Any]], batch: int) -> float:
    """Two for each weight and each place of an output channel at which it is used."""
    dimensions = _dimensions(outputs[0]) if outputs else []
    if not weights or len(dimensions) < 2:
        return 0.0
    sizes = [size if size > 0 else batch for size in dimensions]
    return 2.0 * weights * math.prod(sizes) / sizes[1]


def _elements(tensor: Mapping[str, Any], batch: int) -> int:
    return math.prod(size if size >= 0 else batch for size in _dimensions(tensor))


def _dimensions(tensor: Mapping[str, Any]) -> list[int]:
    sizes = tensor.get("Dimensions")
    return [size for size in sizes if isinstance(size, int)] if isinstance(sizes, list) else []


def _tensor_type(tensor: Mapping[str, Any]) -> str:
    """The element type of a tensor, from whichever of its fields tells one."""
    fields = {str(key).lower(): str(value) for key, value in tensor.items()}
    for key in ("datatype", "format/datatype", "format"):
        found = _type_from_text(fields.get(key, ""))
        if found != UNKNOWN:
            return found
    return UNKNOWN


def _type_from_text(text: str) -> str:
    return next((name for name, pattern in _TYPES if re.search(pattern, text, re.IGNORECASE)), UNKNOWN)


def _shares(weighted: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, weight in weighted:
        if weight > 0:
            sums[name] = sums.get(name, 0.0) + weight
    total = sum(sums.values())
    return {name: round(weight / total, 4) for name, weight in sorted(sums.items(), key=lambda item: -item[1])}
