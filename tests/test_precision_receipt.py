"""The precision receipt, from what the inspector is documented or reported to print."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kp_export.precision_receipt import check_receipt, receipt_from_inspector
from kp_runtime.errors import ExportError


def receipt(*layers: Any, batch: int = 8) -> Any:
    return receipt_from_inspector(json.dumps({"Layers": list(layers)}), batch)


def tensor(text: str, *shape: int, key: str = "Format/Datatype") -> dict[str, Any]:
    return {"Name": "t", "Dimensions": list(shape), key: text}


# The example of NVIDIA's developer guide ("Engine Inspector"), shortened.
GUIDE = {
    "Name": "node_of_gpu_0/res4_0_branch2a_1",
    "LayerType": "CaskConvolution",
    "Inputs": [tensor("Thirty-two wide channel vectorized row major Int8 format.", 16, 512, 28, 28)],
    "Outputs": [tensor("Thirty-two wide channel vectorized row major Int8 format.", 16, 256, 28, 28)],
    "ParameterType": "Convolution",
    "OutMaps": 256,
    "Weights": {"Type": "Int8", "Count": 131072},
}


def test_a_convolution_is_counted_by_its_weights() -> None:
    got = receipt(GUIDE)
    assert got.compute_shares == {"int8": 1.0}
    assert got.gflops == round(2 * 131072 * 16 * 28 * 28 / 1e9, 3)
    assert got.byte_shares == {"int8": 1.0}


@pytest.mark.parametrize(
    ("text", "type"),
    [
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Row major linear FP32", "fp32"),
        ("Row major linear UInt8 format", "uint8"),
        ("Row major Int8 format", "int8"),
        ("N/A due to dynamic shapes", "unknown"),
    ],
)
def test_types_of_tensors(text: str, type: str) -> None:  # noqa: A002
    old = {"Name": "pool", "LayerType": "CaskPooling", "Inputs": [], "Outputs": [tensor(text, 1, 2, 3)]}
    new = {**old, "Outputs": [tensor(text, 1, 2, 3, key="DataType") | {"Format": "kLINEAR"}]}
    first = {**old, "Outputs": [tensor(text, 1, 2, 3, key="Format")]}
    for layer in (old, new, first, {**old, "Inputs": old["Outputs"], "Outputs": []}):
        assert receipt(layer).layer_shares == {type: 1.0}


def test_a_layer_without_weights_is_of_the_type_that_it_writes() -> None:
    cast = {"Name": "c", "LayerType": "kgen", "Inputs": [tensor("Float", 8, 4)], "Outputs": [tensor("Half", 8, 4)]}
    assert receipt(cast).layer_shares == {"fp16": 1.0}


def test_fused_products_have_their_weights_as_second_input() -> None:
    conv = {
        "Name": "__myl_Conv",
        "LayerType": "conv",
        "Inputs": [tensor("Half", -1, 64, 8, 8), tensor("Half", 32, 64, 3, 3)],
        "Outputs": [tensor("Half", -1, 32, 8, 8)],
    }
    assert receipt(conv, batch=4).gflops == round(2 * 32 * 64 * 9 * 4 * 64 / 1e9, 3)


@pytest.mark.parametrize("second", [(-1, 4096, 64), (32,)], ids=["what a layer gave", "a bias"])
def test_what_is_no_matrix_of_weights_is_not_multiplied_by(second: tuple[int, ...]) -> None:
    inputs = [tensor("Half", -1, 8, 64), tensor("Half", *second)]
    product = {"Name": "p", "LayerType": "gemm", "Inputs": inputs, "Outputs": [tensor("Half", -1, 8, 8)]}
    assert (receipt(product).gflops, receipt(product).compute_shares) == (0, {})


def test_dynamic_dimensions_are_the_tuned_batch() -> None:
    layer = {**GUIDE, "Outputs": [tensor("Int8", -1, 256, 28, 28)]}
    assert receipt(layer, batch=16).gflops == receipt(GUIDE).gflops


def test_layers_that_move_data_do_not_count() -> None:
    reformat = {
        "Name": "Reformatting CopyNode for Input Tensor 0",
        "LayerType": "Reformat",
        "Inputs": [],
        "Outputs": [],
    }
    assert receipt(GUIDE, reformat).layers == 1


def test_a_copy_for_a_foreign_node_is_not_the_node() -> None:
    """Its name has the node's: the compiler's on the GPU, of which nothing is on the DLA."""
    node = "{ForeignNode[conv0...fc]}"
    copy = {"Name": f"Reformatting CopyNode for Input Tensor 0 to {node}", "LayerType": "Reformat", "Inputs": [],
            "Outputs": [tensor("Float", 8, 4)]}  # fmt: skip
    got = receipt(copy, {"Name": node, "LayerType": "Myelin", "Inputs": [], "Outputs": [tensor("Half", 8, 4)]})
    assert (got.dla_layers, got.layer_shares, got.byte_shares) == (0, {"fp16": 1.0}, {"fp16": 1.0})


def test_bytes_count_where_compute_cannot_be_estimated() -> None:
    layer = {"Name": "kgen", "LayerType": "kgen", "Inputs": [tensor("Half", 8, 4)], "Outputs": [tensor("Half", 8, 4)]}
    got = receipt(layer)
    assert got.compute_shares == {}
    check_receipt(got, "fp16", dla=False)
    with pytest.raises(ExportError, match=r"only 0% of the engine's bytes is fp32 .*100% fp16"):
        check_receipt(got, "fp32", dla=False)


def test_shares_are_of_the_work_the_largest_first() -> None:
    def mixed(int8: int) -> Any:
        return receipt(
            *({**GUIDE, "Weights": {"Type": t, "Count": n}} for t, n in (("Half", 100 - int8), ("Int8", int8)))
        )

    assert list(mixed(70).compute_shares.items()) == [("int8", 0.7), ("fp16", 0.3)]
    assert mixed(70).layer_shares == {"fp16": 0.5, "int8": 0.5}
    check_receipt(mixed(70), "int8", dla=False)
    with pytest.raises(ExportError, match="only 69% of the engine's compute is int8"):
        check_receipt(mixed(69), "int8", dla=False)


@pytest.mark.parametrize(("precision", "types"), [("fp32", ("Float", "Half")), ("fp16", ("Half", "Float"))])
def test_in_floating_point_a_tenth_may_be_in_another_type(precision: str, types: tuple[str, str]) -> None:
    def mixed(other: int) -> Any:
        return receipt(
            *({**GUIDE, "Weights": {"Type": t, "Count": n}} for t, n in zip(types, (100 - other, other), strict=True))
        )

    check_receipt(mixed(10), precision, dla=False)
    with pytest.raises(ExportError, match=f"only 89% of the engine's compute is {precision}"):
        check_receipt(mixed(11), precision, dla=False)


def test_bytes_are_those_that_are_read_and_written_each_once() -> None:
    """A fused product's weights are among its inputs."""
    inputs = [tensor("Half", 8, 4), tensor("Half", 4, 6)]
    product = {"Name": "p", "LayerType": "gemm", "Inputs": inputs, "Outputs": [tensor("Half", 8, 6)]}
    same = {"Name": "s", "LayerType": "kgen", "Inputs": [], "Outputs": [tensor("Float", 1, (32 + 24 + 48) // 2)]}
    assert receipt(product, same).byte_shares == {"fp16": 0.5, "fp32": 0.5}
    apart = {"Name": "s", "LayerType": "conv", "Weights": {"Type": "Float", "Count": 52}, "Inputs": [], "Outputs": []}
    assert receipt(product, apart).byte_shares == {"fp16": 0.5, "fp32": 0.5}


@pytest.mark.parametrize(("kind", "layers"), [("DLA", 1), ("", 1), ("Myelin", 0)])
def test_a_foreign_node_is_the_dlas_unless_the_compiler_made_it(kind: str, layers: int) -> None:
    node = {"Name": "{ForeignNode[conv0...fc]}", "LayerType": kind, "Inputs": [], "Outputs": [tensor("Half", 8, 4)]}
    assert receipt(node).dla_layers == layers


def test_every_convolution_that_the_dla_takes_must_be_there() -> None:
    there, head = GUIDE | {"LayerType": "DLA"}, GUIDE | {"Weights": {"Type": "Float", "Count": 4096}}
    pool = {"Name": "pool", "LayerType": "CaskPooling", "Inputs": [], "Outputs": [tensor("Int8", 8, 4)]}
    check_receipt(receipt(there, head, pool), "int8", dla=True)
    with pytest.raises(ExportError, match="1 fp16 and int8 convolutions fell back to the GPU and 1 layers are on"):
        check_receipt(receipt(there, GUIDE, head), "int8", dla=True)
    with pytest.raises(ExportError, match="0 layers are on the DLA"):
        check_receipt(receipt(head), "int8", dla=True)


def test_nothing_to_count_is_no_proof() -> None:
    with pytest.raises(ExportError, match="nothing that can be counted"):
        check_receipt(receipt({"Name": "x", "LayerType": "kgen"}), "fp16", dla=False)


@pytest.mark.parametrize(
    ("text", "match"),
    [("", "no JSON"), ("[]", "no layer with details"), ("{}", "no layer"), ('{"Layers": ["conv"]}', "no layer")],
)
def test_inspector_that_says_nothing(text: str, match: str) -> None:
    with pytest.raises(ExportError, match=match):
        receipt_from_inspector(text, 8)
