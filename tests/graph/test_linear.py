"""The Linear view sees what is a Linear, and nothing else, at every stage of the pipeline."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.linear import as_linear, linear_named, linears
from tests.graph.tiny import tiny
from tests.graphs_int8 import K, N, float_mlp, quantized_mlp


def only(body: str, weights: dict[str, list[int] | np.ndarray]) -> ir.Model:
    return tiny(f"g (float[B,S,4] x) => (float[B,S,Z] y) {{ {body} }}", weights)


def test_float() -> None:
    first, second = linears(float_mlp())
    assert (first.name, second.name) == ("fc1", "fc2")
    assert (first.in_features, first.out_features) == (K, N)
    assert (first.x.name, first.weight.name, first.bias.name) == ("x", "fc1.weight", "fc1.bias")
    assert (first.output.name, second.output.name) == ("h1", "y")
    assert (first.activation_quant, first.weight_quant) == (None, None)


@pytest.mark.parametrize("activation", ["FakeQuant", "FakeQuantPerToken", "FakeQuantPerTensor"])
def test_quantized_and_folded(activation: str) -> None:
    model = quantized_mlp(activation)
    first, second = linears(model)
    assert (first.x.name, second.x.name) == ("x", "h2")  # what stands before the fake-quant
    assert (first.weight.name, first.weight.dtype) == ("fc1.weight_quantized", ir.DataType.INT8)
    assert (first.in_features, first.out_features) == (K, N)
    assert first.activation_quant.op_type == activation
    assert first.weight_quant.op_type == "DequantizeLinear"
    assert linear_named(model, "fc2").matmul is second.matmul


def test_fake_quantized_weight() -> None:
    model = only("f = qcompiler.FakeQuant<axis = 1>(w, s, z)  y = MatMul(x, f)", {"w": [4, 3], "s": [3], "z": [3]})
    (linear,) = linears(model)
    assert (linear.weight.name, linear.weight_quant.op_type, linear.bias) == ("w", "FakeQuant", None)


def test_bias_on_either_side_and_behind_a_dequantize() -> None:
    for add in ("Add(m, b)", "Add(b, m)"):
        (linear,) = linears(only(f"m = MatMul(x, w)  y = {add}", {"w": [4, 3], "b": [3]}))
        assert (linear.bias.name, linear.output.name) == ("b", "y")
    integers = {"w": [4, 3], "b": np.arange(3, dtype=np.int32), "s": [3]}
    (linear,) = linears(only("m = MatMul(x, w)  d = DequantizeLinear<axis = 0>(b, s)  y = Add(m, d)", integers))
    assert (linear.bias.name, linear.output.name) == ("d", "y")


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("m = MatMul(x, w)  r = Relu(m)  y = Add(m, b)", {"w": [4, 3], "b": [3]}),  # read by another too
        ("m = MatMul(x, w)  y = Add(m, b)", {"w": [4, 3], "b": [1]}),  # one number for all features
        ("m = MatMul(x, w)  y = Add(m, x)", {"w": [4, 4]}),  # computed
        ("m = MatMul(x, w)  y = Sub(m, b)", {"w": [4, 3], "b": [3]}),
    ],
)
def test_what_is_no_bias(body: str, weights: dict[str, list[int]]) -> None:
    (linear,) = linears(only(body, weights))
    assert (linear.bias, linear.add, linear.output.name) == (None, None, "m")


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("y = MatMul(x, x)", {}),  # computed on both sides, as in attention
        ("y = MatMul(w, x)", {"w": [5, 5]}),  # the constant is on the left
        ("y = MatMul(x, w)", {"w": [2, 4, 3]}),  # a stack of matrices
        ("y = MatMul(x, w)", {"w": [4]}),
        ("a = Abs(w)  y = MatMul(x, a)", {"w": [4, 3]}),
    ],
)
def test_what_is_no_linear(body: str, weights: dict[str, list[int]]) -> None:
    assert linears(only(body, weights)) == []


def test_other_domains_and_unknown_names() -> None:
    model = float_mlp()
    node = linears(model)[0].matmul
    node.domain = "com.example"
    assert as_linear(node) is None
    with pytest.raises(KeyError):
        linear_named(model, "fc1")
