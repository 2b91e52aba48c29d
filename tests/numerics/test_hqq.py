"""HQQ refits grids: never to a larger loss, in whole zero points, the same in any unit, and near the best there is."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.numerics.grids import Grid, weight_grid
from qcompiler.numerics.hqq import HalfQuadratic, attraction, hqq_grid
from qcompiler.scheme import TensorSpec

DTYPES = st.sampled_from(["int4", "uint4", "int2", "uint2", "uint8"])
NORMS = st.sampled_from([0.5, 0.7, 1.0, 2.0])


def start(weight: np.ndarray, dtype: str, group_size: int = 16) -> Grid:
    return weight_grid(weight, TensorSpec(dtype, not dtype.startswith("u"), "per_group", group_size))


def losses(weight: np.ndarray, grid: Grid, p: float) -> np.ndarray:
    """Σ|w - ŵ|^p of each group, [groups, out]."""
    assert grid.group_size is not None
    return np.add.reduceat(np.abs(weight - grid.rounded(weight)) ** p, np.arange(0, len(weight), grid.group_size))


@settings(max_examples=40)
@given(st.integers(0, 2**16), DTYPES, st.integers(1, 50), NORMS, st.sampled_from([1.0, 10.0]))
def test_never_worse_and_on_the_grid(seed: int, dtype: str, rows: int, p: float, beta: float) -> None:
    weight = np.random.default_rng(seed).standard_t(3, (rows, 4)).astype(np.float32)
    grid = start(weight, dtype)
    found = hqq_grid(weight, grid, HalfQuadratic(p, beta))
    nothing = np.minimum(rows, 16) * (1e-6 * np.abs(weight).max()) ** p  # the loss of numbers that float32 rounds off
    assert (losses(weight, found, p) <= losses(weight, grid, p) * (1 + 1e-5) + nothing).all()
    assert found.scale is not None
    assert found.zero_point is not None
    assert np.isfinite(found.scale).all()
    assert (found.scale != 0).all()
    np.testing.assert_array_equal(found.zero_point, np.rint(found.zero_point))
    if dtype.startswith("u"):
        assert grid.low <= found.zero_point.min() <= found.zero_point.max() <= grid.high
    else:
        assert not found.zero_point.any()


@settings(max_examples=20)
@given(st.integers(0, 2**16), DTYPES, st.integers(-20, 20))
def test_the_unit_does_not_matter(seed: int, dtype: str, exponent: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((40, 3)).astype(np.float32)
    a, b = (hqq_grid(w, start(w, dtype)) for w in (weight, weight * np.float32(2.0**exponent)))
    np.testing.assert_array_equal(a.scale * np.float32(2.0**exponent), b.scale)
    np.testing.assert_array_equal(a.zero_point, b.zero_point)


@settings(max_examples=20)
@given(st.integers(0, 2**16), st.sampled_from(["int4", "uint4", "int2"]))
def test_weights_on_the_grid_stay(seed: int, dtype: str) -> None:
    weight = np.random.default_rng(seed).standard_normal((32, 3)).astype(np.float32)
    grid = start(weight, dtype)
    weight = grid.rounded(weight)
    np.testing.assert_allclose(hqq_grid(weight, grid).rounded(weight), weight, rtol=1e-6, atol=1e-7)


def test_the_squared_error_falls_with_the_loss() -> None:
    """Of normal weights; with p < 1, small scales would hit more of them exactly and miss the others by far."""
    weight = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    grid = start(weight, "int4", 32)
    found = hqq_grid(weight, grid)
    assert found.squared_error(weight) < 0.8 * grid.squared_error(weight)
    assert losses(weight, found, 0.7).sum() < 0.9 * losses(weight, grid, 0.7).sum()


def test_zeros_and_large_numbers() -> None:
    weight = np.zeros((20, 3), np.float32)
    weight[:, 1] = 1e30
    weight[3, 2] = -1
    found = hqq_grid(weight, start(weight, "uint4"))
    np.testing.assert_allclose(found.rounded(weight), weight, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "uint2"])
@pytest.mark.parametrize("p", [0.7, 2.0])
def test_near_the_best_of_a_dense_search(dtype: str, p: float) -> None:
    """Scales from 0.1 to 1.1 of the full range's, with each zero point there is: the loss is near the best.

    With p < 1 the best may lie at small scales, where HQQ does not look.
    """
    weight = np.random.default_rng(0).standard_t(4, (32, 60)).astype(np.float32)
    grid = start(weight, dtype, 32)
    assert grid.scale is not None
    least = np.full((1, 60), np.inf)
    for zero_point in range(grid.low, grid.high + 1) if grid.low == 0 else [0]:
        for factor in np.concatenate([np.linspace(0.1, 1.1, 101), -np.linspace(0.1, 1.1, 101)]):
            scale = np.asarray(grid.scale * factor, np.float32)
            tried = dataclasses.replace(grid, scale=scale, zero_point=np.full(scale.shape, zero_point))
            least = np.minimum(least, losses(weight, tried, p))
    found = losses(weight, hqq_grid(weight, grid, HalfQuadratic(p, beta=1.0 if p == 2 else 10.0)), p)
    assert np.mean(found / least) < (1.03 if p == 2 else 1.2)
    assert np.mean(losses(weight, grid, p) / least) > 1.08


def test_what_shrink_leaves_is_bounded_at_one_and_falls_for_large_errors_below() -> None:
    x = np.array([-3, -0.05, 0, 0.05, 3], np.float32)
    for p, large in ((1.0, 0.1), (0.7, 0.1 * 3**-0.3)):
        pull = attraction(x, np.abs(x) ** np.float32(p), 10.0)
        np.testing.assert_allclose(pull, [-large, -0.05, 0, 0.05, large], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2"])
@pytest.mark.parametrize(("rows", "columns"), [(40, 5), (96, 33), (7, 3), (33, 1)])
def test_the_chunk_does_not_matter(dtype: str, rows: int, columns: int) -> None:
    """Whatever is worked on at once: one column of a group, several groups, a short last group; to the bit."""
    weight = np.random.default_rng(0).standard_t(3, (rows, columns)).astype(np.float32)
    grid = start(weight, dtype)
    want = hqq_grid(weight, grid, chunk=1 << 20)
    for chunk in (1, 16, 32, 3 * 16, 16 * columns, 2 * 16 * columns + 5):
        got = hqq_grid(weight, grid, chunk=chunk)
        np.testing.assert_array_equal(got.scale, want.scale)
        np.testing.assert_array_equal(got.zero_point, want.zero_point)


def test_memory_does_not_grow_with_the_weight() -> None:
    peaks = []
    for columns in (64, 512):
        weight = np.ones((1024, columns), np.float32)
        grid = start(weight, "uint4", 256)
        tracemalloc.start()
        hqq_grid(weight, grid, chunk=1 << 14)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
