"""A walk sees what a whole run sees, and what later weights make of it."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.calibration.walk import Walk
from qcompiler.core import DataError
from qcompiler.graph.edit import array_of, write_input
from qcompiler.graph.linear import linears
from qcompiler.graph.run import Runner
from tests.passes.blocks import batches, block


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


def test_no_data_is_refused() -> None:
    with pytest.raises(DataError, match="is empty"):
        Walk(block(), [])
