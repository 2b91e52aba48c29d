"""Swap inputs between groups while that lowers the error of :mod:`qcompiler.numerics.ordering`: a local search.

An order by one number puts inputs together that are of like size over all outputs; which output has its largest weight
where, only trying tells. For two groups all exchanges of one input for another are rated at once, from the largest and
the second largest weight of each output in each group, and the best is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.ordering import Reading

Array = npt.NDArray[Any]
Order = npt.NDArray[np.int64]
_NUMBERS = 1 << 22  # of exchanges times outputs that are looked at at once
_LEAST = 1e-6  # of two groups' error, what an exchange must remove


def swapped(readings: Sequence[Reading], order: Order, sweeps: int = 2, reach: int = 16) -> Order:
    """An order in which groups have exchanged inputs; the last group, where it is short, stays as it is.

    Args:
        readings: weights that read the inputs, all in groups of one size.
        order: where to start.
        sweeps: how often each pair of groups is looked at.
        reach: pairs are of groups that are at most so far apart in ``order``.
    """
    size = readings[0].spec.group_size
    assert size is not None
    search = _Search(readings, size)
    groups = order[: len(order) // size * size].reshape(-1, size).copy()
    costs = np.array([search.cost(group) for group in groups])
    for _ in range(sweeps):
        done = 0
        for first in range(len(groups)):
            for second in range(first + 1, min(first + 1 + reach, len(groups))):
                pair = [first, second]
                gain, i, j = search.best_exchange(groups[first], groups[second], costs[pair].sum())
                if gain > _LEAST * costs[pair].sum():
                    groups[first, i], groups[second, j] = groups[second, j], groups[first, i]
                    costs[pair] = [search.cost(groups[g]) for g in pair]
                    done += 1
        if not done:
            break
    return np.concatenate([groups.ravel(), order[groups.size :]])


class _Search:
    """The error of groups, from a few outputs of each weight.

    Σ over groups, readings r and outputs n of r of range_gn² · counts_gr, which are those of its inputs together.
    """

    def __init__(self, readings: Sequence[Reading], size: int) -> None:
        each = max(8, _NUMBERS // (size**2 * len(readings)))
        weights, counts = [], []
        for reading in readings:
            outputs = reading.weight.shape[1]
            picked = np.unique(np.linspace(0, outputs - 1, min(each, outputs)).astype(np.int64))
            weights.append(np.asarray(reading.weight[:, picked], np.float32))
            counts.append(reading.shares / (2.0**reading.spec.bits - 1) ** 2 * outputs / len(picked))
        self._weight = np.concatenate(weights, axis=1)
        self._counts = np.stack(counts, axis=1).astype(np.float32)  # [in, readings]
        self._symmetric = readings[0].spec.symmetric
        self._of = np.repeat(np.eye(len(readings), dtype=np.float32), [w.shape[1] for w in weights], axis=0)

    def cost(self, group: Order) -> float:
        weight = self._weight[group]
        low, high = np.minimum(weight.min(0), 0), np.maximum(weight.max(0), 0)
        return float(np.square(self._range(low, high)) @ (self._of @ self._counts[group].sum(0)))

    def best_exchange(self, first: Order, second: Order, cost: float) -> tuple[float, int, int]:
        """What the best exchange removes of the two groups' ``cost``, and the places of its two inputs."""
        counts, others = self._counts[first], self._counts[second]
        change = others[None] - counts[:, None]  # [size, size, readings]: i leaves the first, j comes
        new = self._after(first, second, counts.sum(0) + change)
        new += self._after(second, first, (others.sum(0) - change).swapaxes(0, 1)).T
        i, j = np.unravel_index(int(new.argmin()), new.shape)
        return cost - float(new[i, j]), int(i), int(j)

    def _after(self, group: Order, others: Order, counts: Array) -> Array:
        """The group's error [size, size] without its input i and with input j of the others; its counts are then
        ``counts`` [size, size, readings]."""
        weight, coming = self._weight[group], self._weight[others]
        ordered = np.sort(weight, axis=0)
        high = np.maximum(np.where(weight == ordered[-1], ordered[-2], ordered[-1]), 0)
        low = np.minimum(np.where(weight == ordered[0], ordered[1], ordered[0]), 0)
        spread = self._range(np.minimum(low[:, None], coming[None]), np.maximum(high[:, None], coming[None]))
        return np.asarray((np.square(spread, out=spread) @ self._of * counts).sum(-1))

    def _range(self, low: Array, high: Array) -> Array:
        return 2 * np.maximum(-low, high) if self._symmetric else high - low
