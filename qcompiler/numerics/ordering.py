"""Orders of a Linear's inputs that suit scales by group: inputs of like magnitude together.

A group's scale is what its largest weight asks for, so a weight's error hangs on its neighbours. What an error of input
k counts after GPTQ is the variance of that input that the inputs rounded later cannot make up for (1 / U_kk² of the
factor in ``gptq.py``), whatever the groups are. So the error of an order, up to a factor Σ_k d_k Σ_n scale_gn², is
known before any rounding (on MiniLM it foretells what GPTQ gains within 0.05 dB), and the orders that are tried trade
both: by ‖w_k‖ / d_k^a, inputs that count sit with smaller weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.gptq import inverse_root
from qcompiler.numerics.grids import weight_grid
from qcompiler.scheme import TensorSpec

Array = npt.NDArray[Any]
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_DAMP = 0.03


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """A weight that reads the inputs to be ordered.

    Attributes:
        weight: float [in, out], or a sample of its outputs.
        counts: float64 [in], what an error of each input counts: its :func:`residual_variance`, or ones.
        spec: how it is quantized, by group.
    """

    weight: Array
    counts: npt.NDArray[np.float64]
    spec: TensorSpec

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """What an error of each input counts, relative to the size of the output that the same counts give, [in]."""
        size = self.counts @ np.square(self.weight, dtype=np.float64).sum(1)
        return self.counts / size if size else np.zeros(len(self.counts))

    def error(self, order: npt.NDArray[np.int64]) -> float:
        """Σ over groups of scale² · shares, up to a factor the squared error relative to the output."""
        scale = weight_grid(self.weight[order], self.spec).scale
        assert scale is not None
        assert self.spec.group_size is not None
        steps = np.square(scale, dtype=np.float64).reshape(len(scale), -1).sum(1)
        starts = np.arange(0, len(order), self.spec.group_size)
        return float(steps @ np.add.reduceat(self.shares[order], starts))


def residual_variance(rows: Array) -> npt.NDArray[np.float64]:
    """Of each input, what the inputs of smaller mean square do not explain linearly; relative to their mean, [in].

    Args:
        rows: [n, in], a sample of the inputs.

    Raises:
        DataError: they are not finite.
    """
    rows = np.asarray(rows, np.float64)
    hessian = rows.T @ rows
    order = np.argsort(-np.diag(hessian), kind="stable")
    upper, _ = inverse_root(hessian[np.ix_(order, order)], _DAMP)
    variance = np.empty(len(order))
    variance[order] = 1 / np.square(np.diag(upper))
    return variance / variance.mean()


def orders(readings: Sequence[Reading]) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Candidates, by what they are called; the order as given is the first."""
    yield "as given", np.arange(len(readings[0].weight))
    norms = np.sqrt(np.sum([_shares(np.square(each.weight, dtype=np.float64).sum(1)) for each in readings], axis=0))
    counts = np.sum([_shares(each.counts) for each in readings], axis=0)
    floor = 1e-6 * counts.max()
    for exponent in EXPONENTS:
        by = norms / np.maximum(counts, floor) ** exponent
        yield f"by norm / count^{exponent:g}", np.argsort(by, kind="stable")


def error_of(readings: Sequence[Reading], order: npt.NDArray[np.int64]) -> float:
    """The error of an order, summed over the readings."""
    return sum(each.error(order) for each in readings)


def best_order(readings: Sequence[Reading]) -> tuple[str, npt.NDArray[np.int64]]:
    """The candidate of least error, and what it is called."""
    return min(orders(readings), key=lambda candidate: error_of(readings, candidate[1]))


def _shares(values: Array) -> Array:
    total = values.sum()
    return values / total if total else values
