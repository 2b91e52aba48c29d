"""Scales fitted to integers: least squares, and what GPTQ makes of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.numerics.gptq import gptq
from qcompiler.numerics.gptq_scales import refitted_scales
from qcompiler.numerics.hessian import hessian_error
from tests.numerics.test_gptq import problem
from tests.numerics.test_gptq_beam import grid_for


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 24),
    out=st.integers(1, 5),
    samples=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    group_size=st.sampled_from([None, 1, 5, 8, 32]),
    sign=st.sampled_from([1, -1]),
)
def test_no_other_scale_errs_less(
    rows: int, out: int, samples: int, seed: int, group_size: int | None, sign: int
) -> None:
    """The error is convex in the scales, so a step along each of them that lessens it would show a better place."""
    weight, hessian = problem(rows, out, samples, seed)
    hessian = hessian + 0.1 * np.diag(hessian).mean() * np.eye(rows)
    grid = grid_for(weight, group_size)
    grid = dataclasses.replace(grid, scale=sign * np.asarray(grid.scale))
    q = grid.nearest(weight)
    scale = refitted_scales(weight, q, hessian, grid).astype(np.float64)
    old = np.asarray(grid.scale, np.float64)
    assert scale.shape == old.shape
    ratio = scale / old
    assert ((ratio <= 2 + 1e-6) & (ratio >= 0.5 - 1e-6)).all()

    def error(scale: np.ndarray) -> np.ndarray:
        return hessian_error(weight, dataclasses.replace(grid, scale=scale).dequantized(q), hessian)

    bounded = ((ratio > 1.99) | (ratio < 1 / 1.99)).reshape(-1, out).any(0)
    least, before = error(scale), error(old)
    assert (least <= before * (1 + 1e-6) + 1e-12)[~bounded].all()
    for step in (0.99, 1.01):
        for group in range(len(np.atleast_2d(scale))):
            other = np.atleast_2d(scale).copy()
            other[group] *= step
            assert (error(other.reshape(scale.shape)) >= least * (1 - 1e-5) - 1e-12)[~bounded].all()


def test_groups_of_zeros_keep_their_scale() -> None:
    weight, hessian = problem(rows=24, out=3)
    weight[8:16] = 0
    grid = dataclasses.replace(grid_for(weight, 8), scale=np.full((3, 3), 0.3, np.float32))
    scale = refitted_scales(weight, grid.nearest(weight), hessian, grid)
    np.testing.assert_allclose(scale[1], 0.3)


def test_many_output_channels_are_solved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(out=9)
    grid = grid_for(weight, 16)
    whole = refitted_scales(weight, grid.nearest(weight), hessian, grid)
    monkeypatch.setattr("qcompiler.numerics.gptq_scales._OUTPUTS", 4)
    np.testing.assert_allclose(refitted_scales(weight, grid.nearest(weight), hessian, grid), whole, rtol=1e-6)


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("beam", [1, 4])
def test_gptq_in_fitted_scales_errs_less(group_size: int | None, beam: int) -> None:
    weight, hessian = problem(rows=64, out=32, samples=500)
    grid = grid_for(weight, group_size)
    errors = np.array(
        [
            gptq(weight, hessian, grid, damp=1e-9, beam=beam, refits=refits, keep_nearest=False).error
            for refits in range(3)
        ]
    )
    assert (errors[1:] <= errors[:-1] * (1 + 1e-4)).all()
    assert errors[2].sum() < 0.97 * errors[0].sum()
