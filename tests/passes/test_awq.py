"""awq is the identity in float, gives loud channels finer steps, folds v into o, and serves weight-only schemes."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.core import OptionError
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linear_named, linears
from qcompiler.graph.run import Runner
from qcompiler.passes import make_pass
from qcompiler.passes.awq import Awq
from qcompiler.passes.clip_weights import ClipWeights
from qcompiler.passes.judging import decision
from tests.graph.tiny import tiny
from tests.passes.blocks import WIDTH, apply, batches, block, context, error, outputs, quantize

SCHEMES = ["w4a16", "w2a16{group_size=16}", "w4a8{symmetric=false}"]
FOLDS = {"h": ("q0", "k"), "up0": ("down0",)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("item", [Awq(alpha=0.5), Awq(alpha=1.0, floor=1.0), Awq()], ids=str)
def test_float_outputs_stay(item: Awq, scheme: str) -> None:
    model = block(outliers=30)
    before = outputs(model)
    result = apply(item, model, context(scheme))
    assert result.changed
    assert FOLDS.items() >= {plan.source: plan.sinks for plan in result.plans if plan.kind == "fold"}.items()
    assert all(plan.proof < 1e-6 and plan.shift is None for plan in result.plans)
    for name, reference in before.items():
        assert 0 < np.abs(outputs(model)[name] - reference).max() <= 1e-5 * np.abs(reference).max()


@pytest.mark.parametrize("scheme", SCHEMES[:2])
def test_loud_channels_cost_less(scheme: str) -> None:
    """The geometric mean over six models, on data that calibration did not see, with all rounding in place."""
    logs = []
    for seed in range(6):
        plain, scaled = block(outliers=30, seed=seed), block(outliers=30, seed=seed)
        reference = outputs(plain)
        quantize(plain, context(scheme))
        quantize(scaled, context(scheme), Awq(rows=128))
        for name, exact in reference.items():
            logs.append(np.log(error(exact, outputs(scaled)[name]) / error(exact, outputs(plain)[name])))
    assert np.exp(np.mean(logs)) < 0.75


def test_the_scale_is_the_papers() -> None:
    """s = mean|x|^alpha over the calibration data, out of the norm and into its readers."""
    model, old = block(outliers=30), block(outliers=30)
    plan = next(plan for plan in apply(Awq(alpha=0.5), model, context("w4a16")).plans if plan.source == "h")
    runner = Runner(old, ["h"], threads=1)
    mean = np.mean([np.abs(runner(feeds)["h"]).mean((0, 1)) for feeds in batches()], axis=0)
    np.testing.assert_allclose(plan.scale / plan.scale[0], (mean / mean[0]) ** 0.5, rtol=0.05)  # of 288 rows, all kept
    for name, by in (("gain", 1 / plan.scale), ("wq", plan.scale[:, None]), ("wk", plan.scale[:, None])):
        expected = array_of(old.graph.initializers[name]) * by
        np.testing.assert_allclose(array_of(model.graph.initializers[name]), expected, rtol=1e-5)


@pytest.mark.parametrize("through", ["a gate", "attention"])
def test_v_absorbs_the_scale_of_o_and_up_that_of_down(through: str) -> None:
    rng = np.random.default_rng(0)
    loud = np.where(np.arange(WIDTH) % 8 == 3, 20, 1)
    weights = {name: rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5 for name in ("wg", "wu", "wd")}
    weights["wu"] *= loud
    between = {
        "a gate": "open = Sigmoid(gate)  m = Mul(open, up)",
        "attention": "t = Transpose<perm: ints = [0, 2, 1]>(x)  s = MatMul(gate, t)  p = Softmax(s)  m = MatMul(p, up)",
    }[through]
    text = f"""g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) {{
        gate = MatMul(x, wg)  up = MatMul(x, wu)  {between}  y = MatMul(m, wd)
    }}"""
    model = tiny(text, {name: array.astype(np.float32) for name, array in weights.items()})
    before = outputs(model)["y"]
    plans = apply(Awq(scale_all_linears=False), model, context("w4a16")).plans
    assert [(plan.kind, plan.source, plan.sinks) for plan in plans] == [("fold", "up", ("y",))]
    assert np.abs(outputs(model)["y"] - before).max() <= 1e-5 * np.abs(before).max()


def test_what_gains_nothing_is_left_alone() -> None:
    model = block(outliers=1)
    before = {name: array_of(value).copy() for name, value in model.graph.initializers.items()}
    result = apply(Awq(fold_gain=3, insert_gain=3), model, context("w4a16"))
    assert not result.changed
    assert all(note.what == "not transformed" and "(float inputs)" in note.why for note in result.notes)
    for name, array in before.items():
        np.testing.assert_array_equal(array_of(model.graph.initializers[name]), array)


def test_inputs_are_decided_only_where_the_scheme_quantizes_them() -> None:
    for scheme, decided in (("w4a16", False), ("w4a8", True)):
        model = block(outliers=30)
        apply(Awq(), model, context(scheme))
        assert {decision(linear) is not None for linear in linears(model)} == {decided}


def test_ignored_linears_are_no_sinks() -> None:
    model = block(outliers=30)
    apply(Awq(alpha=0.5), model, context("w4a16", ignore=("p*", "up*", "down*")))
    assert linear_named(model, "post").x.name == "n"  # it goes on reading what it read
    assert linear_named(model, "logits0").x.name != "n"


def test_same_data_and_seed_same_folds() -> None:
    first, second = (apply(Awq(rows=64), block(outliers=30), context("w4a16", seed=5)).plans for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.scale, b.scale)


def test_clip_weights_follows_it() -> None:
    reference = outputs(block(outliers=30))
    errors = []
    for clips in ((), (ClipWeights(),)):
        model, ctx = block(outliers=30), context("w4a16")
        quantize(model, ctx, Awq())
        for item in clips:
            apply(item, model, ctx)
        errors.append(sum(error(exact, outputs(model)[name]) for name, exact in reference.items()))
    assert errors[1] < errors[0]


def test_spelled_options() -> None:
    assert make_pass("awq", {"alpha": "0.5", "scale_all_linears": "false"}) == Awq(alpha=0.5, scale_all_linears=False)
    with pytest.raises(OptionError, match="from 0 to 1"):
        make_pass("awq", {"alpha": "2"})
