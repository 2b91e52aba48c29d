"""insert simulates exactly what annotate said: the right grid, one fake-quant for all readers, and nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.core import StatRequest
from qcompiler.graph import canonical
from qcompiler.graph.edit import array_of
from qcompiler.graph.functions import FAKE_QUANT, is_call
from qcompiler.graph.linear import linear_named, linears
from qcompiler.graph.run import Runner
from qcompiler.numerics.affine import (
    dequantize_weight,
    fake_quantize,
    fake_quantize_dynamic,
    quantize_weight,
    scale_zero_point,
)
from qcompiler.passes.annotate import Annotate
from qcompiler.passes.insert import Insert
from qcompiler.passes.judging import leave_decision
from qcompiler.presets import PRESETS
from tests.graph.tiny import tiny
from tests.passes.blocks import LINEARS, WIDTH, apply, batches, block, context, error, outputs, quantize

STATIC = PRESETS["w8a8-o3"].activation
WEIGHT = PRESETS["w8a8-o3"].weight


def calls(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if is_call(node, *FAKE_QUANT)]


def test_static_range_is_that_of_the_data() -> None:
    model = block()
    halved = dataclasses.replace(STATIC, observer="minmax{margin=0.5}")
    scheme = dataclasses.replace(PRESETS["w8a8-o3"], activation=halved)
    quantize(model, context(scheme))
    quant = linear_named(model, "q0").activation_quant
    assert quant.op_type == "FakeQuant"
    runner = Runner(block(), ["h"], threads=1)
    h = np.concatenate([runner(feeds)["h"] for feeds in batches()])
    scale, zero_point = scale_zero_point(h.min() * np.float32(0.5), h.max() * np.float32(0.5), STATIC)
    got_scale, got_zero_point = (array_of(value) for value in quant.inputs[1:])
    assert (got_scale.shape, got_zero_point.shape) == ((), ())
    assert got_zero_point.dtype == np.uint8
    np.testing.assert_array_equal(got_scale, scale)
    np.testing.assert_array_equal(got_zero_point, zero_point)


@pytest.mark.parametrize("reduce_range", [False, True])
def test_weights_are_rounded_on_the_grid_of_each_output_channel(reduce_range: bool) -> None:
    model = block()
    quantize(model, context("w8a8-o3", reduce_range=reduce_range))
    for linear in linears(model):
        weight, scale, zero_point = (array_of(value) for value in linear.weight_quant.inputs)
        _, expected = quantize_weight(weight, WEIGHT, reduce_range)
        assert linear.weight_quant.attributes.get_int("axis") == 1
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
        np.testing.assert_array_equal(scale, expected)
        steps = np.abs(weight).max(0) / scale
        np.testing.assert_allclose(steps, 64 if reduce_range else 127, rtol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "function"),
    [("w8a8-o1", "FakeQuantPerToken"), ("w8a8-o2", "FakeQuantPerTensor"), ("w8a8-o3", "FakeQuant")],
)
def test_what_a_linear_computes_is_the_formula(scheme: str, function: str) -> None:
    """x and output are tapped from the running graph; the quantized value in between is bit for bit numerics' own."""
    model = block()
    quantize(model, context(scheme))
    canonical.check(model)
    linear = linear_named(model, "post")
    quant = linear.activation_quant
    assert quant.op_type == function
    got = outputs(model, taps=["n", quant.outputs[0].name, linear.weight_quant.outputs[0].name, "post"])
    activation = PRESETS[scheme].activation
    if activation.dynamic:
        batched = np.split(got["n"], 2)  # a per-tensor scale is that of one run
        expected = np.concatenate([fake_quantize_dynamic(x.reshape(-1, WIDTH), activation) for x in batched])
        expected = expected.reshape(got["n"].shape)
    else:
        expected = fake_quantize(got["n"], *(array_of(value) for value in quant.inputs[1:]))
    quantized = got[quant.outputs[0].name]
    if scheme == "w8a8-o2":  # DynamicQuantizeLinear rounds its scale in another order: ties
        np.testing.assert_allclose(quantized, expected, atol=np.ptp(got["n"]) / 254)
    else:
        np.testing.assert_array_equal(quantized, expected)
    integers, scale = quantize_weight(array_of(linear.weight), WEIGHT)
    y = quantized.astype(np.float64) @ dequantize_weight(integers, scale, WEIGHT)
    np.testing.assert_allclose(got["post"], y, rtol=1e-4, atol=1e-5)


