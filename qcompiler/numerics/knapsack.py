"""Where to spend bytes for accuracy: the multiple-choice knapsack behind ``max_size``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CELLS = 100_000
"""Capacities that are told apart. Nothing is rounded where all costs differ by multiples of at least a CELLS-th of the
span from cheapest to dearest choice, as those of weights do; else costs are rounded up to such a part."""


def cheapest(costs: Sequence[Sequence[int]]) -> int:
    """The least that all items together can cost."""
    return sum(map(min, costs))


def choose_within(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], capacity: int) -> list[int]:
    """One option for each item, of least total error, whose costs together keep to the capacity.

    Errors count as additive. By dynamic programming over capacities (Kellerer et al. 2004, section 11.5), so that more
    capacity never leads to more error. Of equal errors the option that comes first is taken.

    Args:
        costs, errors: of each option of each item; costs are not negative, an error that is no number counts as
            infinite.
        capacity: at least :func:`cheapest`.
    """
    least = [min(options) for options in costs]
    span = sum(max(options) - low for options, low in zip(costs, least, strict=True))
    step = max(math.gcd(*(cost - low for options, low in zip(costs, least, strict=True) for cost in options)), 1)
    unit = step * max(-(-span // (step * CELLS)), 1)
    cells = min((capacity - sum(least)) // unit, -(-span // unit) + len(costs)) + 1
    best = np.zeros(cells)
    taken = np.zeros((len(costs), cells), np.uint8)
    for item, (options, low) in enumerate(zip(costs, least, strict=True)):
        found = np.full(cells, np.inf)
        for number, cost in enumerate(options):
            steps = -(-(cost - low) // unit)
            if steps >= cells:
                continue
            error = errors[item][number]
            total = best[: cells - steps] + (np.inf if np.isnan(error) else error)
            better = total < found[steps:]
            if cost == low:  # with all errors infinite, the cheapest
                better |= np.isinf(found[steps:]) & np.isinf(total)
            found[steps:][better] = total[better]
            taken[item, steps:][better] = number
        best = found
    chosen = []
    cell = cells - 1
    for item in reversed(range(len(costs))):
        number = int(taken[item, cell])
        chosen.append(number)
        cell -= -(-(costs[item][number] - least[item]) // unit)
    return chosen[::-1]
