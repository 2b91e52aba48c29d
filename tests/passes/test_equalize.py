"""equalize: exact in float, and kept where it lowers the error of per-tensor weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linear_named
from qcompiler.passes.base import Context
from qcompiler.passes.equalize import Equalize
from qcompiler.presets import PRESETS
from tests.graph.tiny import tiny
from tests.passes.blocks import apply, batches, context, error, outputs, quantize

WIDTH = 32


def per_tensor() -> Context:
    """What the paper is for: one scale for a whole weight."""
    preset = PRESETS["w8a8-o3"]
    weight = dataclasses.replace(preset.weight, granularity="per_tensor")
    return context(dataclasses.replace(preset, weight=weight))


def perceptron(activation: str = "Relu", uneven: float = 30.0) -> ir.Model:
    """Two Linears; some channels between them are large in the first weight and small in the second."""
    rng = np.random.default_rng(0)
    factors = np.where(np.arange(WIDTH) % 5 == 0, uneven, 1.0)
    weights = {
        "w1": rng.standard_normal((WIDTH, WIDTH)) * factors,
        "b1": rng.standard_normal(WIDTH) * factors,
        "w2": rng.standard_normal((WIDTH, WIDTH)) / factors[:, None],
    }
    text = f"""g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) {{
        a0 = MatMul(x, w1)  a = Add(a0, b1)  h = {activation}(a)  y = MatMul(h, w2)
    }}"""
    return tiny(text, {name: array.astype(np.float32) for name, array in weights.items()})


def test_uneven_channels_are_evened_out() -> None:
    ctx, model, plain = per_tensor(), perceptron(), perceptron()
    reference = outputs(model)["y"]
    result = apply(Equalize(), model, ctx)
    assert [note.what for note in result.notes] == ["equalized"]
    assert error(reference, outputs(model)["y"]) < 1e-10
    reach = np.abs(array_of(linear_named(model, "a0").weight)).max(0)
    np.testing.assert_allclose(reach, np.abs(array_of(linear_named(model, "y").weight)).max(1), rtol=1e-5)
    quantize(model, ctx)
    quantize(plain, ctx)
    assert error(reference, outputs(model)["y"]) < 0.3 * error(reference, outputs(plain)["y"])
    assert result.plans[0].sinks == ("y",)


def test_even_channels_are_left_alone() -> None:
    model = perceptron(uneven=1.0)
    before = array_of(linear_named(model, "a0").weight).copy()
    result = apply(Equalize(gain=1.5), model, per_tensor())
    assert [note.what for note in result.notes] == ["not equalized"]
    assert not result.changed
    np.testing.assert_array_equal(array_of(linear_named(model, "a0").weight), before)


def test_not_through_gelu_and_not_into_float_linears() -> None:
    ctx = per_tensor()
    assert Equalize().wants(perceptron("Gelu"), ctx) == []
    ignoring = dataclasses.replace(ctx, scheme=dataclasses.replace(ctx.scheme, ignore=("y",)))
    assert apply(Equalize(), perceptron(), ignoring).notes == ()


def test_the_error_is_that_of_both_linears() -> None:
    """The judged error without scaling is what running the quantized graph gives, source plus sink."""
    ctx, model = per_tensor(), perceptron()
    taps = ("a0", "y")
    reference = outputs(model, taps)
    why = apply(Equalize(), perceptron(), ctx, batches(4)).notes[0].why
    quantize(model, ctx)
    got = outputs(model, taps)
    told = float(why.split()[1])
    real = error(reference["a0"], got["a0"]) + error(reference["y"], got["y"])
    assert 0.3 * real < told < 3 * real
