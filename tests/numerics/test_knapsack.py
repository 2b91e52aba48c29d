"""The knapsack is exact up to its rounding, keeps to the capacity, and more capacity never leads to more error."""

from __future__ import annotations

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.numerics.knapsack import cheapest, choose_within

OPTION = st.tuples(st.integers(0, 50), st.floats(0, 100))
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def total(table: list[list[float]], choice: tuple[int, ...] | list[int]) -> float:
    return sum(row[number] for row, number in zip(table, choice, strict=True))


@settings(max_examples=60)
@given(ITEMS, st.integers(0, 150), st.sampled_from([1, 100_003]), st.integers(0, 7))
def test_the_best_of_all_choices(items: list[list[tuple[int, float]]], more: int, step: int, base: int) -> None:
    """Also where costs are large: those of weights differ by multiples of their groups' bytes."""
    costs = [[cost * step + base for cost, _ in item] for item in items]
    errors = [[error for _, error in item] for item in items]
    capacity = cheapest(costs) + more * step
    choice = choose_within(costs, errors, capacity)
    assert total(costs, choice) <= capacity
    fitting = (c for c in itertools.product(*(range(len(i)) for i in items)) if total(costs, c) <= capacity)
    assert math.isclose(total(errors, choice), min(total(errors, c) for c in fitting), abs_tol=1e-9)


@settings(max_examples=30)
@given(st.lists(st.lists(st.tuples(st.integers(0, 10**9), st.floats(0, 1)), min_size=2, max_size=3), max_size=6))
def test_more_capacity_never_means_more_error(items: list[list[tuple[int, float]]]) -> None:
    costs, errors = ([[option[i] for option in item] for item in items] for i in (0, 1))
    low, high = cheapest(costs), sum(max(row, default=0) for row in costs)
    reached = [
        total(errors, choose_within(costs, errors, capacity))
        for capacity in (low, low + (high - low) // 3, low + (high - low) // 2, high)
    ]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(reached))
    assert math.isclose(reached[-1], sum(min(row) for row in errors), abs_tol=1e-6) or reached[-1] < reached[0] + 1e-9


def test_errors_that_are_no_numbers_are_the_worst() -> None:
    assert choose_within([[1, 2], [5, 9]], [[math.nan, 1.0], [math.inf, 3.0]], 11) == [1, 1]
    assert choose_within([[1, 2], [5, 9]], [[math.nan, math.inf], [math.inf, 3.0]], 6) == [0, 0]
    assert choose_within([], [], 0) == []
