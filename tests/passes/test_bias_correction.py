"""bias_correction: output channels get their mean back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration import collect
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linear_named, linears
from qcompiler.graph.run import Runner
from qcompiler.passes.annotate import Annotate
from qcompiler.passes.base import Context, PassResult
from qcompiler.passes.bias_correction import BiasCorrection, held_out
from qcompiler.passes.gptq import Gptq
from qcompiler.passes.insert import Insert
from tests.graph.tiny import tiny
from tests.passes.blocks import context

IN, OUT = 24, 8
Data = list[dict[str, np.ndarray]]


def skewed(count: int, seed: int) -> Data:
    """Most numbers are exactly between two steps of the static scale, so that rounding moves the mean."""
    rng = np.random.default_rng(seed)
    x = [np.where(rng.random((8, 16, IN)) < 0.7, 0.3, rng.uniform(0, 255, (8, 16, IN))) for _ in range(count)]
    for array in x:
        array[0, 0, :2] = 0, 255
    return [{"x": array.astype(np.float32)} for array in x]


def model_of(bias: bool) -> ir.Model:
    rng = np.random.default_rng(0)
    body = "y0 = MatMul(x, w)  y = Add(y0, b)" if bias else "y = MatMul(x, w)"
    weights = {"w": rng.standard_normal((IN, OUT)).astype(np.float32)}
    if bias:
        weights["b"] = rng.standard_normal(OUT).astype(np.float32)
    return tiny(f"g (float[B,S,{IN}] x) => (float[B,S,{OUT}] y) {{ {body} }}", weights)


def run_all(model: ir.Model, ctx: Context, data: Data, *items: object) -> PassResult:
    for item in (Annotate(), Insert(), *items):
        result = item.run(model, collect(model, data, item.wants(model, ctx), progress=False), ctx)
    return result


def shift(model: ir.Model, ctx: Context) -> np.ndarray:
    """How far the mean of each output channel is off, on new data."""
    assert ctx.float_model is not None
    feeds = skewed(4, seed=9)
    reference, quantized = Runner(ctx.float_model), Runner(model)
    return np.mean([(quantized(f)["y"] - reference(f)["y"]).mean((0, 1)) for f in feeds], axis=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", ["w8a8-o1", "w8a8-o3"])
def test_means_come_back_on_new_data(bias: bool, scheme: str) -> None:
    ctx, plain, corrected = context(scheme), model_of(bias), model_of(bias)
    run_all(plain, ctx, skewed(4, 0))
    before = shift(plain, ctx)
    result = run_all(corrected, ctx, skewed(4, 0), BiasCorrection())
    assert [note.what for note in result.notes] == ["bias corrected"]
    after = shift(corrected, ctx)
    assert np.abs(after).max() < 0.3 * np.abs(before).max()
    assert linears(corrected)[0].bias is not None
    assert corrected.graph.outputs[0].name == "y"


def test_after_gptq_the_mean_is_that_of_the_float_weights() -> None:
    ctx, model = context("w8a8-o1"), model_of(bias=True)
    run_all(model, ctx, skewed(4, 0), Gptq(damp=0.01), BiasCorrection())
    quantized = model_of(bias=True)
    run_all(quantized, context("w8a8-o1"), skewed(4, 0), Gptq(damp=0.01))
    assert np.abs(shift(model, ctx)).max() < 0.5 * np.abs(shift(quantized, ctx)).max()


def test_the_bias_of_another_linear_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    text = f"""g (float[B,S,{IN}] x) => (float[B,S,{OUT}] y, float[B,S,{OUT}] z) {{
        y0 = MatMul(x, w)  y = Add(y0, b)  z0 = MatMul(x, v)  z = Add(z0, b)
    }}"""
    weights = {name: rng.standard_normal((IN, OUT)).astype(np.float32) for name in ("w", "v")}
    model = tiny(text, {**weights, "b": np.zeros(OUT, np.float32)})
    ctx = context("w8a8-o3", ignore=["z0"])
    run_all(model, ctx, skewed(4, 0), BiasCorrection())
    assert array_of(linear_named(model, "y0").bias).any()
    assert not array_of(linear_named(model, "z0").bias).any()


def test_a_correction_that_does_not_carry_over_is_not_made() -> None:
    rows = np.array([10, 10, 20])
    steady = np.array([[1.0, 0.0], [1.1, 0.0], [0.9, 0.1]])
    before, after = held_out(steady, rows)
    assert after < 0.1 * before
    before, after = held_out(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), rows)
    assert after > before
    assert held_out(steady[:1], rows[:1]) == (1.0, 0.0)
    expected = np.array([1.0, 0.0]) - (10 * steady[1] + 20 * steady[2]) / 30
    alone = held_out(np.array([steady[0], (10 * steady[1] + 20 * steady[2]) / 30]), np.array([1, 1]))[1]
    np.testing.assert_allclose(alone, (expected**2).sum())


def test_random_shifts_leave_the_bias() -> None:
    ctx, model = context("w8a8-o3"), model_of(bias=True)
    run_all(model, ctx, skewed(4, 0))
    item = BiasCorrection()
    stats = collect(model, skewed(4, 0), item.wants(model, ctx), progress=False)
    for request, means in stats.items():
        signs = np.array([1, -1, 1, -1])[:, None] * (1 if request.value == "x" else -1)
        object.__setattr__(means, "mean", signs * np.ones_like(means.mean))
    bias = array_of(linears(model)[0].bias).copy()
    result = item.run(model, stats, ctx)
    assert not result.changed
    np.testing.assert_array_equal(array_of(linears(model)[0].bias), bias)
