"""Which smoothing scale, and which range, suits a site: judged on data that did not make them.

Scales that are judged on the rows that set them overfit: every site gains, and the model loses. So the scale and the
range come from one fold of the calibration samples, the error from rows of the others; the final ones are made of all.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.affine import fake_quantize_dynamic, integer_range, scale_zero_point
from qcompiler.numerics.smoothing import rounded_weight, smoothing_scale
from qcompiler.scheme import TensorSpec

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float32]

ALPHAS = (0.5, 0.65, 0.8, 0.9, 1.0)
FLOORS = (2.0,)
MARGINS = (1.0, 1.2, 1.5, 2.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """One activation of a site, and the Linears that read it.

    Attributes:
        rows: float32 [n, K] sample of the activation.
        fold: int [n], the fold of each row.
        low, high: float32 [folds, K], extremes of each fold.
        weight: float32 [K, N], the Linears' weights side by side.
        columns: int [K], the site's channel that each feature carries (several may carry one), or -1: none.
    """

    rows: Array
    fold: Array
    low: Array
    high: Array
    weight: Array
    columns: Array


@dataclasses.dataclass(frozen=True)
class Candidate:
    """alpha None: no smoothing. ``floor``: see :func:`qcompiler.numerics.smoothing.smoothing_scale`."""

    alpha: float | None = None
    floor: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """The candidate of least error.

    Attributes:
        candidate: which one.
        scale: float32 [channels] from all folds; None: no smoothing.
        margins: for each reader, the factor on its min-max range (1 where its scales are dynamic).
        error: mean over readers of ‖Q(x / s) Q(s W) - x W‖² / ‖x W‖² on held-out rows.
        plain: the same without smoothing.
    """

    candidate: Candidate
    scale: Vector | None
    margins: tuple[float, ...]
    error: float
    plain: float


def search_site(
    readers: Sequence[Reader],
    activation: TensorSpec | None,
    weight: TensorSpec,
    *,
    channels: int,
    blocked: Array | None = None,
    alphas: Sequence[float] = ALPHAS,
    floors: Sequence[float] = FLOORS,
    margins: Sequence[float] = MARGINS,
    keep_plain: bool = True,
    reduce_range: bool = False,
) -> Choice:
    """Try each alpha with each floor, and no smoothing, on one site.

    Args:
        readers: all that read the site's channels.
        activation: static (min-max range times a margin), dynamic, or None: float.
        weight: spec of the weights.
        channels: of the site.
        blocked: bool [channels], where the scale must stay 1.
        margins: factors on a static range. The one with the least held-out error of the activation, each channel
            weighed by the squared norm of its weights, is judged.
        keep_plain: no smoothing may be chosen too; its error is told in any case.

    With fewer than two folds there is nothing to hold out: rows are judged by the scales they made.
    """
    judges = [_Judge(reader, activation, weight, margins, reduce_range) for reader in readers]
    limits = _Limits(readers, channels, blocked)
    candidates = [Candidate(), *(Candidate(alpha, floor) for alpha, floor in itertools.product(alphas, floors))]
    results = []
    for candidate in candidates:
        scales = [limits.scale(candidate, fold) for fold in range(limits.folds)]
        errors = [judge(scales) for judge in judges]
        results.append((float(np.mean([error for error, _ in errors])), tuple(margin for _, margin in errors)))
    best = min(range(0 if keep_plain else 1, len(results)), key=lambda i: results[i][0])
    error, chosen = results[best]
    scale = None if candidates[best].alpha is None else limits.scale(candidates[best], None)
    return Choice(candidates[best], scale, chosen, error, results[0][0])


class _Limits:
    """Channel maxima of a site: of the activation in each fold, and of the weights."""

    def __init__(self, readers: Sequence[Reader], channels: int, blocked: Array | None) -> None:
        self.folds = min(len(reader.low) for reader in readers)
        self._activation = np.zeros((self.folds, channels), np.float32)
        self._weight = np.zeros(channels, np.float32)
        for reader in readers:
            carried = reader.columns >= 0
            columns = reader.columns[carried]
            absmax = np.maximum(np.abs(reader.low), np.abs(reader.high))
            for fold in range(self.folds):
                np.maximum.at(self._activation[fold], columns, absmax[fold, carried])
            np.maximum.at(self._weight, columns, np.abs(reader.weight).max(1)[carried])
        if blocked is not None:
            self._weight[blocked] = 0  # as a dead channel: its scale is 1

    def scale(self, candidate: Candidate, fold: int | None) -> Vector:
        """Scale from one fold, or from all; [channels]."""
        if candidate.alpha is None:
            return np.ones(len(self._weight), np.float32)
        activation = self._activation.max(0) if fold is None else self._activation[fold]
        return smoothing_scale(activation, self._weight, candidate.alpha, floor=candidate.floor)


class _Judge:
    """Relative error of one reader's outputs on held-out rows."""

    def __init__(
        self, reader: Reader, activation: TensorSpec | None, weight: TensorSpec, margins: Sequence[float], reduced: bool
    ) -> None:
        self._reader = reader
        self._specs = activation, weight
        self._static = activation is not None and not activation.dynamic
        self._margins = tuple(margins) if self._static else (1.0,)
        self._reduced = reduced
        self._norms = np.einsum("kn,kn->k", reader.weight, reader.weight)
        self._exact = np.asarray(reader.rows, np.float32) @ np.asarray(reader.weight, np.float32)
        self._signal = float(np.vdot(self._exact, self._exact))
        self._held_out = list(_held_out(reader.fold, len(reader.low)))

    def __call__(self, scales: Sequence[Vector]) -> tuple[float, float]:
        """Error and margin, of scales [channels] from each fold."""
        folds = list(zip(map(self._spread, scales), self._held_out, strict=False))
        margin = self._margins[0] if len(self._margins) == 1 else self._best_margin(folds)
        noise = 0.0
        for fold, (s, held) in enumerate(folds):
            got = self._activation(held, s, fold, margin) @ self._rounded(s)
            got -= self._exact[held]
            noise += float(np.vdot(got, got))
        return (noise / self._signal if self._signal else 0.0), margin

    def _spread(self, scale: Vector) -> Vector:
        columns = self._reader.columns
        return np.where(columns >= 0, scale[columns], np.float32(1))

    def _best_margin(self, folds: Sequence[tuple[Vector, Array]]) -> float:
        errors = np.zeros(len(self._margins))
        for fold, (s, held) in enumerate(folds):
            x = self._reader.rows[held] / s
            weights = self._norms * s * s
            for i, margin in enumerate(self._margins):
                error = self._activation(held, s, fold, margin) - x
                errors[i] += float(np.einsum("nk,nk->k", error, error) @ weights)
        return self._margins[int(np.argmin(errors))]

    def _activation(self, held: Array, s: Vector, fold: int, margin: float) -> Array:
        """Q(x / s) of the held-out rows in the range of the fold."""
        spec = self._specs[0]
        x = self._reader.rows[held] / s
        if spec is None:
            return np.asarray(x)
        if spec.dynamic:
            return fake_quantize_dynamic(x, spec)
        low, high = (self._reader.low[fold] / s).min(), (self._reader.high[fold] / s).max()
        scale, zero_point = scale_zero_point(low * margin, high * margin, spec)
        q_low, q_high = (q - int(zero_point) for q in integer_range(spec))
        x /= scale
        np.rint(x, out=x)
        np.clip(x, q_low, q_high, out=x)
        x *= scale
        return np.asarray(x)

    def _rounded(self, s: Vector) -> Array:
        return rounded_weight(self._reader.weight * s[:, None], self._specs[1], self._reduced)


def _held_out(fold: Array, folds: int) -> Iterator[Array]:
    """For each fold, the rows that its scales are judged on: each row is judged once, by a fold that is not its own."""
    turn = np.arange(len(fold)) % max(folds - 1, 1)
    judged_by = (fold + 1 + turn) % folds if folds > 1 else fold
    return (np.flatnonzero(judged_by == f) for f in range(folds))
