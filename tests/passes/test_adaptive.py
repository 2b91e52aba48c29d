"""adaptive is the identity in float, and takes at each site what suits it, on inputs of the quantized model."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration import collect
from qcompiler.graph.edit import array_of, write_input
from qcompiler.graph.linear import linears
from qcompiler.passes import make_pass
from qcompiler.passes.adaptive import Adaptive
from qcompiler.passes.base import Context
from qcompiler.passes.judging import decision
from qcompiler.presets import PRESETS
from tests.graph.tiny import tiny
from tests.passes.blocks import LINEARS, WIDTH, apply, batches, block, error, outputs, quantize
from tests.passes.blocks import context as plain_context


def context(scheme: object = "w8a8-o3") -> Context:
    """A context that can run other models, as the pipeline gives it."""
    ctx = plain_context(scheme)  # type: ignore[arg-type]
    ctx.collect = lambda model, requests: collect(model, batches(), requests, progress=False)
    return ctx


def mixed() -> ir.Model:
    """Outlier channels at one norm, channels off centre at the other."""
    model = block(outliers=40)
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    write_input(norms[1], 1, np.ones(WIDTH, np.float32))
    write_input(norms[1], 2, np.where(np.arange(WIDTH) % 2, 20, -20).astype(np.float32))
    return model


@pytest.mark.parametrize("rounds", [1, 3, 100])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-o3", "w8a8-dynamic"])
def test_float_outputs_stay(rounds: int, scheme: str) -> None:
    model = mixed()
    before = outputs(model)
    result = apply(Adaptive(rounds=rounds, shift_all_linears=True), model, context(scheme))
    assert result.changed
    for name, after in outputs(model).items():
        assert 0 < np.abs(after - before[name]).max() <= 1e-5 * np.abs(before[name]).max()
    assert {name for name in LINEARS if decision(next(x for x in linears(model) if x.name == name))} == set(LINEARS)


def test_each_site_gets_what_suits_it() -> None:
    result = apply(Adaptive(shift_all_linears=True), mixed(), context())
    plans = {plan.source: plan for plan in result.plans}
    assert plans["h"].shift is None or plans["h"].why.startswith("shift")
    assert plans["h"].scale[[3, 17]].min() > 3 * np.delete(plans["h"].scale, [3, 17]).max()
    np.testing.assert_allclose(plans["n"].shift, np.where(np.arange(WIDTH) % 2, 20, -20), atol=3)


def test_it_beats_each_transform_alone() -> None:
    """On data that calibration did not see; the odds are on its side, for it may choose either."""
    reference = outputs(mixed())
    errors = {}
    for name, item in (
        ("smooth", make_pass("smooth", {})),
        ("shift", make_pass("shift", {"shift_all_linears": "true"})),
        ("adaptive", Adaptive(shift_all_linears=True)),
    ):
        model = mixed()
        quantize(model, context(), item)
        errors[name] = sum(error(exact, outputs(model)[out]) for out, exact in reference.items())
    assert errors["adaptive"] * 1.2 < min(errors["smooth"], errors["shift"])


def test_later_sites_are_judged_on_what_the_quantized_model_gives_them() -> None:
    """The first weight is so coarse that next to nothing is left of its output: the second Linear reads other rows."""
    text = f"g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) {{ h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }}"
    rng = np.random.default_rng(0)
    matrices = {name: rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) for name in "wv"}
    coarse = dataclasses.replace(PRESETS["w8a8-o3"].weight, granularity="per_tensor")
    scheme = dataclasses.replace(PRESETS["w8a8-o3"], weight=coarse)
    matrices["w"][0, 0] = 1e3  # in one scale with the rest of w
    told = {}
    for rounds in (1, 2):
        result = apply(Adaptive(rounds=rounds, smooth_all_linears=False), tiny(text, matrices), context(scheme))
        told[rounds] = [float(note.why.split("-> ")[1].split()[0]) for note in result.notes]
    assert told[1][0] == told[2][0]
    assert told[1][1] != told[2][1]


def test_weights_alone_want_nothing() -> None:
    scheme = dataclasses.replace(PRESETS["w8a8"], activation=None, fallback=None)
    assert Adaptive().wants(block(), context(scheme)) == []
    assert not Adaptive().run(block(), {}, context(scheme)).changed


def test_same_data_and_seed_same_result() -> None:
    first, second = (mixed() for _ in range(2))
    for model in (first, second):
        apply(Adaptive(), model, context())
    assert first.graph.initializers.keys() == second.graph.initializers.keys()
    for name, value in first.graph.initializers.items():
        np.testing.assert_array_equal(array_of(value), array_of(second.graph.initializers[name]))
