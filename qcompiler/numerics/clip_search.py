"""Searches for the scales of one Linear's input and weight together: ADMM, EasyQuant, and ranges from a histogram.

Each takes the scales that are there and gives better ones by its own measure. Whether they are better for the Linear is
not theirs to say: :func:`output_error` is, on other rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.affine import fake_quantize_dynamic, integer_range, scale_zero_point
from qcompiler.numerics.clipping import mse_range, mse_weight_scale
from qcompiler.numerics.histogram import Histogram
from qcompiler.numerics.kl import kl_range
from qcompiler.scheme import TensorSpec

Array = npt.NDArray[Any]

_ROUNDS = 20  # of ADMM's alternation; it stops when no integer changes
# EasyQuant's interval about the scale; the nearest to 1 first, so that of equal cosines it wins.
_FACTORS = np.array(sorted(np.arange(12, 25) / 20, key=lambda f: abs(f - 1)), np.float32)
_EASY_ROUNDS = 2
_CHANNEL = TensorSpec("int8", True, "per_channel")


@dataclasses.dataclass(frozen=True, eq=False)
class Clipping:
    """The scales of one Linear.

    Attributes:
        spec: of the input; None: float. Dynamic inputs have no scale to search.
        scale, zero_point: of a static input.
        weight_scale: float32 [out].
        high: the largest integer of the weight, 127 or with a reduced range 64.
    """

    spec: TensorSpec | None
    scale: float
    zero_point: int
    weight_scale: npt.NDArray[np.float32]
    high: int = 127

    @property
    def static(self) -> bool:
        return self.spec is not None and not self.spec.dynamic

    def input(self, x: Array, scale: float | None = None) -> Array:
        """Quantize and dequantize rows [n, in]."""
        if self.spec is None:
            return x
        if self.spec.dynamic:
            return fake_quantize_dynamic(x, self.spec)
        s = np.float32(self.scale if scale is None else scale)
        low, high = (q - self.zero_point for q in integer_range(self.spec))
        return np.asarray(np.clip(np.rint(x / s), low, high) * s)

    def weight(self, weight: Array, scale: Array | None = None) -> Array:
        """Quantize and dequantize a weight [in, out]."""
        s = self.weight_scale if scale is None else scale
        return np.asarray(np.clip(np.rint(weight / s), -self.high, self.high) * s)


def output_error(x: Array, weight: Array, clipping: Clipping) -> float:
    """‖Q(x) Q(W) - x W‖² of rows [n, in] and a weight [in, out]."""
    difference = clipping.input(x) @ clipping.weight(weight) - x @ weight
    return float(np.vdot(difference, difference))


def mse(x: Array, weight: Array, start: Clipping) -> Clipping:
    """The range and the weight scales of least squared error (weights weighed by their input's mean square)."""
    found = _from_range(x, start, lambda h, spec: mse_range(h, symmetric=spec.symmetric))
    importance = np.mean(np.square(x, dtype=np.float64), axis=0)
    scale = mse_weight_scale(weight, _CHANNEL, start.high < 127, importance)
    return dataclasses.replace(found, weight_scale=scale)


def kl(x: Array, weight: Array, start: Clipping) -> Clipping:
    """The input's range of least Kullback-Leibler divergence."""
    return _from_range(x, start, lambda h, spec: kl_range(h, symmetric=spec.symmetric))


def percentile(x: Array, weight: Array, start: Clipping, percent: float = 99.99) -> Clipping:
    """The input's range that holds ``percent`` % of the numbers."""
    tail = (100 - percent) / 200
    return _from_range(x, start, lambda h, spec: (h.quantile(tail), h.quantile(1 - tail)))


def admm(x: Array, weight: Array, start: Clipping) -> Clipping:
    """Scale and integers in alternation, each the best for the other (Leng et al. 2018, equations 9 to 12)."""
    found = dataclasses.replace(start, weight_scale=admm_scale(weight, start.weight_scale, -start.high, start.high))
    if start.spec is None or start.spec.dynamic:
        return found
    low, high = (q - start.zero_point for q in integer_range(start.spec))
    scale = admm_scale(x.reshape(-1, 1), np.array([start.scale], np.float32), low, high)
    return dataclasses.replace(found, scale=float(scale[0]))


def admm_scale(x: Array, scale: Array, low: int, high: int) -> npt.NDArray[np.float32]:
    """The scale that a fixed point of q = clip(round(x / s)), s = Σxq / Σq² leads to; the squared error only falls.

    Args:
        x: [n, sets], each column with a scale of its own.
        scale: [sets], to start at.
        low, high: of the integers, counted from the zero point.
    """
    before: Array | None = None
    result = np.asarray(scale, np.float64)
    for _ in range(_ROUNDS):
        q = np.clip(np.rint(x / result), low, high)
        if before is not None and np.array_equal(q, before):
            break
        square = (q * q).sum(0, dtype=np.float64)
        fitted = (x * q).sum(0, dtype=np.float64)
        result = np.where((square > 0) & (fitted > 0), fitted / np.where(square > 0, square, 1.0), result)
        before = q
    return result.astype(np.float32)


def eq(x: Array, weight: Array, start: Clipping) -> Clipping:
    """EasyQuant (Wu et al. 2020, section 3.2): scales of weight and input in turn, by the cosine of the outputs.

    A weight channel has its scale by the cosine of its own output, the input by that of all outputs together. Of equal
    cosines the one nearest to the old scale wins.
    """
    exact = np.asarray(x @ weight)
    best = start
    for _ in range(_EASY_ROUNDS):
        seen = best.input(x)
        cosines = np.stack([_cosine(exact, seen @ best.weight(weight, start.weight_scale * f), 0) for f in _FACTORS])
        scale = (start.weight_scale * _FACTORS[np.argmax(cosines, axis=0)]).astype(np.float32)
        best = dataclasses.replace(best, weight_scale=scale)
        if not best.static:
            break
        rounded = best.weight(weight)
        overall = [float(_cosine(exact, best.input(x, start.scale * float(f)) @ rounded, None)) for f in _FACTORS]
        chosen = start.scale * float(_FACTORS[int(np.argmax(overall))])
        if chosen == best.scale:
            break
        best = dataclasses.replace(best, scale=chosen)
    return best


METHODS: Mapping[str, Callable[[Array, Array, Clipping], Clipping]] = {
    "mse": mse,
    "kl": kl,
    "percentile": percentile,
    "admm": admm,
    "eq": eq,
}


def _cosine(a: Array, b: Array, axis: int | None) -> Array:
    norm = np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
    return np.asarray((a * b).sum(axis) / np.where(norm > 0, norm, 1.0))


def _from_range(x: Array, start: Clipping, find: Callable[[Histogram, TensorSpec], tuple[float, float]]) -> Clipping:
    if start.spec is None or start.spec.dynamic:
        return start
    histogram = Histogram()
    histogram.add(np.ascontiguousarray(x, np.float32))
    scale, zero_point = scale_zero_point(*find(histogram, start.spec), start.spec)
    return dataclasses.replace(start, scale=float(scale), zero_point=int(zero_point))
