"""Roundings kept side by side: one is GPTQ itself, all of them the closest vector."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.core import OptionError
from qcompiler.numerics import gptq_beam
from qcompiler.numerics.gptq import gptq
from qcompiler.numerics.grids import Grid
from qcompiler.numerics.hessian import hessian_error
from tests.numerics.test_gptq import problem


def grid_for(weight: np.ndarray, group_size: int | None, high: int = 7) -> Grid:
    starts = np.arange(0, len(weight), group_size or len(weight))
    scale = (np.maximum.reduceat(np.abs(weight), starts, axis=0) / high).astype(np.float32)
    return Grid(-high, high, group_size, scale if group_size else scale[0])


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_a_beam_of_one_is_gptq(group_size: int | None, block_size: int) -> None:
    weight, hessian = problem()
    grid = grid_for(weight, group_size)
    scale, zero_point = (np.broadcast_to(array, weight.shape) for array in grid.spread(len(weight)))
    upper = np.linalg.cholesky(np.linalg.inv(hessian + 0.01 * np.diag(hessian).mean() * np.eye(40))).T
    got = gptq_beam.eliminate_beam(weight, upper, scale, zero_point, (-7, 7), 1, block_size)
    expected = gptq(weight, hessian, grid, act_order=False, dtype=np.float64, keep_nearest=False)
    np.testing.assert_array_equal(got, expected.q)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 7), out=st.integers(1, 4), samples=st.integers(2, 30), seed=st.integers(0, 2**32 - 1))
def test_keeping_all_roundings_finds_the_closest_vector(rows: int, out: int, samples: int, seed: int) -> None:
    """Of two integers a weight, all 2^rows vectors can be tried."""
    weight, hessian = problem(rows, out, samples, seed)
    grid = Grid(0, 1, None, np.full(out, 1.0, np.float32), np.full(out, 0.0, np.float32))
    got = gptq(weight, hessian, grid, damp=0.1, beam=2**rows, dtype=np.float64, keep_nearest=False)
    damped = hessian + 0.1 * np.diag(hessian).mean() * np.eye(rows)
    every = [np.array(q, float)[:, None] for q in itertools.product((0, 1), repeat=rows)]
    least = np.min([hessian_error(weight, np.broadcast_to(q, weight.shape), damped) for q in every], axis=0)
    np.testing.assert_allclose(hessian_error(weight, got.q, damped), least, rtol=1e-9)


@pytest.mark.parametrize("group_size", [None, 16])
def test_a_wider_beam_errs_less(group_size: int | None) -> None:
    weight, hessian = problem(rows=64, out=64, samples=500)
    grid = grid_for(weight, group_size)
    errors = [gptq(weight, hessian, grid, beam=beam).error.sum() for beam in (1, 2, 8, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_output_channels_apart_give_the_same_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(out=13)
    grid = grid_for(weight, 16)
    whole = gptq(weight, hessian, grid, beam=4)
    monkeypatch.setattr(gptq_beam, "_NUMBERS", 40 * 4 * 3)
    np.testing.assert_array_equal(gptq(weight, hessian, grid, beam=4).q, whole.q)


def test_a_beam_keeps_the_grid() -> None:
    weight, hessian = problem(rows=24, out=6)
    grid = Grid(0, 3, 8, np.full((3, 6), 0.4, np.float32), np.full((3, 6), 1.0, np.float32))
    got = gptq(weight, hessian, grid, beam=5)
    assert got.q.min() >= 0
    assert got.q.max() <= 3
    with pytest.raises(OptionError):
        gptq(weight, hessian, grid, beam=0)
