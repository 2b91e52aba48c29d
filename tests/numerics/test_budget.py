"""The order of upgrades, the first state that holds, and how sure a ratio of few samples is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.numerics.budget import first_safe, ratio_bound, spread, student_t, taken, upgrades

numbers = st.integers(0, 20).map(float)
site = st.lists(st.tuples(st.integers(1, 20).map(float), numbers), min_size=1, max_size=4)
few_sites = st.lists(site, min_size=1, max_size=4)


def total(sites: list[list[tuple[float, float]]], state: tuple[int, ...], which: int) -> float:
    return sum(options[option][which] for options, option in zip(sites, state, strict=True))


@given(few_sites)
def test_every_upgrade_costs_more_and_errs_less(sites: list[list[tuple[float, float]]]) -> None:
    start, order = upgrades(sites)
    states = [taken(start, order, count) for count in range(len(order) + 1)]
    for before, after in itertools.pairwise(states):
        assert total(sites, before, 0) < total(sites, after, 0)
        assert total(sites, before, 1) > total(sites, after, 1)
    assert total(sites, states[0], 0) == sum(min(cost for cost, _ in options) for options in sites)
    assert total(sites, states[-1], 1) == sum(min(error for _, error in options) for options in sites)


@given(few_sites)
def test_no_other_state_is_better_for_the_money(sites: list[list[tuple[float, float]]]) -> None:
    """At each state of the order: whatever costs no more errs no less."""
    start, order = upgrades(sites)
    every = list(itertools.product(*(range(len(options)) for options in sites)))
    for count in range(len(order) + 1):
        state = taken(start, order, count)
        affordable = [other for other in every if total(sites, other, 0) <= total(sites, state, 0)]
        assert min(total(sites, other, 1) for other in affordable) >= total(sites, state, 1) - 1e-9


def test_the_order_is_by_error_decrease_per_cost() -> None:
    start, order = upgrades([[(10, 0.0), (4, 6.0), (5, 4.0)], [(9, 0.0), (3, 9.0)]])
    assert start == [1, 1]
    assert [(upgrade.site, upgrade.option) for upgrade in order] == [(0, 2), (1, 0), (0, 0)]


def test_an_error_that_is_no_number_is_left_first() -> None:
    start, order = upgrades([[(1, math.nan), (50, 0.0)], [(1, 1.0), (2, 0.0)]])
    assert start == [0, 0]
    assert [upgrade.site for upgrade in order] == [0, 1]


def test_a_site_that_is_cheapest_in_float_has_nothing_to_choose() -> None:
    assert upgrades([[(1, 0.0), (2, 0.5)]]) == ([0], [])


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 70))
def test_spread_covers_both_ends(low: int, more: int, points: int) -> None:
    found = spread(low, low + more, points)
    assert found == sorted(set(found))
    assert len(found) <= points
    assert found[-1] == low + more
    if points > 1:
        assert found[0] == low
        gaps = np.diff(found)
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_a_looser_limit_never_costs_more(values: list[tuple[float, float]]) -> None:
    """What holds under a limit holds under a looser one, whatever the figures are: so the cost cannot rise."""
    bounds = [bound for bound, _ in values]
    for tight, loose in itertools.pairwise(sorted(limit for _, limit in values)):
        first, second = (first_safe([bound <= limit for bound in bounds]) for limit in (tight, loose))
        if first is not None:
            assert second is not None
            assert second <= first


def test_luck_at_the_cheap_end_does_not_count() -> None:
    assert first_safe([True, False, True, True]) == 2
    assert first_safe([True, True]) == 0
    assert first_safe([True, True, False]) is None


@pytest.mark.parametrize("freedom", [3, 7, 31, 200])
@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_student_t(confidence: float, freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert student_t(confidence, freedom) == pytest.approx(stats.t.ppf(confidence, freedom), rel=0.012)


@pytest.mark.parametrize(("samples", "share"), [(8, 0.96), (32, 0.97)])
def test_the_bound_holds_on_new_samples(samples: int, share: float) -> None:
    """Nominally in 99 of 100 draws; in some fewer of skewed noise in samples of uneven size."""
    rng = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        sizes = rng.integers(5, 50, (4000, samples)).astype(float)
        return sizes * rng.gamma(4, 0.01, sizes.shape), sizes

    (seen, sizes), (new, others) = draw(), draw()
    bounds = [ratio_bound(n, d)[1] for n, d in zip(seen, sizes, strict=True)]
    held = new.sum(1) / others.sum(1) <= bounds
    assert share <= held.mean() < 1


def test_ratio_of_equal_samples_has_no_margin() -> None:
    assert ratio_bound([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize(("n", "d"), [([1, 2], [0, 0]), ([1, math.nan], [1, 1]), ([1, 1], [1, math.inf])])
def test_a_ratio_that_is_none_is_nan(n: list[float], d: list[float]) -> None:
    assert all(math.isnan(number) for number in ratio_bound(n, d))
