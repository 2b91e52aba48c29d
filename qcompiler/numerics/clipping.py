"""Clip ranges that minimise the squared error of quantization, on a histogram (activations) or on the weight itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.affine import dequantize_weight, quantize_weight, scale_zero_point, weight_absmax
from qcompiler.numerics.histogram import SIDE, Histogram
from qcompiler.scheme import TensorSpec

Array = npt.NDArray[Any]

_COARSE = 2.0 ** (
    -np.arange(25) / 4
)  # the range and 24 shorter ones, down to 1/64: outlier tokens reach 50 times the body
_FINE = 2.0 ** (np.arange(-4, 5) / 20)  # then neighbours of the best, within a coarse step
_FINEST = 2.0 ** (np.arange(-4, 5) / 100)


def mse_range(histogram: Histogram, bits: int = 8, symmetric: bool = False) -> tuple[float, float]:
    """The range [low, high] whose uniform quantization has the least mean squared error on the histogram.

    The minimisation of the sum of clipping and rounding errors (ACIQ, Banner et al. 2019, equation 1), done on the
    counts rather than on a fitted density: a search of all pairs of ends, coarse and then finer.

    Args:
        bits: of the integers, 2 to 8.
        symmetric: zero in the middle and 2^bits - 1 levels; else both ends are searched and there are 2^bits levels.

    Returns:
        The ends of the integer grid: ``scale_zero_point(low, high, spec)`` gives the grid that was judged.
    """
    bottom, top = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if bottom == top:
        return 0.0, 0.0
    if symmetric:
        bottom, top = -max(-bottom, top), max(-bottom, top)
    errors = _GridError(histogram, 2**bits - 1 if symmetric else 2**bits)
    best = (1.0, 1.0)
    for factors in (_COARSE, _FINE, _FINEST):
        low, high = (_candidates(best[side] * factors, symmetric or (bottom, top)[side] != 0.0) for side in (0, 1))
        lows, highs = (low, low) if symmetric else (np.repeat(low, high.size), np.tile(high, low.size))
        winner = int(np.argmin(errors(bottom * lows, top * highs)))
        best = float(lows[winner]), float(highs[winner])
    scale, zero_point = errors.grid(np.array([bottom * best[0]]), np.array([top * best[1]]))
    return float(-zero_point[0] * scale[0]), float((errors.levels - 1 - zero_point[0]) * scale[0])


def _candidates(fractions: Array, searched: bool) -> Array:
    """Fractions of the full range, the longest first, so that of equal errors it wins; never beyond the range."""
    return np.unique(np.minimum(fractions, 1.0))[::-1] if searched else np.ones(1)


class _GridError:
    """Sum of squared errors of uniform grids on a histogram, each in as many steps as the grid has levels.

    With running sums of the counts, of count · centre and of count · centre², the error of all numbers that round to
    one level is three differences: sum n (c - v)² = S2 - 2 v S1 + v² S0.
    """

    def __init__(self, histogram: Histogram, levels: int) -> None:
        self.levels = levels
        self._width = histogram.width
        centres = np.clip((np.arange(-SIDE, SIDE) + 0.5) * self._width, histogram.low, histogram.high)
        counts = histogram.counts.astype(np.float64)
        self._sums = [np.concatenate([[0.0], np.cumsum(counts * centres**power)]) for power in (0, 1, 2)]

    def grid(self, low: Array, high: Array) -> tuple[Array, Array]:
        """Scales and zero points (counted from the lowest level) of ranges, as ``scale_zero_point`` rounds them."""
        scale = (high - low) / (self.levels - 1)
        return scale, np.clip(np.rint(-low / scale), 0, self.levels - 1)

    def __call__(self, low: Array, high: Array) -> Array:
        """Error of each range; arrays [candidates]."""
        scale, zero_point = self.grid(low, high)
        values = (np.arange(self.levels) - zero_point[:, None]) * scale[:, None]
        edges = (values[:, :-1] + values[:, 1:]) / 2
        # A bin belongs to the level that its centre rounds to.
        inner = np.clip(np.ceil(edges / self._width - 0.5), -SIDE, SIDE).astype(np.int64) + SIDE
        ends = np.zeros((len(inner), 1), np.int64)
        place = np.concatenate([ends, inner, ends + 2 * SIDE], axis=1)
        s0, s1, s2 = (np.diff(total[place], axis=1) for total in self._sums)
        return np.asarray((s2 - 2 * values * s1 + values**2 * s0).sum(axis=1))


def mse_weight_scale(
    weight: Array,
    spec: TensorSpec,
    reduce_range: bool = False,
    importance: Array | None = None,
    steps: int = 11,
    shortest: float = 0.75,
) -> Array:
    """Scales of a weight [in, out] that minimise sum (Q(W) - W)², each set of weights that shares a scale by itself.

    Args:
        spec: per_tensor, per_channel or per_group.
        importance: mean x² of each input channel [in], to weigh the error as it reaches the output; default 1.
        steps: number of clip ranges tried, from max|W| down to ``shortest`` · max|W|.

    Returns:
        float32 scales for :func:`qcompiler.numerics.affine.quantize_weight`: [], [out] or [groups, out].
    """
    weight = np.asarray(weight, np.float32)
    reach = weight_absmax(weight, spec)
    best_scale = np.zeros(reach.shape, np.float32)
    best_error = np.full(reach.shape, np.inf)
    for factor in np.linspace(1.0, shortest, steps, dtype=np.float32):
        scale, _ = scale_zero_point(-reach * factor, reach * factor, TensorSpec("int8"), reduce_range)
        q, _ = quantize_weight(weight, spec, reduce_range, scale)
        error = (dequantize_weight(q, scale, spec) - weight) ** 2
        if importance is not None:
            error *= np.asarray(importance, np.float32)[:, None]
        total = _sum_shared(error, spec)
        better = total < best_error
        best_scale, best_error = np.where(better, scale, best_scale), np.where(better, total, best_error)
    return np.asarray(best_scale, np.float32)


def _sum_shared(error: Array, spec: TensorSpec) -> Array:
    """Sums of [in, out] over each set of weights that shares a scale."""
    if spec.granularity == "per_tensor":
        return np.asarray(error.sum(dtype=np.float64))
    if spec.group_size is None:
        return np.asarray(error.sum(0, dtype=np.float64))
    return np.asarray(np.add.reduceat(error, np.arange(0, error.shape[0], spec.group_size), axis=0), np.float64)
