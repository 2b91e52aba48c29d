"""Integer Linears against numpy's integers, bit by bit where the arithmetic allows it."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.edit import add_initializer, array_of
from qcompiler.graph.linear import linears
from qcompiler.targets.ort.linears import granularity_of, lower_linears
from qcompiler.targets.ort.measure import lowered, one_linear
from tests.targets.ort.graphs import run_optimised, run_plain

SHAPE = (5, 96, 24)


def integer(*_):
    return "MatMulIntegerToFloat"


def activations(outlier=False):
    x = np.random.default_rng(3).standard_normal((1, *SHAPE[:2])).astype(np.float32)
    if outlier:
        x[0, 0] = 0  # a row of zeros
        x[0, 1] *= 1e4
        x[0, 2] *= 1e-4
    return x


def parts(model):
    (linear,) = linears(model)
    weight, scale, _ = (array_of(value).astype(np.float64) for value in linear.weight_quant.inputs)
    return weight, scale, array_of(linear.bias).astype(np.float64)


def test_static_is_the_integer_formula():
    model = one_linear(*SHAPE, "static")
    weight, weight_scale, bias = parts(model)
    x = activations()
    scale, zero_point = np.float32(0.03), 120
    q = np.clip(np.rint(x / scale) + zero_point, 0, 255) - zero_point
    wanted = (q @ weight) * (float(scale) * weight_scale) + bias
    lower_linears(model, integer)
    np.testing.assert_allclose(run_optimised(model, {"x": x}), wanted, rtol=1e-6, atol=1e-6)


def test_per_token_is_the_integer_formula_row_by_row():
    model = one_linear(*SHAPE, "per_token")
    weight, weight_scale, bias = parts(model)
    x = activations(outlier=True)
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    q = np.rint(x / scale).astype(np.float64)
    wanted = (q @ weight) * weight_scale * scale + bias
    lower_linears(model, integer)
    np.testing.assert_allclose(run_optimised(model, {"x": x}), wanted, rtol=1e-6, atol=1e-5)


def test_per_token_integers_are_bit_exact():
    model = one_linear(*SHAPE, "per_token")
    lower_linears(model, integer)
    quantize = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    model.graph.outputs[:] = [quantize.outputs[0]]
    quantize.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    x = activations(outlier=True)
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    np.testing.assert_array_equal(run_optimised(model, {"x": x}), (np.rint(x / scale) + 128).astype(np.uint8))


@pytest.mark.parametrize("granularity", ["static", "per_tensor", "per_token"])
def test_lowered_equals_fake_quant(granularity):
    model = one_linear(*SHAPE, granularity)
    x = {"x": activations()}
    assert granularity_of(linears(model)[0]) == granularity
    before = run_plain(model, x)
    nodes, notes = lower_linears(model, integer)
    assert nodes == {"linear": "linear.integer"}
    assert [note.what for note in notes] == ["MatMulIntegerToFloat"]
    np.testing.assert_allclose(run_optimised(model, x), before, rtol=1e-5, atol=1e-5)


def test_int8_activations_become_uint8_exactly():
    model = one_linear(*SHAPE, "static")
    quant = next(node for node in model.graph if node.op_type == "FakeQuant")
    quant.replace_input_with(2, add_initializer(model.graph, "signed", np.array(-8, np.int8)))  # 120 - 128
    x = {"x": activations()}
    before = run_plain(model, x)
    lower_linears(model, integer)
    quantize = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    assert array_of(quantize.inputs[2]) == np.uint8(120)
    np.testing.assert_allclose(run_optimised(model, x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", ["MatMulNBits.g32", "MatMulNBits.g128"])
def test_block_product_is_at_least_as_exact_as_per_token(kernel):
    x = {"x": activations(outlier=True)}  # 96 inputs: not a multiple of 128, so blocks are padded
    model = one_linear(*SHAPE, "per_token")
    weight, weight_scale, bias = parts(model)
    exact = x["x"].astype(np.float64) @ weight * weight_scale + bias
    per_token = np.abs(run_plain(model, x) - exact).mean()
    blocks = np.abs(run_optimised(lowered(SHAPE, "per_token", kernel), x) - exact).mean()
    assert 0 < blocks <= 1.05 * per_token


def test_weight_only_is_left_with_a_reason():
    model = one_linear(*SHAPE, "static")
    (linear,) = linears(model)
    linear.matmul.replace_input_with(0, linear.x)
    nodes, notes = lower_linears(model, integer)
    assert not nodes
    assert notes[0].node == "linear"
    assert "weight alone" in notes[0].why


def test_several_static_scales_are_left_with_a_reason():
    model = one_linear(*SHAPE, "static")
    quant = next(node for node in model.graph if node.op_type == "FakeQuant")
    quant.replace_input_with(1, add_initializer(model.graph, "many", np.full(SHAPE[1], 0.03, np.float32)))
    nodes, notes = lower_linears(model, integer)
    assert not nodes
    assert "more than one scale" in notes[0].why
