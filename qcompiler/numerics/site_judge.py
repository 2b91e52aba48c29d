"""What a scale, a shift and a quantization do to the outputs of a site, on rows of calibration data that made none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.affine import fake_quantize_dynamic, integer_range, scale_zero_point
from qcompiler.numerics.smoothing import rounded_weight
from qcompiler.scheme import TensorSpec

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, eq=False)
class Transform:
    """x' = (x - shift) / scale, each float32 [channels]; None: x as it is in that respect."""

    scale: Vector | None = None
    shift: Vector | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """One activation of a site, and the Linears that read it.

    Attributes:
        rows: float32 [n, K] sample of the activation.
        fold: int [n], the fold of each row.
        low, high: float32 [folds, K], extremes of each fold.
        weight: float32 [K, N], the Linears' weights side by side.
        columns: int [K], the site's channel that each feature carries (several may carry one), or -1: none.
        bits: int [N], of the weight of each output; None: those of the spec that it is judged with.
    """

    rows: Array
    fold: Array
    low: Array
    high: Array
    weight: Array
    columns: Array
    bits: Array | None = None

    def spread(self, transform: Transform) -> tuple[Vector | None, Vector | None]:
        """Scale and shift [channels] of a transform by feature [K]."""
        s, z = transform.scale, transform.shift
        return (
            None if s is None else np.where(self.columns >= 0, s[self.columns], np.float32(1)),
            None if z is None else np.where(self.columns >= 0, z[self.columns], np.float32(0)),
        )

    def extremes(self, transform: Transform, margin: float) -> tuple[np.float32, np.float32]:
        """The least and the greatest number of the transformed activation, times a margin."""
        low, high = (_transformed(extreme, *self.spread(transform)) for extreme in (self.low, self.high))
        return np.float32(low.min() * margin), np.float32(high.max() * margin)


