"""SmoothQuant's scales (Xiao et al. 2023) and the error by which a search chooses among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.core import parse_spelling
from qcompiler.numerics.affine import fake_quantize_dynamic, integer_range, quantize_weight, scale_zero_point
from qcompiler.numerics.clipping import mse_range
from qcompiler.numerics.histogram import Histogram
from qcompiler.numerics.kl import kl_range
from qcompiler.scheme import TensorSpec

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float32]
_FAINTEST = 1e-5  # of the largest: fainter channels count as much, so that no scale explodes


def smoothing_scale(
    activation_absmax: Array,
    weight_absmax: Array,
    alpha: float,
    normalise: str | None = "geometric",
    floor: float = 0.0,
) -> Vector:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (SmoothQuant, equation 4); x is then divided by s, W multiplied.

    Args:
        activation_absmax, weight_absmax: [channels]; the weight's over all Linears that read the activation.
        alpha: migration strength, 0 (weights are evened out) to 1 (activations are).
        normalise: a common factor of s changes no result of a quantization in per-tensor or per-channel scales;
            "geometric" makes the geometric mean 1, which keeps numbers tame, "max" the largest 1, None neither.
        floor: fainter activation channels count as this fraction of the median channel: what was nearly silent in
            calibration may fire on other data, and must not have been divided by next to nothing.

    Returns:
        float32 [channels], positive; 1 for dead channels (activation or weights all zero).
    """
    live = (activation_absmax > 0) & (weight_absmax > 0)
    scale = np.ones(np.shape(activation_absmax), np.float64)
    if live.any():
        x, w = (_lifted(np.asarray(a, np.float64)[live]) for a in (activation_absmax, weight_absmax))
        x = np.maximum(x, floor * np.median(x))
        log = alpha * np.log(x) - (1 - alpha) * np.log(w)
        scale[live] = np.exp(log - {"geometric": log.mean(), "max": log.max(), None: 0.0}[normalise])
    return scale.astype(np.float32)


def _lifted(absmax: Array) -> Array:
    return np.asarray(np.maximum(absmax, _FAINTEST * absmax.max()))


class SiteError:
    """The relative output error of a site's Linears as a function of the smoothing scale.

    The products in float are made once; each candidate then costs one product in float32 and a pass over the weights.

    Args:
        rows: float32 [n, K], a sample of the activation that the Linears read.
        weights: float32 [K, N_i] of each.
        activation: how the activation is quantized, or None: not at all. A static range is that of its observer on
            the rows.
        weight: how the weights are quantized.
        reduce_range: weights keep 7 bits.
        low, high: float32 [K], extremes of each channel over all data: what a static minmax range is made of, in place
            of the rows' own.
    """

    def __init__(
        self,
        rows: Array,
        weights: Sequence[Array],
        activation: TensorSpec | None,
        weight: TensorSpec,
        *,
        reduce_range: bool = False,
        low: Array | None = None,
        high: Array | None = None,
    ) -> None:
        self._rows = np.asarray(rows, np.float32)
        self._weight = np.concatenate([np.asarray(w, np.float32) for w in weights], axis=1)
        self._edges = np.cumsum([0, *(w.shape[1] for w in weights)])[:-1]
        self._exact = self._rows @ self._weight
        self._signal = self._per_linear(self._exact)
        self._specs = activation, weight
        self._reduce_range = reduce_range
        self._extremes = (
            self._rows.min(0) if low is None else np.asarray(low, np.float32),
            self._rows.max(0) if high is None else np.asarray(high, np.float32),
        )

    def __call__(self, scale: Array | None = None) -> float:
        """Sum over the Linears of ‖Q(x / s) Q(s · W) - x W‖² / ‖x W‖² for s = ``scale`` [K]; None: s = 1."""
        s = np.ones(self._rows.shape[1], np.float32) if scale is None else np.asarray(scale, np.float32)
        got = self._quantized_rows(s) @ self._quantized_weight(s)
        got -= self._exact
        live = self._signal > 0
        return float((self._per_linear(got)[live] / self._signal[live]).sum())

    def _per_linear(self, output: Array) -> Array:
        """Squared norm of each Linear's columns."""
        return np.asarray(np.add.reduceat(np.einsum("nk,nk->k", output, output).astype(np.float64), self._edges))

    def _quantized_weight(self, s: Vector) -> Array:
        spec = self._specs[1]
        scaled = self._weight * s[:, None]
        if spec.granularity == "per_tensor":
            parts = np.split(scaled, self._edges[1:], axis=1)
            return np.concatenate([rounded_weight(part, spec, self._reduce_range) for part in parts], axis=1)
        return rounded_weight(scaled, spec, self._reduce_range)

    def _quantized_rows(self, s: Vector) -> Array:
        spec = self._specs[0]
        x = self._rows / s
        if spec is None:
            return x
        if spec.dynamic:
            return fake_quantize_dynamic(x, spec)
        low, high = self._static_range(x, s, spec)
        scale, zero_point = scale_zero_point(low, high, spec)
        x /= scale
        np.rint(x, out=x)
        q_low, q_high = (q - int(zero_point) for q in integer_range(spec))
        np.clip(x, q_low, q_high, out=x)
        x *= scale
        return x

    def _static_range(self, x: Array, s: Vector, spec: TensorSpec) -> tuple[float, float]:
        [(name, options)] = parse_spelling(spec.observer)
        if name not in ("mse", "kl", "percentile"):
            low, high = self._extremes
            return float((low / s).min()), float((high / s).max())
        histogram = Histogram()
        histogram.add(x)
        if name == "percentile":
            tail = (100 - float(options.get("percent", 99.99))) / 200
            return histogram.quantile(tail), histogram.quantile(1 - tail)
        return (mse_range if name == "mse" else kl_range)(histogram, symmetric=spec.symmetric)


def site_error(
    rows: Array,
    weights: Sequence[Array],
    scale: Array | None,
    activation: TensorSpec | None,
    weight: TensorSpec,
    *,
    reduce_range: bool = False,
    low: Array | None = None,
    high: Array | None = None,
) -> float:
    """:class:`SiteError` of one scale; where several are tried, keep the object: it makes the float products once."""
    return SiteError(rows, weights, activation, weight, reduce_range=reduce_range, low=low, high=high)(scale)


def rounded_weight(weight: Array, spec: TensorSpec, reduce_range: bool = False) -> Array:
    """Quantize and dequantize one weight [K, N]; float32, in place where it can be."""
    if spec.granularity == "per_group":
        q, scale = quantize_weight(weight, spec, reduce_range)
        return np.asarray(q * np.repeat(scale, spec.group_size or 1, axis=0)[: len(weight)])
    # The same as quantize_weight without the trip through int8: a search does this a thousand times.
    reach = np.maximum(weight.max(0), -weight.min(0))
    if spec.granularity == "per_tensor":
        reach = np.full_like(reach, reach.max())
    scale, _ = scale_zero_point(0.0, reach, TensorSpec("int8"), reduce_range)
    weight /= scale
    np.rint(weight, out=weight)
    weight *= scale
    return weight