def test_readers_of_one_value_share_one_fake_quant() -> None:
    model = block()
    quantize(model, context("w8a8-o3"))
    assert linear_named(model, "q0").activation_quant is linear_named(model, "k").activation_quant
    assert linear_named(model, "post").activation_quant is linear_named(model, "logits0").activation_quant
    assert len(calls(model)) == len(LINEARS) + 4  # six weights; h, p, r and n


def test_readers_with_other_specs_have_their_own() -> None:
    model = block()
    apply(Annotate(), model, context("w8a8-o2"))
    leave_decision([linear_named(model, "k")], PRESETS["w8a8-o1"].activation, "")
    apply(Insert(), model, context("w8a8-o2"))
    canonical.check(model)
    found = {name: linear_named(model, name).activation_quant.op_type for name in ("q0", "k")}
    assert found == {"q0": "FakeQuantPerTensor", "k": "FakeQuantPerToken"}
    assert error(outputs(block())["y"], outputs(model)["y"]) < 1e-2


def test_two_static_specs_of_one_value() -> None:
    model = block()
    apply(Annotate(), model, context("w8a8-o3"))
    leave_decision([linear_named(model, "k")], dataclasses.replace(STATIC, observer="minmax{margin=3}"), "")
    apply(Insert(), model, context("w8a8-o3"))
    scales = [float(array_of(linear_named(model, name).activation_quant.inputs[1])) for name in ("q0", "k")]
    assert scales[1] > 1.4 * scales[0]
    assert error(outputs(block())["y"], outputs(model)["y"]) < 1e-2


def test_the_residual_reads_the_unquantized_value() -> None:
    model = block()
    quantize(model, context("w8a8-o3"))
    add = next(node for node in model.graph if node.name == "y")
    assert [value.name for value in add.inputs] == ["post", "n"]


def test_only_what_was_annotated_and_only_once() -> None:
    model = block()
    ctx = context("w8a8-o3", ignore=("post", "up0"))
    quantize(model, ctx)
    for name in ("post", "up0"):
        linear = linear_named(model, name)
        assert (linear.activation_quant, linear.weight_quant) == (None, None)
    assert linear_named(model, "logits0").activation_quant is not None
    before = len(model.graph)
    assert not apply(Insert(), model, ctx).changed
    assert len(model.graph) == before
    assert not apply(Insert(), block(), ctx).changed  # nothing was annotated


def test_weights_alone() -> None:
    model = block()
    quantize(model, context(dataclasses.replace(PRESETS["w8a8"], activation=None, fallback=None)))
    assert {node.op_type for node in calls(model)} == {"FakeQuant"}
    assert len(calls(model)) == len(LINEARS)
    assert all(linear.activation_quant is None for linear in linears(model))
    assert 0 < error(outputs(block())["y"], outputs(model)["y"]) < 1e-4


def test_shared_weights_stay_shared() -> None:
    text = f"""g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y)
        {{ m = MatMul(x, w)  r = Relu(m)  y = MatMul(r, w) }}"""
    model = tiny(text, {"w": np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)})
    quantize(model, context("w8a8-o3"))
    first, second = linears(model)
    assert first.weight is second.weight
    assert first.weight_quant is second.weight_quant
    canonical.check(model)


def test_static_scales_are_asked_for_and_dynamic_ones_not() -> None:
    model = block()
    apply(Annotate(), model, context("w8a8-o3"))
    leave_decision([linear_named(model, "up0")], PRESETS["w8a8-o1"].activation, "")
    requests = Insert().wants(model, context("w8a8-o3"))
    assert {request.value for request in requests} == {"h", "r", "n"}
    assert all(request.axis is None and request.observer.startswith("minmax") for request in requests)
    spec = dataclasses.replace(STATIC, observer="mse")
    leave_decision([linear_named(model, "down0")], spec, "")
    assert StatRequest("r", "mse") in Insert().wants(model, context("w8a8-o3"))


@pytest.mark.parametrize("observer", ["percentile{percent=99}", "kl", "mse", "ema", "moving"])
def test_every_observer_of_ranges_gives_a_scale(observer: str) -> None:
    model = block()
    scheme = dataclasses.replace(PRESETS["w8a8-o3"], activation=dataclasses.replace(STATIC, observer=observer))
    quantize(model, context(scheme))
    assert error(outputs(block())["y"], outputs(model)["y"]) < 1e-2


def test_accuracy_follows_the_level() -> None:
    """O1 is finer than O2, and O2 than O3, where rows differ in size."""
    reference = outputs(block())["y"]
    errors = []
    for scheme in ("w8a8-o1", "w8a8-o2", "w8a8-o3"):
        model = block()
        quantize(model, context(scheme))
        errors.append(error(reference, outputs(model)["y"]))
    assert errors[0] < errors[1]
    assert errors[0] < errors[2] < 1e-2
