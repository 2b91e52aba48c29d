"""SmoothQuant's scales (Xiao et al. 2023), and the rounding of a weight as a search over them does it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.affine import scale_zero_point
from qcompiler.numerics.grids import weight_grid
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


def rounded_weight(weight: Array, spec: TensorSpec, reduce_range: bool = False) -> Array:
    """Quantize and dequantize one weight [K, N]; float32, in place where it can be."""
    if spec.granularity == "per_group" or spec.bits < 8 or not spec.symmetric:
        return weight_grid(weight, spec, reduce_range).rounded(weight)
    # The same as quantize_weight without the trip through int8: a search does this a thousand times.
    reach = np.maximum(weight.max(0), -weight.min(0))
    if spec.granularity == "per_tensor":
        reach = np.full_like(reach, reach.max())
    scale, _ = scale_zero_point(0.0, reach, TensorSpec("int8"), reduce_range)
    weight /= scale
    np.rint(weight, out=weight)
    weight *= scale
    return weight
