"""clip_weights: one scale for many weights is clipped further than that of a group, and outputs err less."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.core import OptionError
from qcompiler.graph.linear import linear_named
from qcompiler.graph.run import Runner
from qcompiler.graph.weights import grid_of
from qcompiler.passes.clip_weights import ClipWeights
from tests.graph.tiny import tiny
from tests.passes.blocks import apply, context, quantize

INPUTS, OUTPUTS = 600, 8
TEXT = f"g (float[B,S,{INPUTS}] x) => (float[B,S,{OUTPUTS}] a) {{ a = MatMul(x, wa) }}"


@pytest.mark.parametrize(("scheme", "least"), [("w4a16{group_size=none}", 0.5), ("w4a16{group_size=256}", 0.7)])
def test_the_largest_of_many_weights_is_cut_off(scheme: str, least: float) -> None:
    """A few weights twice as large as all others, at inputs that hardly fire."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(-1, 1, (INPUTS, OUTPUTS))
    weight[::100] = 2.0
    data = [{"x": (rng.standard_normal((4, 16, INPUTS)) * np.where(np.arange(INPUTS) % 100, 1, 1e-3)).astype("f4")}]
    model, ctx = tiny(TEXT, {"wa": weight}), context(scheme)
    expected = Runner(model)(data[0])["a"]
    quantize(model, ctx, data=data)
    call = linear_named(model, "a").weight_quant
    assert call is not None
    full, before = grid_of(call).scale, Runner(model)(data[0])["a"]
    assert full is not None
    apply(ClipWeights(), model, ctx, data)
    np.testing.assert_allclose(np.abs(grid_of(call).scale / full).min(), least, atol=0.01)
    errors = [float(np.square(outputs - expected).sum()) for outputs in (before, Runner(model)(data[0])["a"])]
    assert errors[1] < 0.6 * errors[0]


def test_a_range_beyond_the_full_one_is_refused() -> None:
    with pytest.raises(OptionError, match="shortest"):
        ClipWeights(shortest=1.5)
