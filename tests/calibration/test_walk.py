"""A walk sees what a whole run sees, and what later weights make of it."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.calibration.walk import Walk
from qcompiler.core import DataError
from qcompiler.graph.edit import array_of, write_input
from qcompiler.graph.experts import projections
from qcompiler.graph.linear import linears
from qcompiler.graph.run import Runner
from tests import mixtures
from tests.passes.blocks import batches, block, context, quantize


def test_every_value_on_the_way_is_the_whole_runs() -> None:
    model, data = block(), batches()
    found = sorted(linears(model), key=lambda linear: [n.name for n in model.graph].index(linear.matmul.name))
    walk = Walk(model, data, threads=1)
    whole = Runner(model, [linear.x.name for linear in found], threads=1)
    expected = [whole(feeds) for feeds in data]
    for linear in sorted(found, key=lambda linear: walk.place(linear.x)):
        for (rows, samples), batch in zip(walk.rows(linear.x), expected, strict=True):
            np.testing.assert_allclose(rows, batch[linear.x.name].reshape(rows.shape), rtol=1e-5, atol=1e-5)
            assert len(samples) == len(rows)
            assert len(np.unique(samples)) == 8


def test_weights_that_change_on_the_way_count() -> None:
    model, data = block(), batches(1)
    walk = Walk(model, data, threads=1)
    by_name = {linear.name: linear for linear in linears(model)}
    list(walk.rows(by_name["q0"].x))
    weight = array_of(by_name["q0"].weight)
    assert weight is not None
    write_input(by_name["q0"].matmul, 1, 2 * weight)
    [(rows, _)] = walk.rows(by_name["up0"].x)
    expected = Runner(model, [by_name["up0"].x.name])(data[0])[by_name["up0"].x.name]
    np.testing.assert_allclose(rows, expected.reshape(rows.shape), rtol=1e-5, atol=1e-5)


def test_a_weight_behind_a_fake_quant_may_change_until_its_matmul_runs() -> None:
    """``insert`` puts the first reader's weight quantizer before the activation's; what it made of the old weight must
    not be what later rows come from."""
    ctx, model = context("w4a8{group_size=16}"), block()
    data = batches(1)
    quantize(model, ctx, data=data)
    by_name = {linear.name: linear for linear in linears(model)}
    walk = Walk(model, data, threads=1)
    for name, later in (("q0", "up0"), ("up0", "down0")):
        list(walk.rows(by_name[name].matmul.inputs[0]))
        quant = by_name[name].weight_quant
        assert quant is not None
        write_input(quant, 0, -array_of(quant.inputs[0]))
        value = by_name[later].matmul.inputs[0]
        [(rows, _)] = walk.rows(value)
        expected = Runner(model, [value.name], threads=1)(data[0])[value.name]
        np.testing.assert_allclose(rows, expected.reshape(rows.shape), rtol=1e-5, atol=1e-5)


def test_no_data_is_refused() -> None:
    with pytest.raises(DataError, match="is empty"):
        Walk(block(), [])


def test_what_an_expert_reads_is_known_row_by_row() -> None:
    model = mixtures.canonical(8, 4)
    x = mixtures.rows(12, 8)["x"]
    feeds = {"x": x, "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])}
    walk = Walk(model, [feeds], threads=1)
    for projection in projections(model):
        found = Runner(model, [projection.ids.name or "", projection.x.name or ""])({"x": x})
        ids, source = found[projection.ids.name], found[projection.x.name]
        token = np.arange(24) // 2
        for expert, linear in enumerate(projection.linears):
            [(rows, samples)] = walk.rows(linear.x)
            kept = (ids == expert) & (feeds["attention_mask"].reshape(-1)[token] != 0)
            np.testing.assert_allclose(rows, source[kept], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(samples, token[kept] // 4)
