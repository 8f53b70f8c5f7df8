"""Operator preflight: can TensorRT's ONNX parser take each node of a graph, in its types?

Asked on any machine, before a device is at hand. The facts are in tensorrt_operators.json beside
this file: operators and element types from the documentation of onnx-tensorrt, with their source.
It knows operators and types, not each operator's fine print (which attributes, which ranks).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from kp_runtime.errors import ExportError

__all__ = ["OperatorProblem", "check_operators", "operator_problems"]

FACTS = Path(__file__).with_name("tensorrt_operators.json")

_NAMES = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "FP8",
}

Types = Mapping[str, str]


@dataclass(frozen=True)
class OperatorProblem:
    """Why TensorRT's parser would refuse a node.

    Attributes:
        node: the node's name, or its first output where it has none.
        operator: its ONNX operator.
        reason: what is not supported.
    """

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"node {self.node} ({self.operator}): {self.reason}"


@dataclass(frozen=True)
class _Facts:
    """The data file."""

    opset: tuple[int, int]
    types: dict[str, frozenset[str]]
    other_side: dict[str, frozenset[str]]


def check_operators(onnx_path: Path) -> None:
    """Fails when TensorRT's parser would refuse a node of the file.

    Raises:
        ExportError: it would, or the file is no ONNX model.
    """
    problems = operator_problems(onnx_path)
    if problems:
        shown = "; ".join(map(str, problems[:3])) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ExportError(
            f"TensorRT's ONNX parser would refuse {onnx_path.name}: {shown}. Write the graph with operators and "
            f"types of {FACTS.name}, or use ONNX Runtime for this file"
        )


def operator_problems(onnx_path: Path) -> tuple[OperatorProblem, ...]:
    """All that TensorRT's parser would refuse in a file, node by node.

    Raises:
        ExportError: the file is no ONNX model.
    """
    try:
        model = onnx.load(onnx_path)
        onnx.checker.check_model(model)
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception as error:  # protobuf, the checker and the inference each raise their own
        raise ExportError(f"{onnx_path} is no valid ONNX model ({error}); export it again") from error
    facts = _facts()
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    lowest, highest = facts.opset
    problems = []
    if not lowest <= opset <= highest:
        problems.append(OperatorProblem("graph", "opset", f"opset {opset}, supported are {lowest} to {highest}"))
    ends = {tensor.name for tensor in (*model.graph.input, *model.graph.output)}
    problems += _graph_problems(inferred.graph, {}, ends, opset, facts)
    return tuple(problems)


@cache
def _facts() -> _Facts:
    raw = json.loads(FACTS.read_text(encoding="utf-8"))
    lowest, highest = raw["opset"]
    return _Facts(
        opset=(lowest, highest),
        types={name: frozenset(group["types"]) for group in raw["types"] for name in group["operators"]},
        other_side={name: frozenset(types) for name, types in raw["other_side"].items()},
    )


def _graph_problems(
    graph: onnx.GraphProto, outer: Types, ends: set[str], opset: int, facts: _Facts
) -> Iterator[OperatorProblem]:
    """The problems of a graph and of the graphs inside its nodes."""
    types = {**outer, **_tensor_types(graph)}
    for node in graph.node:
        name = node.name or (node.output[0] if node.output else "?")
        for reason in _node_reasons(node, types, ends, opset, facts):
            yield OperatorProblem(name, node.op_type, reason)
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from _graph_problems(inner, types, ends, opset, facts)


def _node_reasons(node: onnx.NodeProto, types: Types, ends: set[str], opset: int, facts: _Facts) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"its domain {node.domain!r} is not ONNX's own"
        return
    listed = facts.types.get(node.op_type)
    if listed is None:
        yield "the operator is not supported"
        return
    taken = listed | facts.other_side.get(node.op_type, frozenset())
    for tensor in dict.fromkeys(_typed_tensors(node, opset)):
        found = types.get(tensor)
        if found is None:
            yield f"the type of its tensor {tensor} can't be inferred"
        elif found not in taken:
            yield f"its tensor {tensor} is {found}, supported are {', '.join(sorted(taken))}"
        elif found == "UINT8" and tensor not in ends:
            yield f"its tensor {tensor} is UINT8, which only the graph's own inputs and outputs can be"


def _typed_tensors(node: onnx.NodeProto, opset: int) -> Iterator[str]:
    """The inputs and outputs whose type is the node's choice: sizes, axes and truth values have no other."""
    schema: Any = onnx.defs.get_schema(node.op_type, opset)
    choices = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    for tensors, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, tensor in enumerate(tensors):
            parameter = formal[min(index, len(formal) - 1)]  # the last one stands for all of a variadic list
            if tensor and len(choices.get(parameter.type_str, ())) > 1:
                yield tensor


def _tensor_types(graph: onnx.GraphProto) -> Types:
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type:
            types[value.name] = value.type.tensor_type.elem_type
    known = TensorProto.DataType.items()
    names = {kind: name for name, kind in known} | _NAMES
    return {name: names.get(kind, f"type {kind}") for name, kind in types.items()}
