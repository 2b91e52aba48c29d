"""fold changes how numbers are stored and not one bit of what they are."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.core import OptionError
from qcompiler.graph import canonical
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linear_named, linears
from qcompiler.graph.run import Runner
from qcompiler.graph.weights import BITS, folded_grid, rounded_weight
from qcompiler.numerics.affine import quantize_weight
from qcompiler.passes import make_pass
from qcompiler.passes.fold import Fold
from qcompiler.presets import PRESETS
from tests.graph.tiny import tiny
from tests.passes.blocks import LINEARS, WIDTH, apply, block, context, error, outputs, quantize

WEIGHTS_ALONE = dataclasses.replace(PRESETS["w8a8"], activation=None, fallback=None)


def inserted(scheme: str = "w8a8-o3", **options: object) -> ir.Model:
    model = block()
    quantize(model, context(scheme, **options))
    return model


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-o1", "w8a8-o2", "w8a8-o3"])
def test_outputs_are_those_of_insert_bit_for_bit(scheme: str) -> None:
    model = inserted(scheme)
    before = outputs(model)
    assert apply(Fold(), model, context(scheme)).changed
    canonical.check(model)
    for name, array in outputs(model).items():
        np.testing.assert_array_equal(array, before[name])


@settings(max_examples=40, deadline=None)
@given(
    weight=hnp.arrays(np.float32, (4, 3), elements=st.floats(-(2.0**40), 2.0**40, width=32)),
    reduce_range=st.booleans(),
)
def test_dequantized_integers_are_the_fake_quantized_weight(weight: np.ndarray, reduce_range: bool) -> None:
    """The identity times the weight shows it; dead columns, huge and tiny numbers included."""
    model = tiny("g (float[B,4] x) => (float[B,3] y) { y = MatMul(x, w) }", {"w": weight})
    ctx = context(WEIGHTS_ALONE, reduce_range=reduce_range)
    quantize(model, ctx)
    feeds = {"x": np.eye(4, dtype=np.float32)}
    tap = linears(model)[0].weight_quant.outputs[0].name
    fake = Runner(model, [tap], threads=1)(feeds)[tap]
    apply(Fold(), model, ctx)
    (linear,) = linears(model)
    integers = array_of(linear.weight)
    tap = linear.weight_quant.outputs[0].name
    np.testing.assert_array_equal(Runner(model, [tap], threads=1)(feeds)[tap], fake)
    assert integers.dtype == np.int8
    expected, scale = quantize_weight(weight, WEIGHTS_ALONE.weight, reduce_range)
    np.testing.assert_array_equal(integers, expected)
    np.testing.assert_array_equal(array_of(linear.weight_quant.inputs[1]), scale)


def test_float_weights_are_gone_and_activations_stay() -> None:
    model = inserted()
    apply(Fold(), model, context("w8a8-o3"))
    for linear in linears(model):
        assert linear.weight_quant.op_type == "DequantizeLinear"
        assert linear.weight_quant.attributes.get_int("axis") == 1
        assert linear.weight.dtype == ir.DataType.INT8
        assert linear.activation_quant.op_type == "FakeQuant"
        assert (linear.bias is None) == (linear.name in ("k", "post"))
    big = [v.name for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and len(v.shape) == 2]
    assert big == []


def test_where_a_parameter_came_from_is_kept() -> None:
    model = block()
    model.graph.initializers["wk"].metadata_props.update(
        {"qcompiler.parameter": "k.weight", "qcompiler.map": "transpose"}
    )
    quantize(model, context("w8a8-o3"))
    apply(Fold(), model, context("w8a8-o3"))
    kept = linear_named(model, "k").weight.metadata_props
    assert (kept["qcompiler.parameter"], kept["qcompiler.map"]) == ("k.weight", "transpose")


def test_what_is_not_quantized_is_not_folded() -> None:
    model = inserted(ignore=("up0",))
    apply(Fold(), model, context("w8a8-o3"))
    linear = linear_named(model, "up0")
    assert (linear.weight.dtype, linear.weight_quant) == (ir.DataType.FLOAT, None)
    assert not apply(Fold(), model, context()).changed  # and what is folded is so once
    assert not apply(Fold(), block(), context()).changed


def test_shared_weights_are_stored_once() -> None:
    text = f"""g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y)
        {{ m = MatMul(x, w)  r = Relu(m)  y = MatMul(r, w) }}"""
    model = tiny(text, {"w": np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)})
    quantize(model, context("w8a8-o3"))
    before = outputs(model)["y"]
    apply(Fold(), model, context("w8a8-o3"))
    first, second = linears(model)
    assert first.weight is second.weight
    np.testing.assert_array_equal(outputs(model)["y"], before)


def test_a_float_reader_of_a_shared_weight_keeps_it() -> None:
    """A tied embedding: Gather reads the float table, the head its integers."""
    text = "g (int64[B] ids) => (float[B,8] y) { x = Gather(w, ids)  r = Relu(x)  y = MatMul(r, w) }"
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    model = tiny(text, {"w": weight})
    ctx = context(WEIGHTS_ALONE)
    feeds = {"ids": np.arange(8)}
    quantize(model, ctx)
    before = Runner(model, threads=1)(feeds)["y"]
    apply(Fold(), model, ctx)
    np.testing.assert_array_equal(array_of(model.graph.initializers["w"]), weight)
    np.testing.assert_array_equal(Runner(model, threads=1)(feeds)["y"], before)


def test_int32_biases_have_the_derived_scale() -> None:
    """Jacob et al. 2018, section 2.4: b / (s_x · s_w), rounded; half a step is all that is lost."""
    model = inserted()
    floats = {linear.name: array_of(linear.bias) for linear in linears(model) if linear.bias is not None}
    assert floats.keys() == {"q0", "up0", "down0", "logits0"}
    before = outputs(model)
    apply(Fold(bias="int32"), model, context("w8a8-o3"))
    canonical.check(model)
    for linear in linears(model):
        if linear.name not in floats:
            assert linear.bias is None
            continue
        dequantize = linear.bias.producer()
        integers, scale = (array_of(value) for value in dequantize.inputs)
        assert (dequantize.op_type, integers.dtype) == ("DequantizeLinear", np.int32)
        s_x, s_w = (array_of(quant.inputs[1]) for quant in (linear.activation_quant, linear.weight_quant))
        np.testing.assert_array_equal(scale, s_x * s_w)
        assert np.all(np.abs(integers * scale.astype(np.float64) - floats[linear.name]) <= scale * 0.5001)
    for name, array in outputs(model).items():
        assert 0 < error(before[name], array) < 1e-5


@pytest.mark.parametrize("scheme", ["w8a8-o1", "w8a8-o2"])
def test_biases_of_dynamic_linears_stay_float(scheme: str) -> None:
    """There is no s_x ahead of time."""
    model = inserted(scheme)
    apply(Fold(bias="int32"), model, context(scheme))
    assert {linear.bias.dtype for linear in linears(model) if linear.bias} == {ir.DataType.FLOAT}
    assert not any(linear.bias.producer() for linear in linears(model) if linear.bias)


def test_shared_and_swapped_biases() -> None:
    text = f"""g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) {{
        m = MatMul(x, w)  a = Add(b, m)  r = Relu(a)  n = MatMul(r, v)  y = Add(n, b)
    }}"""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) for name in ("w", "v")}
    model = tiny(text, {**weights, "b": rng.standard_normal(WIDTH).astype(np.float32)})
    quantize(model, context("w8a8-o3"))
    before = outputs(model)["y"]
    apply(Fold(bias="int32"), model, context("w8a8-o3"))
    first, second = (linear.bias.producer().inputs[1] for linear in linears(model))
    assert first is not second  # each has a scale of its own
    assert error(before, outputs(model)["y"]) < 1e-5


def test_spelled_options() -> None:
    assert make_pass("fold", {"bias": "int32"}) == Fold(bias="int32")
    with pytest.raises(OptionError, match=r"unknown bias type 'int16'.*float, int32"):
        make_pass("fold", {"bias": "int16"})


def test_it_wants_no_statistics() -> None:
    assert Fold().wants(block(), context()) == []
    assert len(LINEARS) == len(linears(block()))


@pytest.mark.parametrize(
    ("scheme", "dtype", "bits"),
    [
        ("w4a16", ir.DataType.INT4, 4),
        ("w4a16{symmetric=false,group_size=16}", ir.DataType.UINT4, 4),
        ("w2a16{group_size=none}", ir.DataType.INT4, 2),
        ("w8a16{symmetric=false}", ir.DataType.UINT8, 8),
    ],
)
def test_groups_become_blocked_integers_and_nothing_changes(scheme: str, dtype: ir.DataType, bits: int) -> None:
    ctx, model = context(scheme), block()
    quantize(model, ctx)
    assert {call.op_type for linear in linears(model) if (call := linear.weight_quant)} == {"FakeQuantBlocks"}
    canonical.check(model)
    expected = {linear.name: rounded_weight(linear) for linear in linears(model)}
    before = outputs(model)
    Fold().run(model, {}, ctx)
    canonical.check(model)
    for name, array in outputs(model).items():
        np.testing.assert_allclose(array, before[name], rtol=1e-5, atol=1e-5)
    for linear in linears(model):
        assert linear.weight.dtype == dtype
        assert linear.weight.metadata_props[BITS] == str(bits)
        assert linear.weight_quant is not None
        grid = folded_grid(linear.weight_quant)
        assert grid is not None
        assert grid.high - grid.low == 2**bits - 1
        stored = array_of(linear.weight).astype(np.float32)
        np.testing.assert_array_equal(grid.dequantized(stored), expected[linear.name])
