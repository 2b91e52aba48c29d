"""reorder lowers what rounding by group costs, keeps the outputs in float, and leaves schemes without groups alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.capability import Capability
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.run import Runner
from qcompiler.passes.base import Context, PassResult
from qcompiler.passes.reorder import Reorder
from tests.graph.tiny import Shapes, tiny
from tests.passes.blocks import apply, batches, context, error, quantize

WIDTH, HIDDEN = 32, 128
TEXT = f"""g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) {{
    u0 = MatMul(x, up)  u = Add(u0, ub)  a = Gelu(u)  d = MatMul(a, down)  y = Tanh(d)
}}"""


def canonical(text: str, weights: Shapes) -> ir.Model:
    model = tiny(text, weights)
    canonicalise(model)
    return model


def mlp() -> ir.Model:
    """Hidden units that are read by weights of very different sizes."""
    rng = np.random.default_rng(0)
    down = rng.standard_normal((HIDDEN, WIDTH)) * np.exp(rng.standard_normal((HIDDEN, 1))) / HIDDEN
    return canonical(
        TEXT, {"up": rng.standard_normal((WIDTH, HIDDEN)) / 6, "ub": rng.standard_normal(HIDDEN), "down": down}
    )


def ordered(model: ir.Model, item: Reorder, ctx: Context, data: bool = True) -> PassResult:
    ctx.data = batches() if data else None
    return apply(item, model, ctx, batches() if data else None)


def outputs(model: ir.Model) -> np.ndarray:
    return Runner(model, threads=1)(batches(1, 99)[0])["y"]


@pytest.mark.parametrize(("data", "left"), [(True, 0.75), (False, 0.95)])
def test_rounding_costs_less_and_float_nothing(data: bool, left: float) -> None:
    exact = outputs(mlp())
    plain, model = mlp(), mlp()
    result = ordered(model, Reorder(), context("w4a16"), data)
    assert [note.what for note in result.notes] == ["128 channels ordered"]
    assert [plan.kind for plan in result.plans] == ["reorder"]
    assert error(exact, outputs(model)) < 1e-10
    for each in (plain, model):
        quantize(each, context("w4a16"), data=batches())
    assert error(exact, outputs(model)) < left * error(exact, outputs(plain))


def test_nothing_is_done_without_groups() -> None:
    for scheme in ("w8a8", "w4a16{group_size=none}", "w4a16{group_size=256}"):
        result = ordered(mlp(), Reorder(), context(scheme))
        assert not result.changed
        assert result.notes[0].what == "nothing ordered"


def test_an_order_without_gain_is_not_kept() -> None:
    result = ordered(mlp(), Reorder(gain=100.0), context("w4a16"))
    assert not result.changed
    assert "no gain" in result.notes[0].why


def test_what_is_shown_needs_a_gather_and_may_be_left() -> None:
    text = f"""g (float[B,S,{WIDTH}] x) => (float[B,S,{HIDDEN}] h, float[B,S,{WIDTH}] y) {{
        h = MatMul(x, up)  d = MatMul(h, down)  y = Tanh(d)
    }}"""

    def model() -> ir.Model:
        weights = mlp().graph.initializers
        return canonical(text, {name: weights[name].const_value.numpy() for name in ("up", "down")})

    assert ordered(model(), Reorder(), context("w4a16")).changed
    assert not ordered(model(), Reorder(outputs=False), context("w4a16")).changed
    fixed = context("w4a16")
    fixed.capability = Capability("fixed", fixed.capability.kernels, fixed_graph=True)
    assert not ordered(model(), Reorder(), fixed).changed
