"""Orders by group: what the error says is what rounding does, and the best candidate is no worse than none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.numerics.gptq import gptq
from qcompiler.numerics.grids import weight_grid
from qcompiler.numerics.group_swaps import swapped
from qcompiler.numerics.ordering import Reading, best_order, error_of, orders, residual_variance
from qcompiler.scheme import TensorSpec

GROUP = 8
SPECS = [
    TensorSpec("int4", granularity="per_group", group_size=GROUP),
    TensorSpec("uint4", symmetric=False, granularity="per_group", group_size=GROUP),
]


def reading(seed: int, inputs: int, spec: TensorSpec, spread: float = 1.0) -> Reading:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((inputs, 24)) * np.exp(spread * rng.standard_normal((inputs, 1)))
    return Reading(weight.astype(np.float32), np.exp(rng.standard_normal(inputs)), spec)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    inputs=st.sampled_from([16, 20, 40]),
    spec=st.sampled_from(SPECS),
    count=st.integers(1, 3),
)
def test_the_best_order_is_an_order_and_no_worse_than_none(
    seed: int, inputs: int, spec: TensorSpec, count: int
) -> None:
    readings = [reading(seed + i, inputs, spec) for i in range(count)]
    _, order = best_order(readings)
    assert sorted(order) == list(range(inputs))
    given_, sorted_, after = (error_of(readings, o) for o in (np.arange(inputs), order, swapped(readings, order)))
    assert sorted(swapped(readings, order)) == list(range(inputs))
    assert after <= sorted_ * (1 + 1e-6)
    assert sorted_ <= given_


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), spec=st.sampled_from(SPECS))
def test_the_error_depends_on_who_shares_a_group_only(seed: int, spec: TensorSpec) -> None:
    one = reading(seed, 5 * GROUP, spec)
    rng = np.random.default_rng(seed)
    groups = rng.permutation(5 * GROUP).reshape(5, GROUP)
    moved = rng.permuted(groups[rng.permutation(5)], axis=1)
    assert one.error(moved.ravel()) == pytest.approx(one.error(groups.ravel()))


def test_it_foretells_what_gptq_gains() -> None:
    """Inputs that hang together, some loud, and weights of uneven rows: GPTQ's own error falls as foretold."""
    rng = np.random.default_rng(0)
    spec = TensorSpec("uint4", symmetric=False, granularity="per_group", group_size=32)
    mixing = rng.standard_normal((128, 128)) * 0.1 + np.eye(128)
    rows = (rng.standard_normal((4000, 128)) @ mixing * np.exp(rng.standard_normal(128))).astype(np.float32)
    weight = (rng.standard_normal((128, 128)) * np.exp(0.7 * rng.standard_normal((128, 1)))).astype(np.float32)
    hessian = rows.T.astype(np.float64) @ rows

    def solved(order: np.ndarray) -> float:
        w = weight[order]
        h = hessian[np.ix_(order, order)]
        return float(gptq(w, h, weight_grid(w, spec), damp=0.03).error.sum())

    one = Reading(weight, residual_variance(rows), spec)
    as_given, *candidates = [(one.error(order), solved(order)) for _, order in orders([one])]
    for expected, found in candidates:
        assert 10 * np.log10(found / as_given[1]) == pytest.approx(10 * np.log10(expected / as_given[0]), rel=0.2)
    _, order = best_order([one])
    better = swapped([one], order)
    assert 10 * np.log10(one.error(better) / one.error(order)) < -0.1
    assert solved(better) < solved(order) < 0.8 * as_given[1]


def test_swaps_find_what_no_number_sorts() -> None:
    """Inputs of equal norm, each loud to the first half of the outputs or to the second, dealt at random."""
    kind = np.random.default_rng(0).permutation(np.repeat([0, 1], 2 * GROUP))
    loud = np.array([[8.0] * 12 + [1.0] * 12, [1.0] * 12 + [8.0] * 12])
    weight = loud[kind] * np.random.default_rng(1).choice([-1, 1], (4 * GROUP, 24))
    one = Reading(weight.astype(np.float32), np.ones(4 * GROUP), SPECS[1])
    order = swapped([one], np.arange(4 * GROUP), sweeps=10)
    assert all(len(set(group)) == 1 for group in kind[order].reshape(-1, GROUP))
    assert one.error(order) < 0.6 * one.error(np.arange(4 * GROUP))
