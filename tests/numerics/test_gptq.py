"""GPTQ against the elimination that it stands for, done the long way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.core import DataError, OptionError
from qcompiler.numerics.gptq import gptq
from qcompiler.numerics.grids import Grid
from qcompiler.numerics.hessian import hessian_error, inverse_root

INT8, INT4 = Grid(-127, 127), Grid(-7, 7)


def problem(rows: int = 40, out: int = 12, samples: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and the Hessian of correlated inputs of very different size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, rows)) @ rng.normal(size=(rows, rows)) * np.exp(rng.normal(size=rows))
    return rng.normal(size=(rows, out)), x.T @ x / samples


def values(grid: Grid, q: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    size = grid.group_size or len(q)
    s, z = (np.repeat(np.atleast_2d(a).astype(np.float64), size, 0)[: len(q)] for a in (scale, zero_point))
    return (q - z) * s


def eliminated(weight: np.ndarray, hessian: np.ndarray, grid: Grid, damp: float, order: np.ndarray) -> np.ndarray:
    """Optimal Brain Surgeon with the whole inverse Hessian, one input removed from it after the other.

    Scales, where a group asks for them, come from the weights as they stand when its first input is rounded.
    """
    w = weight.copy()
    inverse = np.linalg.inv(hessian + damp * np.diag(hessian).mean() * np.eye(len(w)))
    size = grid.group_size or len(w)
    result = np.empty_like(w)
    found: dict[int, np.ndarray] = {}
    for k in order:
        group = k // size
        if grid.scale is not None:
            found[group] = np.broadcast_to(grid.scale, (-(-len(w) // size), w.shape[1]))[group].astype(np.float64)
        elif group not in found:
            found[group] = (np.abs(w[group * size : (group + 1) * size]).max(0) / grid.high).astype(np.float32)
        scale = found[group].astype(np.float64)
        result[k] = np.clip(np.rint(w[k] / scale), grid.low, grid.high) * scale
        w -= np.outer(inverse[:, k], (w[k] - result[k]) / inverse[k, k])
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return result


@pytest.mark.parametrize("block_size", [1, 7, 16, 64])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 16])
def test_equals_explicit_elimination(block_size: int, act_order: bool, group_size: int | None) -> None:
    weight, hessian = problem()
    groups = -(-len(weight) // (group_size or len(weight)))
    scale = np.stack([np.abs(part).max(0) / 7 for part in np.array_split(weight, groups)]).astype(np.float32)
    grid = Grid(-7, 7, group_size, scale if group_size else scale[0])
    got = gptq(weight, hessian, grid, act_order=act_order, block_size=block_size, dtype=np.float64, keep_nearest=False)
    order = np.argsort(-np.diag(hessian)) if act_order else np.arange(len(weight))
    expected = eliminated(weight, hessian, grid, 0.01, order)
    np.testing.assert_allclose(values(grid, got.q, got.scale, got.zero_point), expected, atol=1e-9)
    assert got.damp == 0.01


@pytest.mark.parametrize("block_size", [5, 16, 64])
def test_scales_of_groups_are_found_from_what_earlier_groups_left(block_size: int) -> None:
    weight, hessian = problem(rows=44)
    grid = Grid(-7, 7, 16)
    got = gptq(weight, hessian, grid, act_order=False, block_size=block_size, dtype=np.float64, keep_nearest=False)
    expected = eliminated(weight, hessian, grid, 0.01, np.arange(44))
    np.testing.assert_allclose(values(grid, got.q, got.scale, got.zero_point), expected, atol=1e-9)
    assert got.scale.shape == (3, 12)


def test_the_error_is_that_of_the_outputs() -> None:
    rng = np.random.default_rng(3)
    x, weight = rng.normal(size=(300, 20)) @ rng.normal(size=(20, 20)), rng.normal(size=(20, 6))
    got = gptq(weight, x.T @ x, INT4)
    approximation = values(INT4, got.q, got.scale, got.zero_point)
    np.testing.assert_allclose(got.error, ((x @ (weight - approximation)) ** 2).sum(0), rtol=1e-9)
    assert got.error.sum() < 0.9 * got.nearest_error.sum()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 24),
    out=st.integers(1, 6),
    samples=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    act_order=st.booleans(),
    group_size=st.sampled_from([None, 1, 5, 8, 32]),
    high=st.sampled_from([1, 7, 127]),
)
def test_never_worse_than_rounding_to_nearest(
    rows: int, out: int, samples: int, seed: int, act_order: bool, group_size: int | None, high: int
) -> None:
    weight, hessian = problem(rows, out, samples, seed)
    got = gptq(weight, hessian, Grid(-high, high, group_size), act_order=act_order)
    nearest = np.clip(np.rint(weight / values(Grid(0, 0, group_size), np.ones_like(weight), got.scale, 0 * got.scale)),
                      -high, high)  # fmt: skip
    grid = Grid(-high, high, group_size)
    plain = hessian_error(weight, values(grid, nearest, got.scale, got.zero_point), hessian)
    error = hessian_error(weight, values(grid, got.q, got.scale, got.zero_point), hessian)
    assert (error <= plain * (1 + 1e-6) + 1e-12).all()
    assert np.abs(got.q).max() <= high


def test_channels_on_which_greed_is_worse_are_rounded_to_nearest() -> None:
    weight, hessian = problem(rows=6, out=400, samples=8, seed=1)
    free = gptq(weight, hessian, INT4, keep_nearest=False)
    kept = gptq(weight, hessian, INT4)
    assert (free.error > free.nearest_error).any()
    assert kept.nearest == (free.error > free.nearest_error).sum()
    np.testing.assert_allclose(kept.error, np.minimum(free.error, free.nearest_error))


def test_act_order_helps_where_inputs_differ_in_size() -> None:
    weight, hessian = problem(rows=64, out=64, samples=500)
    plain, ordered = (gptq(weight, hessian, INT4, act_order=on).error.sum() for on in (False, True))
    assert ordered < plain


def test_asymmetric_grids() -> None:
    weight, hessian = problem()
    weight += 2

    def find(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.minimum(part.min(0), 0), part.max(0)
        scale = (high - low) / 15
        return scale, np.rint(-low / scale)

    asymmetric = gptq(weight, hessian, Grid(0, 15, 8, find=find))
    assert asymmetric.q.min() >= 0
    assert asymmetric.q.max() <= 15
    assert asymmetric.error.sum() < gptq(weight, hessian, Grid(-8, 7, 8)).error.sum()
    given = Grid(0, 15, 8, asymmetric.scale, asymmetric.zero_point)
    again = gptq(weight, hessian, given)
    np.testing.assert_array_equal(again.q, asymmetric.q)


def test_dead_inputs_keep_their_weights() -> None:
    weight, hessian = problem()
    hessian[3] = hessian[:, 3] = 0
    got = gptq(weight, hessian, INT8)
    assert got.dead == 1
    np.testing.assert_array_equal(got.q[3], np.rint(weight[3] / got.scale))
    assert gptq(weight, np.zeros_like(hessian), INT8).dead == len(weight)


def test_damping_is_raised_until_the_hessian_can_be_factorised() -> None:
    weight, hessian = problem()
    indefinite = hessian - 0.05 * np.diag(hessian).mean() * np.eye(len(hessian))
    got = gptq(weight, indefinite, INT8, damp=0.0)
    assert got.damp == 0.1
    upper, used = inverse_root(hessian, 0.0)
    assert used == 0.0
    np.testing.assert_allclose(upper.T @ upper @ hessian, np.eye(len(hessian)), atol=1e-7)
    np.testing.assert_array_equal(upper, np.triu(upper))


def test_what_cannot_be_solved_is_refused() -> None:
    weight, hessian = problem()
    with pytest.raises(DataError, match="not positive definite"):
        inverse_root(hessian - 1e3 * np.diag(hessian).max() * (1 - np.eye(len(hessian))), 0.01)
    with pytest.raises(DataError, match="NaN or inf"):
        gptq(weight, np.where(np.eye(len(hessian)) > 0, np.nan, hessian), INT8)
    with pytest.raises(OptionError, match="Hessian"):
        gptq(weight, hessian[1:, 1:], INT8)
    with pytest.raises(OptionError, match="scales"):
        gptq(weight, hessian, Grid(-7, 7, 8, scale=np.ones((2, 12))))