class Judge:
    """Relative error of one reader's outputs on held-out rows.

    Squared errors count in two ways, half each: pooled over all rows (tokens), and each row's divided by the square of
    what is exact there plus the median of that over all rows. Pooled alone, a few tokens a thousand times as large as
    the others would be all that counts; by row alone, those few, which attention may hang on, would hardly count.

    Args:
        specs: ways to quantize the activation (None: float). The one with the least held-out error of the activation,
            each channel weighed by the squared norm of its weights, is judged.
        loss: one of :data:`LOSSES`.
        reduced: weights keep 7 bits.
    """

    def __init__(
        self,
        reader: Reader,
        specs: Sequence[tuple[TensorSpec | None, float]],
        weight: TensorSpec,
        reduced: bool = False,
        loss: str = "mse",
    ) -> None:
        self.reader, self._weight, self._reduced = reader, weight, reduced
        self._specs = tuple(specs)
        self._norms = np.einsum("kn,kn->k", reader.weight, reader.weight)
        self._exact = np.asarray(reader.rows, np.float32) @ np.asarray(reader.weight, np.float32)
        self._loss = LOSSES[loss]
        self._root = _row_weights(self._exact) if loss == "mse" else None
        self._held_out = list(held_out(reader.fold, len(reader.low)))
        self._of_nothing = sum(self._lost(np.zeros_like(self._exact[held]), held) for held in self._held_out)

    def __call__(self, transforms: Sequence[Transform]) -> tuple[float, int]:
        """The error, and the number of the spec that it was reached with, of a transform made from each fold."""
        folds = [(*self.reader.spread(each), held) for each, held in zip(transforms, self._held_out, strict=False)]
        best = 0 if len(self._specs) == 1 else self._best_spec(folds)
        error = sum(self._lost(self._output(s, z, held, i, best), held) for i, (s, z, held) in enumerate(folds))
        return (error / self._of_nothing if self._of_nothing else 0.0), best

    def _lost(self, got: Array, held: Array) -> float:
        exact = self._exact[held]
        if self._root is not None:
            got, exact = got * self._root[held], exact * self._root[held]
        return self._loss(got, exact)

    def _output(self, s: Vector | None, z: Vector | None, held: Array, fold: int, spec: int) -> Array:
        """Q((x - z) / s) Q(s W) + z W."""
        x = _transformed(self.reader.rows[held], s, z)
        weight = self.reader.weight.copy() if s is None else self.reader.weight * s[:, None]
        got = self._quantized(x, s, z, fold, spec) @ self.rounded(weight)
        if z is not None:
            got += z @ self.reader.weight
        return np.asarray(got)

    def range_of(self, s: Vector | None, z: Vector | None, fold: int) -> tuple[np.float32, np.float32]:
        """What a static range of x' covers, as one fold knows it, before the margin."""
        low, high = (_transformed(extreme[fold], s, z) for extreme in (self.reader.low, self.reader.high))
        return low.min(), high.max()

    def rounded(self, weight: Array) -> Array:
        """Q(W'), which may be written to."""
        bits = self.reader.bits
        if bits is None or (bits == self._weight.bits).all():
            return rounded_weight(weight, self._weight, self._reduced)
        for number in np.unique(bits):
            part = bits == number
            weight[:, part] = rounded_weight(weight[:, part], self._weight.with_bits(int(number)), self._reduced)
        return weight

    def _best_spec(self, folds: Sequence[tuple[Vector | None, Vector | None, Array]]) -> int:
        errors = np.zeros(len(self._specs))
        for fold, (s, z, held) in enumerate(folds):
            x = _transformed(self.reader.rows[held], s, z)
            weights = self._norms if s is None else self._norms * s * s
            for i in range(len(self._specs)):
                error = self._quantized(x, s, z, fold, i) - x
                if self._root is not None:
                    error *= self._root[held]
                errors[i] += float(np.einsum("nk,nk->k", error, error) @ weights)
        return int(np.argmin(errors))

    def _quantized(self, x: Array, s: Vector | None, z: Vector | None, fold: int, number: int) -> Array:
        """Q(x') of the held-out rows, where static in the range of the fold, widened by the spec's margin."""
        spec, margin = self._specs[number]
        if spec is None:
            return x
        if spec.dynamic:
            return fake_quantize_dynamic(x, spec)
        low, high = self.range_of(s, z, fold)
        scale, zero_point = scale_zero_point(low * margin, high * margin, spec)
        q_low, q_high = (q - int(zero_point) for q in integer_range(spec))
        q = x / scale
        np.rint(q, out=q)
        np.clip(q, q_low, q_high, out=q)
        q *= scale
        return np.asarray(q)


def _transformed(x: Array, s: Vector | None, z: Vector | None) -> Array:
    x = x if z is None else x - z
    return np.asarray(x if s is None else x / s)


def _row_weights(exact: Array) -> Array:
    """Square roots of the weights of rows [n, 1], whose mean square is 1."""
    squares = np.maximum(np.einsum("nk,nk->n", exact, exact, dtype=np.float64), np.finfo(np.float32).tiny)
    by_row = 1 / (squares + np.median(squares))
    weights = 1 / squares.sum() + by_row / (by_row @ squares)
    return np.sqrt(weights / weights.mean())[:, None].astype(np.float32)


def _squared(got: Array, exact: Array) -> float:
    difference = got - exact
    return float(np.vdot(difference, difference))


def _absolute(got: Array, exact: Array) -> float:
    return float(np.abs(got - exact).sum(dtype=np.float64))


def _angular(got: Array, exact: Array) -> float:
    """Sum over rows of 1 - cosine."""
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(exact, axis=1)
    dots = np.einsum("nk,nk->n", got, exact)
    return float((1 - np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)).sum(dtype=np.float64))


LOSSES: Mapping[str, Callable[[Array, Array], float]] = {"mse": _squared, "mae": _absolute, "cosine": _angular}
"""Loss of outputs [n, N] against exact ones. An error is told relative to the loss of outputs that are all zero."""


def held_out(fold: Array, folds: int) -> Iterator[Array]:
    """For each fold, the rows that its scales are judged on: each row is judged once, by a fold that is not its own."""
    turn = np.arange(len(fold)) % max(folds - 1, 1)
    judged_by = (fold + 1 + turn) % folds if folds > 1 else fold
    return (np.flatnonzero(judged_by == f) for f in range(folds))
