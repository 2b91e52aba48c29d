"""smooth is the identity in float, lowers the error where channels stick out, and leaves alone what gains nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linear_named
from qcompiler.passes import make_pass
from qcompiler.passes.judging import decision
from qcompiler.passes.smooth import Smooth
from qcompiler.presets import PRESETS
from tests.graph.tiny import tiny
from tests.passes.blocks import WIDTH, apply, batches, block, context, error, outputs, quantize

FOLDS = {"h": ("q0", "k"), "up0": ("down0",)}
INSERTIONS = {"p": ("up0",), "n": ("post", "logits0")}
FORCED = Smooth(alpha=0.5)


@pytest.mark.parametrize("item", [FORCED, Smooth(alpha=1.0, floor=0), Smooth()], ids=["0.5", "1", "searched"])
def test_float_outputs_stay(item: Smooth) -> None:
    model = block(outliers=30)
    before = outputs(model)
    result = apply(item, model, context())
    assert result.changed
    after = outputs(model)
    for name, reference in before.items():
        assert 0 < np.abs(after[name] - reference).max() <= 1e-5 * np.abs(reference).max()
    assert {plan.source: plan.sinks for plan in result.plans if plan.kind == "fold"} == FOLDS
    assert {plan.source: plan.sinks for plan in result.plans if plan.kind == "insert"} == INSERTIONS
    assert all(plan.proof < 1e-6 and plan.shift is None for plan in result.plans)


def test_the_scale_moves_from_the_norm_into_its_readers() -> None:
    """Equation 3 of SmoothQuant, at one fold: diag(s)^-1 in the norm, diag(s) in the weights."""
    model = block(outliers=30)
    old = block(outliers=30)
    plans = apply(FORCED, model, context()).plans
    scale = next(plan.scale for plan in plans if plan.source == "h")
    assert scale.shape == (WIDTH,)
    assert scale[[3, 17]].min() > 3 * np.delete(scale, [3, 17]).max()  # the channels that stick out
    for name, by in (("gain", 1 / scale), ("b", 1 / scale), ("wq", scale[:, None]), ("wk", scale[:, None])):
        expected = array_of(old.graph.initializers[name]) * by
        np.testing.assert_allclose(array_of(model.graph.initializers[name]), expected, rtol=1e-5)
    np.testing.assert_array_equal(*(array_of(m.graph.initializers["bq"]) for m in (old, model)))


@pytest.mark.parametrize("scheme", ["w8a8-o3", "w8a8-dynamic"])
def test_outlier_channels_cost_less(scheme: str) -> None:
    """Measured on data that calibration did not see, with all folds and insertions and all rounding in place."""
    reference = outputs(block(outliers=100))
    plain, smoothed = block(outliers=100), block(outliers=100)
    quantize(plain, context(scheme))
    quantize(smoothed, context(scheme), Smooth())
    needed = 4 if scheme == "w8a8-o3" else 1.5  # a per-token scale has less to lose
    for name, exact in reference.items():
        assert error(exact, outputs(smoothed)[name]) * needed < error(exact, outputs(plain)[name])


def test_what_gains_nothing_is_left_alone() -> None:
    model = block(outliers=1)
    before = {name: array_of(value).copy() for name, value in model.graph.initializers.items()}
    result = apply(Smooth(fold_gain=1.5, insert_gain=1.5), model, context("w8a8-o3"))
    assert not result.changed
    assert result.plans == ()
    assert {note.node for note in result.notes} == {*FOLDS, *INSERTIONS}
    assert all(note.what == "not transformed" and "no gain worth it: error" in note.why for note in result.notes)
    for name, array in before.items():
        np.testing.assert_array_equal(array_of(model.graph.initializers[name]), array)


def test_an_inserted_scale_must_gain_more_than_a_folded_one() -> None:
    """At p and n little is won here, at h (a fold) as little, at up0 a factor of 1.3."""
    plans = apply(Smooth(), block(outliers=1), context("w8a8-o3")).plans
    assert [(plan.kind, plan.source) for plan in plans] == [("fold", "h"), ("fold", "up0")]
    eager = apply(Smooth(insert_gain=1.0), block(outliers=1), context("w8a8-o3")).plans
    assert {plan.source for plan in eager} > {"up0"}
    assert {plan.kind for plan in eager} == {"fold", "insert"}


def test_folds_only() -> None:
    model = block(outliers=30)
    result = apply(Smooth(smooth_all_linears=False), model, context())
    assert {plan.source: plan.sinks for plan in result.plans} == FOLDS
    assert {note.node: note.why for note in result.notes if note.what == "not transformed"}.keys() == set(INSERTIONS)
    assert [node.op_type for node in model.graph] == [node.op_type for node in block().graph]


def test_ignored_linears_neither_ask_for_a_scale_nor_stop_the_others() -> None:
    model = block(outliers=30)
    before = outputs(model)
    result = apply(FORCED, model, context(ignore=("p*", "up*", "down*")))
    assert {plan.source: plan.sinks for plan in result.plans} == {"h": ("q0", "k"), "n": ("logits0",)}
    assert linear_named(model, "post").x.name == "n"  # it goes on reading what it read
    assert linear_named(model, "logits0").x.name != "n"
    for name, reference in before.items():
        assert np.abs(outputs(model)[name] - reference).max() <= 1e-5 * np.abs(reference).max()


def test_a_fold_reaches_all_readers_or_none() -> None:
    """q is ignored, yet it reads the norm that the scale for k comes from."""
    model = block(outliers=30)
    before = outputs(model)
    apply(FORCED, model, context(ignore=("q0",)))
    for name, reference in before.items():
        assert np.abs(outputs(model)[name] - reference).max() <= 1e-5 * np.abs(reference).max()


def test_head_left_in_float_is_no_sink() -> None:
    scheme = dataclasses.replace(PRESETS["w8a8"], head=False)
    plans = apply(FORCED, block(outliers=30), context(scheme)).plans
    assert [plan.sinks for plan in plans if plan.source == "n"] == [("post",)]


def test_weights_alone_want_no_smoothing() -> None:
    scheme = dataclasses.replace(PRESETS["w8a8"], activation=None, fallback=None)
    assert Smooth().wants(block(), context(scheme)) == []
    result = Smooth().run(block(), {}, context(scheme))
    assert (result.changed, result.plans, result.notes) == (False, (), ())


def test_layers_that_share_weights_stay_one_layer() -> None:
    """One norm and one Linear called twice (ALBERT): a scale that fits both, one copy of the weights."""
    text = f"""g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) {{
        h = LayerNormalization(x, gain, b)  m = MatMul(h, w)  t = Add(x, m)
        h2 = LayerNormalization(t, gain, b)  m2 = MatMul(h2, w)  y = Add(t, m2)
    }}"""
    rng = np.random.default_rng(0)
    gain = np.where(np.arange(WIDTH) == 4, 60, 1).astype(np.float32)
    model = tiny(text, {"gain": gain, "b": [WIDTH], "w": rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)})
    before = outputs(model)["y"]
    result = apply(Smooth(), model, context("w8a8-o3"))
    first, second = (linear_named(model, name) for name in ("m", "m2"))
    assert len(result.plans) == 2
    np.testing.assert_array_equal(result.plans[0].scale, result.plans[1].scale)
    assert first.weight is second.weight
    assert np.abs(outputs(model)["y"] - before).max() <= 1e-5 * np.abs(before).max()


def test_notes_tell_what_was_done_and_what_it_gained() -> None:
    result = apply(Smooth(), block(outliers=30), context("w8a8-o3"))
    notes = {note.node: note for note in result.notes}
    for plan in result.plans:
        note = notes[plan.source]
        assert note.what.startswith("smooth alpha=")
        assert plan.why == f"{note.what}: {note.why}"
        old, new = (float(part) for part in note.why.split("(")[0].removeprefix("error").split("->"))
        assert new < old


def test_what_it_decides_is_left_for_annotate() -> None:
    model = block(outliers=30)
    plans = apply(Smooth(), model, context("w8a8-o3")).plans
    for name in {sink for plan in plans for sink in plan.sinks}:
        spec, _ = decision(linear_named(model, name))
        assert (spec.dtype, spec.dynamic) == ("uint8", False)


def test_same_data_and_seed_same_folds() -> None:
    first, second = (apply(Smooth(rows=64), block(outliers=30), context(seed=5)).plans for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.scale, b.scale)


def test_spelled_options() -> None:
    item = make_pass("smooth", {"alpha": "0.5", "smooth_all_linears": "false", "rows": "64", "floor": "0"})
    assert item == Smooth(alpha=0.5, smooth_all_linears=False, rows=64, floor=0.0)
    assert make_pass("smooth", {"alpha": "none"}) == Smooth()
    assert item.float_exact


def test_it_judges_on_one_row_sample_of_each_input() -> None:
    requests = Smooth(rows=64).wants(block(), context())
    assert {request.value for request in requests} == {"h", "p", "r", "n"}
    assert {request.observer for request in requests} == {"folds{count=64}"}


def test_too_little_data_still_gives_a_right_model() -> None:
    model = block(outliers=30)
    before = outputs(model)
    one_row = [{"x": batches()[0]["x"][:1, :1]}]
    apply(FORCED, model, context(), one_row)
    for name, reference in before.items():
        assert np.abs(outputs(model)[name] - reference).max() <= 1e-5 * np.abs(reference).max()
