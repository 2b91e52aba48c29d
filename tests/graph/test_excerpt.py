"""Linears taken out of a model, worked on, and put back: the same as when they are worked on in place."""

from __future__ import annotations

import numpy as np

from qcompiler.capability import Capability
from qcompiler.graph.canonical import check
from qcompiler.graph.excerpt import excerpt, put_back
from qcompiler.graph.linear import linears
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.run import Runner
from qcompiler.passes.annotate import Annotate
from qcompiler.passes.base import Context, Pass
from qcompiler.passes.fold import Fold
from qcompiler.passes.insert import Insert
from qcompiler.presets import resolve
from tests.graph.tiny import tiny
from tests.passes.blocks import HELD_OUT, block


def run(model, *passes: Pass) -> None:  # type: ignore[no-untyped-def]
    for item in passes:
        item.run(model, {}, Context(resolve("w4a16{group_size=16}"), Capability("test", ())))


def test_an_excerpt_computes_the_products_alone() -> None:
    model = block()
    canonicalise(model)
    chosen = linears(model)[:2]
    part = excerpt(model, chosen)
    check(part)
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    got = Runner(part)({"wq/x": x, "wk/x": 2 * x})
    weights = [linear.weight.const_value.numpy() for linear in chosen if linear.weight.const_value is not None]
    assert np.allclose(got["wq/y"], x @ weights[0], atol=1e-5)
    assert np.allclose(got["wk/y"], 2 * x @ weights[1], atol=1e-5)


def test_put_back_is_as_good_as_in_place() -> None:
    whole, parted = block(), block()
    for model in (whole, parted):
        canonicalise(model)
        run(model, Annotate())
    run(whole, Insert(), Fold())
    for linear in linears(parted):
        part = excerpt(parted, [linear])
        run(part, Insert(), Fold())
        put_back(part, parted)
    run(parted, Insert(), Fold())
    check(parted)
    a, b = ([value.name for value in m.graph.initializers.values()] for m in (whole, parted))
    assert sorted(map(str, a)) == sorted(map(str, b))
    for feeds in HELD_OUT:
        want, got = Runner(whole)(feeds), Runner(parted)(feeds)
        assert all(np.array_equal(want[name], got[name]) for name in want)


def test_linears_of_one_weight_share_it_again() -> None:
    text = """g (float[N,32] x) => (float[N,32] y) {
        h = MatMul(x, w)
        a = Relu(h)
        y = MatMul(a, w)
    }"""
    model = tiny(text, {"w": np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)})
    canonicalise(model)
    run(model, Annotate())
    part = excerpt(model, linears(model))
    assert len(part.graph.initializers) == 1
    run(part, Insert(), Fold())
    put_back(part, model)
    first, second = linears(model)
    assert first.matmul.inputs[1] is second.matmul.inputs[1]
    check(model)
