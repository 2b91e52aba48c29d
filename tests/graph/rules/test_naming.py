from __future__ import annotations

import onnx_ir as ir
import pytest

from qcompiler.graph.linear import linears
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.rules.rewriter import PARAMETER
from tests.graph.rules.spelling import spelled

BODY = "g (float[B, 8] x) => (float[B, 5] y) { m = MatMul(x, w) y = Add(m, b) }"


def _model(weight: str, bias: str, node: str = "", scopes: str | None = None) -> ir.Model:
    model = spelled(BODY, {"w": (8, 5), "b": (5,)})
    model.graph.initializers["w"].name = weight
    model.graph.initializers["b"].name = bias
    matmul = next(iter(model.graph))
    matmul.name = node
    if scopes is not None:
        matmul.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    canonicalise(model)
    return model


@pytest.mark.parametrize(
    ("weight", "bias", "node", "scopes", "name"),
    [
        ("layers.0.fc.weight", "val_3", "/other/MatMul", None, "layers.0.fc"),
        ("0.auto_model.encoder.fc.weight", "val_3", "", None, "0.auto_model.encoder.fc"),
        ("bert/encoder/layer_0/query/kernel:0", "val_3", "", None, "bert/encoder/layer_0/query/kernel:0"),
        ("Attention_0_qkv_weight", "Attention_0_qkv_bias", "", None, "Attention_0_qkv"),
        ("onnx::MatMul_123", "layers.0.fc.bias", "/other/MatMul", None, "layers.0.fc"),
        ("onnx::MatMul_123", "onnx::Add_124", "/layers.0/fc/MatMul", None, "layers.0.fc"),
        ("onnx::MatMul_123", "onnx::Add_124", "/layers.0/fc/MatMul_1", None, "layers.0.fc"),
        ("val_12", "val_13", "node_MatMul_7", "['', 'layers.0', 'layers.0.fc', 'linear']", "layers.0.fc"),
        ("val_12", "val_13", "node_MatMul_7", None, "node_MatMul_7"),
        ("123", "124", "", None, "MatMul_0"),
    ],
)
def test_a_lost_name_is_found_again(weight: str, bias: str, node: str, scopes: str | None, name: str) -> None:
    (linear,) = linears(_model(weight, bias, node, scopes))
    assert linear.name == name
    assert linear.weight.metadata_props[PARAMETER] == weight
    if weight.startswith(("onnx", "val", "123")):
        assert linear.weight.name == f"{name}.weight"


def test_two_linears_of_one_bias_are_not_named_after_it() -> None:
    body = "g (float[B, 8] x) => (float[B, 8] y) { a = MatMul(x, w) c = Add(a, b) d = MatMul(c, v) y = Add(d, b) }"
    model = spelled(body, {"w": (8, 8), "v": (8, 8), "b": (8,)})
    for old, new in (("w", "onnx::MatMul_1"), ("v", "onnx::MatMul_2"), ("b", "first.bias")):
        model.graph.initializers[old].name = new
    for node, name in zip(model.graph, ("/first/MatMul", "/first/Add", "/second/MatMul", "/second/Add"), strict=True):
        node.name = name
    canonicalise(model)
    assert [linear.name for linear in linears(model)] == ["first", "second"]
    assert "first.bias" in model.graph.initializers


def test_nodes_of_the_same_name_are_told_apart() -> None:
    model = spelled("g (float[B, 8] x) => (float[B, 8] y) { a = Abs(x) y = Neg(a) }")
    for node in model.graph:
        node.name = "same"
    canonicalise(model)
    assert [node.name for node in model.graph] == ["same", "same_2"]
