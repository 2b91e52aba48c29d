"""distill: nearer to the float model's outputs on the same grid, from the rounding that it was given."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.calibration.substitutes import training_batches
from qcompiler.core import DataError, OptionError
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linears
from qcompiler.graph.run import Runner
from qcompiler.graph.weights import grid_of, rounded_weight
from qcompiler.numerics.grids import Grid
from qcompiler.passes import parse_pipeline
from qcompiler.passes.base import Context
from qcompiler.passes.distill import Distill, inside
from tests.passes.blocks import apply, batches, block, context

SCHEME = "w4a16{group_size=16}"


def inserted(scheme: str = SCHEME, passes: str = "annotate,insert") -> tuple[ir.Model, Context]:
    model, ctx = block(), dataclasses.replace(context(scheme), data=batches(8))
    for item in parse_pipeline(passes):
        apply(item, model, ctx, batches(8))
    return model, ctx


def integers(model: ir.Model) -> dict[str, np.ndarray]:
    return {x.name: grid_of(x.weight_quant).nearest(array_of(x.weight)) for x in linears(model)}


@given(st.integers(0, 10**6), st.integers(2, 8), st.booleans())
def test_starts_are_rounded_to_what_stands_there_and_lie_near_the_weight(seed: int, bits: int, groups: bool) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((24, 5)).astype(np.float32)
    scale = rng.uniform(0.05, 0.3, (3, 5) if groups else 5).astype(np.float32)
    zero_point = rng.integers(0, 1 << bits, scale.shape)
    grid = Grid(0, (1 << bits) - 1, 8 if groups else None, scale, zero_point)
    q = np.clip(grid.nearest(weight) + rng.integers(-1, 2, weight.shape), grid.low, grid.high)
    start = inside(weight, q, grid)
    np.testing.assert_array_equal(grid.nearest(start), q)
    same = q == grid.nearest(weight)
    step = np.broadcast_to(grid.spread(24)[0], weight.shape)
    assert np.all(np.abs(start - weight)[same] <= 0.051 * step[same])


@pytest.mark.parametrize("scheme", ["bf16", "fp16", "nf4"])
def test_where_nothing_is_rounded_to_integers_nothing_is_learned(scheme: str) -> None:
    model, ctx = inserted(scheme)
    ctx.distill = lambda *_: pytest.fail("there is nothing to train")
    result = Distill().run(model, {}, ctx)
    assert not result.changed
    assert [note.why for note in result.notes] == ["no weight is rounded to integers"]


def test_what_is_learned_is_rounded_and_what_stood_there_was_the_start() -> None:
    """A stand-in for training moves every weight up by one step of its grid; the pass rounds what it gets back."""
    model, ctx = inserted()
    before = integers(model)
    seen: dict[str, Any] = {}

    def up(_: ir.Model, student: ir.Model, rates: dict[str, float], feeds: Any, steps: int) -> dict[str, np.ndarray]:
        seen.update(rates=rates, steps=steps, feeds=len(list(feeds)), start=integers(student))
        starts = {name: array_of(student.graph.initializers[name]) for name in rates}
        return {name: start + np.float32(_steps(student, name)) for name, start in starts.items()}

    ctx.distill = up
    notes = Distill(steps=7, rate=0.01).run(model, {}, ctx).notes
    assert seen["steps"] == seen["feeds"] == 7
    assert len(seen["rates"]) == len(before) == len(notes)
    for name, q in integers(model).items():
        np.testing.assert_array_equal(seen["start"][name], before[name])
        np.testing.assert_array_equal(q, np.minimum(before[name] + 1, 7))
    for linear in linears(model):
        assert seen["rates"][linear.weight.name] == pytest.approx(0.01 * _steps(model, linear.weight.name).mean())


def _steps(model: ir.Model, name: str) -> np.ndarray:
    linear = next(linear for linear in linears(model) if linear.weight.name == name)
    grid = grid_of(linear.weight_quant)
    return np.broadcast_to(grid.spread(len(array_of(linear.weight)))[0], array_of(linear.weight).shape)


def test_outputs_come_nearer_and_the_float_model_stays() -> None:
    pytest.importorskip("torch")
    from qcompiler.training.distill import distill

    model, ctx = inserted()
    reference = [array_of(linear.weight).copy() for linear in linears(ctx.float_model)]
    ctx.distill = lambda *how: distill(*how, progress=False)
    before = noise(model, ctx)
    result = Distill(steps=200, rate=0.01).run(model, {}, ctx)
    assert result.changed
    assert noise(model, ctx) < 0.8 * before
    for linear, old in zip(linears(ctx.float_model), reference, strict=True):
        np.testing.assert_array_equal(array_of(linear.weight), old)
    for linear in linears(model):  # the very numbers that fold makes integers of
        np.testing.assert_array_equal(array_of(linear.weight), rounded_weight(linear))


def noise(model: ir.Model, ctx: Context) -> float:
    """Squared error of the outputs on inputs that nothing was learned from."""
    assert ctx.float_model is not None
    exact, rounded = Runner(ctx.float_model, threads=1), Runner(model, threads=1)
    pairs = [(exact(feeds)[name], rounded(feeds)[name]) for feeds in batches(8, seed=77) for name in ("y", "logits")]
    return sum(float(np.square(want - got).sum()) for want, got in pairs)


def test_few_samples_are_joined_by_text_and_without_it_are_mostly_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, float]] = []

    def watched(model: ir.Model, data: list[Any], real: float, seed: int) -> Any:
        asked.append((len(data), real))
        return training_batches(model, data, real, seed)

    monkeypatch.setattr("qcompiler.passes.distill.training_batches", watched)
    for samples, text in ((1, 0), (1, 3), (40, 3)):
        model, ctx = inserted(SCHEME)
        ctx.data, general = batches(samples), batches(text) if text else []
        ctx.text = lambda general=general: general
        ctx.distill = lambda teacher, student, rates, feeds, steps: {
            name: array_of(student.graph.initializers[name]) for name in rates
        }
        Distill(steps=1).run(model, {}, ctx)
    assert asked == [(1, 0.25), (4, 0.7), (40, 0.7)]


def test_the_same_seed_learns_the_same() -> None:
    pytest.importorskip("torch")
    from qcompiler.training.distill import distill

    found = []
    for _ in range(2):
        model, ctx = inserted()
        ctx.distill = lambda *how: distill(*how, progress=False)
        Distill(steps=10, rate=0.02).run(model, {}, ctx)
        found.append(integers(model))
    for name, q in found[0].items():
        np.testing.assert_array_equal(q, found[1][name])


def test_it_needs_data_and_fake_quants() -> None:
    model, ctx = inserted()
    with pytest.raises(DataError, match="give calibration data"):
        Distill().run(model, {}, dataclasses.replace(ctx, data=None))
    with pytest.raises(OptionError, match="after 'insert'"):
        Distill().run(model, {}, dataclasses.replace(ctx, float_model=None, distill=lambda *how: {}))


@pytest.mark.parametrize(("option", "value"), [("steps", 0), ("rate", 0.0), ("rate", 2.0), ("real", -0.1)])
def test_bad_options_are_refused_in_a_sentence(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"distill{{{option}={value}}}"):
        Distill(**{option: value})
