"""hqq needs no data, lowers the weights' loss, keeps what fold and targets rely on."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.core import OptionError
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linear_named, linears
from qcompiler.graph.run import Runner
from qcompiler.graph.weights import grid_of, rounded_weight
from qcompiler.passes import make_pass
from qcompiler.passes.fold import Fold
from qcompiler.passes.hqq import Hqq
from tests.graph.tiny import tiny
from tests.passes.blocks import HELD_OUT, LINEARS, apply, block, context, error, outputs, quantize


@pytest.mark.parametrize(
    "scheme", ["w4a16", "w4a16{symmetric=false}", "w2a16{group_size=16}", "w2a16{group_size=none}", "w4a8"]
)
def test_less_loss_on_every_weight_and_the_same_integers_after_fold(scheme: str) -> None:
    model, ctx = block(), context(scheme)
    quantize(model, ctx)
    weights = {linear.name: array_of(linear.weight) for linear in linears(model)}
    before = {linear.name: rounded_weight(linear) for linear in linears(model)}
    item = Hqq()
    assert item.wants(model, ctx) == []
    result = item.run(model, {}, ctx)
    assert {(note.node, note.what) for note in result.notes} == {(name, "hqq") for name in LINEARS}
    for linear in linears(model):
        weight, old, new = weights[linear.name], before[linear.name], rounded_weight(linear)
        assert (np.abs(weight - new) ** 0.7).sum() < 0.95 * (np.abs(weight - old) ** 0.7).sum()
    expected = Runner(model, threads=1)(HELD_OUT[0])
    Fold().run(model, {}, ctx)
    for name, array in Runner(model, threads=1)(HELD_OUT[0]).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-4)


def test_two_bits_lose_much_less() -> None:
    reference = outputs(block())
    errors = []
    for items in ((), (Hqq(p=2, beta=1),)):
        model, ctx = block(), context("w2a16{group_size=16}")
        quantize(model, ctx)
        for item in items:
            apply(item, model, ctx)
        errors.append(sum(error(exact, outputs(model)[name]) for name, exact in reference.items()))
    assert errors[1] < 0.6 * errors[0]


def test_symmetric_grids_stay_symmetric_and_shared_weights_shared() -> None:
    rng = np.random.default_rng(0)
    text = 'g (float[B,S,24] x) => (float[B,S,8] a, float[B,S,8] b) { a = MatMul(x, "w")  b = MatMul(x, "w") }'
    model, ctx = tiny(text, {"w": rng.standard_normal((24, 8)).astype(np.float32)}), context("w4a16")
    quantize(model, ctx, data=[])
    result = Hqq().run(model, {}, ctx)
    assert [note.node for note in result.notes] == ["a", "b"]
    first, second = (linear_named(model, name) for name in "ab")
    assert first.weight_quant is second.weight_quant
    assert first.weight_quant is not None
    assert not grid_of(first.weight_quant).zero_point.any()


def test_weights_without_groups_are_left_alone() -> None:
    model, ctx = block(), context("w8a8-dynamic")
    quantize(model, ctx)
    assert not Hqq().run(model, {}, ctx).changed


@pytest.mark.parametrize("options", [{"p": "0"}, {"p": "3"}, {"beta": "0"}, {"kappa": "0.5"}, {"iterations": "0"}])
def test_impossible_options_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="p is from 0 to 2"):
        make_pass("hqq", options)
