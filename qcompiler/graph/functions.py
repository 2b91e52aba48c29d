"""The model-local functions of domain ``qcompiler``: what ONNX at opset 21 has no one operator for.

Their bodies are standard operators, so that a model at any stage of the pipeline runs in ONNX Runtime, which inlines
them. Lowering replaces or inlines them all.

Norms and attention (raised by ``normalise``):

- ``RMSNorm(x, weight) {epsilon}``: x / sqrt(mean(x², -1) + epsilon) · weight.
- ``RotaryEmbedding(x, cos, sin)``: x·cos + rotate_half(x)·sin on the last axis; x [B, H, S, D].
- ``Attention(q, k, v) {scale}`` and ``MaskedAttention(q, k, v, mask) {scale}``: softmax(scale · q kᵀ + mask) v;
  q [B, H, S, D], k, v [B, H, T, D], mask float and additive, broadcast to [B, H, S, T]. Rows of the softmax sum to 1,
  or are 0 where a row is masked throughout.

Mixture of experts (raised by ``normalise``):

- ``SortByExpert(ids) {experts}`` -> order, inverse, counts: ids int64 [rows], the expert of each row; order [rows], the
  rows of expert 0 in their order, then those of expert 1 …; inverse [rows] undoes it; counts [experts], rows of each.

Fake-quant (placed by ``insert``) and what ``fold`` leaves of a weight that is no integer: ``fake_quant.py``.
"""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir

from qcompiler.core import DOMAIN
from qcompiler.graph import fake_quant
from qcompiler.graph.edit import insert_node

OPSET = 21

_BODIES = {
    "RMSNorm": """<epsilon>(x, weight) => (y) {
        square = Mul(x, x)
        axes = Constant<value_ints: ints = [-1]>()
        mean = ReduceMean<keepdims: int = 1>(square, axes)
        eps = Constant<value_float: float = @epsilon>()
        eps_like = CastLike(eps, x)
        shifted = Add(mean, eps_like)
        root = Sqrt(shifted)
        normed = Div(x, root)
        y = Mul(normed, weight)
    }""",
    "RotaryEmbedding": """(x, cos, sin) => (y) {
        a, b = Split<axis: int = -1, num_outputs: int = 2>(x)
        minus_b = Neg(b)
        rotated = Concat<axis: int = -1>(minus_b, a)
        x_cos = Mul(x, cos)
        r_sin = Mul(rotated, sin)
        y = Add(x_cos, r_sin)
    }""",
    "Attention": """<scale>(q, k, v) => (y) {
        k_t = Transpose<perm: ints = [0, 1, 3, 2]>(k)
        product = MatMul(q, k_t)
        factor = Constant<value_float: float = @scale>()
        factor_like = CastLike(factor, q)
        scores = Mul(product, factor_like)
        p = Softmax<axis: int = -1>(scores)
        y = MatMul(p, v)
    }""",
    "MaskedAttention": """<scale>(q, k, v, mask) => (y) {
        k_t = Transpose<perm: ints = [0, 1, 3, 2]>(k)
        product = MatMul(q, k_t)
        factor = Constant<value_float: float = @scale>()
        factor_like = CastLike(factor, q)
        scaled = Mul(product, factor_like)
        scores = Add(scaled, mask)
        soft = Softmax<axis: int = -1>(scores)
        nan = IsNaN(soft)
        zero = Constant<value_float: float = 0.0>()
        zero_like = CastLike(zero, q)
        p = Where(nan, zero_like, soft)
        y = MatMul(p, v)
    }""",
    "SortByExpert": """<experts>(ids) => (order, inverse, counts) {
        rows = Shape(ids)
        sorted, order = TopK<axis: int = 0, largest: int = 0>(ids, rows)
        places, inverse = TopK<axis: int = 0, largest: int = 0>(order, rows)
        zero = Constant<value_int: int = 0>()
        one = Constant<value_int: int = 1>()
        end = Constant<value_int: int = @experts>()
        numbers = Range(zero, end, one)
        axes = Constant<value_ints: ints = [-1]>()
        column = Unsqueeze(ids, axes)
        equal = Equal(column, numbers)
        chosen = Cast<to: int = 7>(equal)
        first = Constant<value_ints: ints = [0]>()
        counts = ReduceSum<keepdims: int = 0>(chosen, first)
    }""",
    **fake_quant.BODIES,
}

NAMES = frozenset(_BODIES)
FAKE_QUANT = frozenset(name for name in _BODIES if name.startswith("FakeQuant"))
WEIGHT_QUANT = ("FakeQuant", "FakeQuantBlocks", "FakeQuantCodebook", "FakeQuantFloat")
WEIGHT_FOLDED = ("DequantizeCodebook", "DequantizeFloat")
"""Beside the standard DequantizeLinear."""


def ensure_function(model: ir.Model, name: str) -> None:
    """Register the function of that name in the model, with the opset import its calls need."""
    key = (DOMAIN, name, "")
    if key not in model.functions:
        text = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n{name} {_BODIES[name]}'
        model.functions[key] = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    model.graph.opset_imports.setdefault(DOMAIN, 1)


def insert_call(
    model: ir.Model, before: ir.Node, function: str, inputs: list[ir.Value], name: str, **attributes: int | float
) -> ir.Value:
    """Call a function before a node; its output, of the type and shape of the first input."""
    ensure_function(model, function)
    node = insert_node(
        model.graph, before, function, inputs, domain=DOMAIN, attributes=attributes, name=name, like=inputs[0]
    )
    return node.outputs[0]


def is_call(node: ir.Node | None, *names: str) -> bool:
    """Whether the node calls one of these functions of ours (any of them, if no name is given)."""
    return node is not None and node.domain == DOMAIN and (node.op_type in names or not names)


def zero_point_of_rows(call: ir.Node) -> float:
    """The zero point of a FakeQuantPerToken call."""
    attribute = call.attributes.get("zero_point")
    return attribute.as_float() if attribute is not None else 128.0


def inline_functions(model: ir.Model) -> None:
    """Replace every call of our functions by its body and drop the functions: plain standard ONNX remains."""
    from onnx_ir.passes import common

    common.InlinePass()(model)
    model.graph.opset_imports.pop(DOMAIN, None)
