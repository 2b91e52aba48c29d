from __future__ import annotations

import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

from qcompiler.core import DOMAIN, ModelError
from qcompiler.graph.canonical import check
from qcompiler.graph.functions import ensure_function
from tests.graph.rules.spelling import normal


def _model(body: str, opset: int = 21) -> ir.Model:
    """w [8, 5], b [5], b2 [1, 5] are initializers."""
    text = f'<ir_version: 10, opset_import: ["": {opset}, "qcompiler": 1]>\n{body}'
    proto = onnx.parser.parse_model(text)
    for name, shape in {"w": (8, 5), "wt": (5, 8), "b": (5,), "b2": (1, 5), "n": (8,)}.items():
        if name in body:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(*shape), name))
    model = ir.from_proto(proto)
    for node in model.graph:
        node.name = node.outputs[0].name
        if node.domain == DOMAIN and node.op_type in ("RMSNorm", "Attention"):
            ensure_function(model, node.op_type)
    return model


GOOD = """g (float[B, 8] x) => (float[B, 5] y) { h = qcompiler.RMSNorm<epsilon = 1e-5>(x, n) m = MatMul(h, w)
    y = Add(m, b) }"""


def test_a_canonical_graph_passes() -> None:
    check(_model(GOOD))


BAD = {
    "reads 'h'": "g (float[B, 8] x) => (float[B, 5] y) { y = MatMul(h, w) h = Abs(x) }",
    "'y' is a Gemm": "g (float[B, 8] x) => (float[B, 5] y) { y = Gemm(x, w) }",
    "weight of node 'y' is a Constant node": """g (float[B, 2] x) => (float[B, 2] y) {
        c = Constant<value = float[2, 2] {1, 2, 3, 4}>() y = MatMul(x, c) }""",
    "weight of node 'y' comes through a Transpose": """g (float[B, 8] x) => (float[B, 5] y) { t = Transpose(wt)
        y = MatMul(x, t) }""",
    r"bias of Linear 'm' has shape \[1, 5\]": """g (float[B, 8] x) => (float[B, 5] y) { m = MatMul(x, w)
        y = Add(m, b2) }""",
    "node 'h' calls qcompiler::Frobnicate": """g (float[B, 8] x) => (float[B, 8] y) { h = qcompiler.Frobnicate(x)
        y = Abs(h) }""",
    "node 'y' calls RMSNorm without epsilon": "g (float[B, 8] x) => (float[B, 8] y) { y = qcompiler.RMSNorm(x, n) }",
    "node 'y' calls RMSNorm with 1 inputs instead of 2": """g (float[B, 8] x) => (float[B, 8] y) {
        y = qcompiler.RMSNorm<epsilon = 1e-5>(x) }""",
    "node 'y' calls MaskedAttention, which the model does not define": "g (float[B, 8] x) => (float[B, 8] y) { y = "
    "qcompiler.MaskedAttention<scale = 1.0>(x, x, x, x) }",
}


@pytest.mark.parametrize("problem", BAD)
def test_each_property_is_checked_and_the_node_named(problem: str) -> None:
    body = BAD[problem]
    if problem.startswith("reads"):  # the parser sorts nothing: build the right order, then swap
        model = _model("g (float[B, 8] x) => (float[B, 5] y) { h = Abs(x) y = MatMul(h, w) }")
        first, second = model.graph
        model.graph.remove(first)
        model.graph.insert_after(second, first)
    else:
        model = _model(body)
    with pytest.raises(ModelError, match=problem):
        check(model)


def test_another_opset_is_not_canonical() -> None:
    with pytest.raises(ModelError, match="imports opset 20 instead of 21"):
        check(_model(GOOD, opset=20))


def test_foreign_functions_are_not_canonical() -> None:
    model = _model(GOOD)
    function = onnx.parser.parse_function('<domain: "acme", opset_import: ["": 21]> f (x) => (y) { y = Abs(x) }')
    model.functions["acme", "f", ""] = ir.from_proto(function)
    with pytest.raises(ModelError, match="acme::f is none of ours"):
        check(model)


def test_names_are_unique() -> None:
    two = "g (float[B, 8] x) => (float[B, 5] y) { a = MatMul(x, w) c = MatMul(x, w) y = Add(a, c) }"
    model = _model(two)
    nodes = list(model.graph)
    nodes[1].name = nodes[0].name
    with pytest.raises(ModelError, match="two nodes are named 'a'"):
        check(model)
    model = _model(two)
    list(model.graph)[1].outputs[0].name = "a"
    with pytest.raises(ModelError, match="'a' is used twice"):
        check(model)
    model = _model(two)
    list(model.graph)[1].name = None
    with pytest.raises(ModelError, match="computes 'c' has no name"):
        check(model)


def test_an_initializer_without_numbers_is_refused() -> None:
    model = _model(GOOD)
    model.graph.initializers["w"].const_value = None
    with pytest.raises(ModelError, match="initializer 'w' has no tensor"):
        check(model)
