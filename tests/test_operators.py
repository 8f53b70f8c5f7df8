"""The operator preflight on small graphs, and on the graphs that this project writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kp_export.operators import FACTS, check_operators, operator_problems
from kp_runtime.errors import ExportError
from tests.models import tiny_graph


def saved(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    types: tuple[int, int] = (1, 1),
    opset: int = 18,
    **weights: np.ndarray,
) -> Path:
    """A graph from `x` `(n, 4)` to `y` in a file."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", types[0], ["n", 4])],
        [helper.make_tensor_value_info("y", types[1], ["rows", "columns"])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.example", 1)]
    path = folder / "g.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=domains, ir_version=9).SerializeToString())
    return path


def test_graph_of_the_contract_is_taken(tmp_path: Path) -> None:
    (tmp_path / "tiny.onnx").write_bytes(tiny_graph().SerializeToString())
    assert operator_problems(tmp_path / "tiny.onnx") == ()
    check_operators(tmp_path / "tiny.onnx")


def test_unknown_operator_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, [helper.make_node("Det", ["x"], ["y"], name="d")])
    with pytest.raises(ExportError, match=r"refuse g\.onnx: node d \(Det\): the operator is not supported"):
        check_operators(path)


@pytest.mark.parametrize(("count", "more"), [(3, ""), (5, "; and 2 more")])
def test_of_many_problems_three_are_named(tmp_path: Path, count: int, more: str) -> None:
    nodes = [helper.make_node("Det", ["x"], [f"y{i}" if i else "y"], name=f"d{i}") for i in range(count)]
    with pytest.raises(ExportError, match=rf"node d2 \(Det\): the operator is not supported{more}\. Write"):
        check_operators(saved(tmp_path, nodes))


def test_operator_of_another_domain_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, [helper.make_node("Mine", ["x"], ["y"], domain="com.example")])
    (problem,) = operator_problems(path)
    assert str(problem) == "node y (Mine): its domain 'com.example' is not ONNX's own"


def test_type_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, [helper.make_node("Sin", ["x"], ["y"], name="s")], (TensorProto.DOUBLE, TensorProto.DOUBLE))
    problems = operator_problems(path)
    assert [p.reason.split(",")[0] for p in problems] == ["its tensor x is DOUBLE", "its tensor y is DOUBLE"]


def test_uint8_is_for_the_ends_of_the_graph(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["inside"], to=TensorProto.UINT8),
        helper.make_node("Cast", ["inside"], ["y"], to=TensorProto.FLOAT),
    ]
    reasons = {p.reason for p in operator_problems(saved(tmp_path, nodes))}
    assert reasons == {"its tensor inside is UINT8, which only the graph's own inputs and outputs can be"}


def test_sizes_and_truth_values_are_not_the_operator_s_type(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Resize", ["x", "", "", "sizes"], ["big"]),
        helper.make_node("Greater", ["big", "zero"], ["y"]),
    ]
    path = saved(tmp_path, nodes, (1, TensorProto.BOOL), sizes=np.array([2, 8], np.int64), zero=np.array(0, np.float32))
    assert operator_problems(path) == ()


@pytest.mark.parametrize(("bias", "count"), [(np.int8, 0), (np.int32, 1)])
def test_quantised_graph(tmp_path: Path, bias: type, count: int) -> None:
    """TensorRT takes int8 between Q and DQ; an int32 bias, as some quantisers write it, it does not."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["b", "scale"], ["db"]),
        helper.make_node("Add", ["dq", "db"], ["y"]),
    ]
    weights = {"scale": np.array(0.1, np.float32), "zero": np.array(0, np.int8), "b": np.array([1] * 4, bias)}
    problems = operator_problems(saved(tmp_path, nodes, **weights))
    assert len(problems) == count
    assert all("b is INT32, supported are" in p.reason for p in problems)


def test_graphs_inside_nodes_are_looked_at(tmp_path: Path) -> None:
    def branch(name: str, operator: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4])
        return helper.make_graph([helper.make_node(operator, ["x"], [name])], name, [], [out])

    node = helper.make_node(
        "If", ["yes"], ["y"], then_branch=branch("a", "Sin"), else_branch=branch("b", "MeanVarianceNormalization")
    )
    assert operator_problems(saved(tmp_path, [node], yes=np.array(True))) == ()
    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch("a", "Sin"), else_branch=branch("b", "Gelu"))
    path = saved(tmp_path, [node], opset=20, yes=np.array(True))
    assert [p.operator for p in operator_problems(path)] == ["opset", "Gelu"]


def test_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match="is no valid ONNX model"):
        operator_problems(tmp_path / "x.onnx")


def test_facts_name_their_source() -> None:
    text = FACTS.read_text()
    assert "onnx/onnx-tensorrt, docs/operators.md" in text
    assert "TensorRT 10.15" in text
