"""Affine quantization: x ≈ scale · (q - zero_point) with q an 8-bit integer (Jacob et al. 2018, equation 1).

Rounding is to nearest, ties to even, and out of range values saturate: bit for bit what ONNX QuantizeLinear does in
ONNX Runtime.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.core import OptionError
from qcompiler.scheme import DTYPES, TensorSpec

Array = npt.NDArray[Any]
_TINY = np.finfo(np.float32).tiny  # the smallest normal number: runtimes may flush what is below to zero


def integer_range(spec: TensorSpec, reduce_range: bool = False) -> tuple[int, int]:
    """The smallest and largest integer in use, zero point included.

    Symmetric ranges of 8 or 16 bits are narrow, [-127, 127] about the zero point; fewer bits leave no number unused.
    ``reduce_range`` keeps 7 of 8 bits, so that the sum of two u8 x s8 products fits 16 bits (x86 before VNNI:
    2 · 255 · 64 < 2^15).

    Raises:
        OptionError: numbers that are no integers (nf4, float16 …).
    """
    if spec.dtype not in DTYPES:
        raise OptionError(f"{spec.dtype} is no grid of integers.")
    low, high = DTYPES[spec.dtype]
    if spec.bits < 8:
        return low, high
    if spec.symmetric:
        middle = fixed_zero_point(spec)
        reach = 64 if reduce_range and spec.bits == 8 else high - middle
        return middle - reach, middle + reach
    return (low // 2, high // 2) if reduce_range else (low, high)


def fixed_zero_point(spec: TensorSpec) -> int:
    """The zero point of a symmetric spec: the middle of the dtype, 0 for int8 and 128 for uint8."""
    low, high = DTYPES[spec.dtype]
    return (low + high + 1) // 2


def scale_zero_point(
    low: npt.ArrayLike, high: npt.ArrayLike, spec: TensorSpec, reduce_range: bool = False
) -> tuple[Array, Array]:
    """Scale and zero point that cover [low, high] and hold zero exactly.

    Args:
        low, high: scalars, or arrays of one shape (one range each), finite, low <= high.
        spec: dtype and symmetry count, granularity does not.

    Returns:
        scale float32 and zero_point of the spec's dtype (int8 or uint8 for fewer bits), both of the shape of ``low``. A
        range of zero width at zero (a tensor of zeros) gets scale 1.
    """
    q_low, q_high = integer_range(spec, reduce_range)
    dtype = np.int8 if q_low < 0 else np.uint8
    bottom = np.minimum(np.asarray(low, np.float64), 0.0)
    top = np.maximum(np.asarray(high, np.float64), 0.0)
    if spec.symmetric:
        zero_point = fixed_zero_point(spec)
        reach = np.maximum(top, -bottom)
        scale = _positive(reach / (q_high - zero_point))
        return scale, np.full(scale.shape, zero_point, dtype)
    scale = _positive((top - bottom) / (q_high - q_low))
    zero_points = np.clip(np.rint(q_low - bottom / scale), q_low, q_high)
    return scale, np.asarray(zero_points, dtype)


def _positive(scale: Array) -> Array:
    return np.asarray(np.where(scale > 0, np.maximum(scale, _TINY), 1.0), np.float32)


def quantize(x: Array, scale: npt.ArrayLike, zero_point: npt.ArrayLike, group_size: int | None = None) -> Array:
    """QuantizeLinear: saturate(round(x / scale) + zero_point) to the whole range of the zero point's dtype.

    Args:
        x: float, any shape.
        scale, zero_point: broadcast against x (per-channel: along its last axis); with ``group_size`` of shape
            [ceil(rows / group_size), columns] for an x of [rows, columns]. ``zero_point`` is an array of int8 or uint8.
    """
    zero_point = np.asarray(zero_point)
    scale = np.asarray(scale, np.float32)
    if group_size is not None:
        scale, zero_point = (_spread(a, group_size, x.shape[0]) for a in (scale, zero_point))
    limits = np.iinfo(zero_point.dtype)
    with np.errstate(over="ignore"):
        q = np.asarray(x, np.float32) / scale
    np.rint(q, out=q)
    q += zero_point.astype(np.float32)
    return np.clip(q, limits.min, limits.max, out=q).astype(zero_point.dtype)


def dequantize(q: Array, scale: npt.ArrayLike, zero_point: npt.ArrayLike, group_size: int | None = None) -> Array:
    """DequantizeLinear: (q - zero_point) · scale in float32; arguments as :func:`quantize`."""
    scale, zero_point = np.asarray(scale, np.float32), np.asarray(zero_point)
    if group_size is not None:
        scale, zero_point = (_spread(a, group_size, q.shape[0]) for a in (scale, zero_point))
    return (np.asarray(q, np.float32) - zero_point.astype(np.float32)) * scale


def fake_quantize(x: Array, scale: npt.ArrayLike, zero_point: npt.ArrayLike, group_size: int | None = None) -> Array:
    """dequantize(quantize(x)) in float32; arguments as :func:`quantize`."""
    return dequantize(quantize(x, scale, zero_point, group_size), scale, zero_point, group_size)


def fake_quantize_dynamic(x: Array, spec: TensorSpec) -> Array:
    """Quantize and dequantize with scales taken from x itself, as the run time does.

    per_token takes a scale for each row about the spec's zero point (as ``qcompiler::FakeQuantPerToken``), per_group
    max|x| / 127 of each ``group_size`` columns, per_tensor one range of the array (DynamicQuantizeLinear).
    """
    x = np.asarray(x, np.float32)
    if not x.size:
        return x
    if spec.granularity == "per_tensor":
        scale, zero_point = scale_zero_point(x.min(), x.max(), spec)
        return fake_quantize(x, scale, zero_point)
    if spec.granularity == "per_token":
        return _rows_about(x, row_zero_point(spec))
    if spec.group_size is None:
        raise OptionError(f"activations cannot be quantized {spec.granularity} at run time.")
    edges = range(0, x.shape[-1], spec.group_size)
    return np.concatenate([_rows_about(x[..., start : start + spec.group_size], 128) for start in edges], axis=-1)


def row_zero_point(spec: TensorSpec) -> int:
    """The uint8 zero point of a spec's per-token scales; 128 is symmetric."""
    if spec.zero_point is None:
        return 128
    return spec.zero_point + (128 if spec.dtype == "int8" else 0)


def _rows_about(x: Array, zero_point: int) -> Array:
    """The least scale of each row whose integers fit [1, 255] about the zero point."""
    above, below = np.float32(255 - zero_point), np.float32(zero_point - 1)
    reach = np.maximum(x.max(-1, keepdims=True) / above, -x.min(-1, keepdims=True) / below)
    scale = np.maximum(reach, np.float32(1e-30))
    q = x / scale
    np.rint(q, out=q)
    q *= scale
    return q


def quantize_weight(
    weight: Array,
    spec: TensorSpec,
    reduce_range: bool = False,
    scale: Array | None = None,
) -> tuple[Array, Array]:
    """Round a Linear's weight to nearest, symmetrically.

    Args:
        weight: float [in, out].
        spec: per_tensor, per_channel (one scale an output channel) or per_group (``group_size`` input channels of one
            output channel share a scale; the last group may be short).
        reduce_range: keep 7 bits.
        scale: scales to use, e.g. of :func:`qcompiler.numerics.clipping.mse_weight_scale`; default max|W| / 127.

    Returns:
        q int8 [in, out], with -127 <= q <= 127, and scale float32: [], [out] or [ceil(in / group_size), out].

    Raises:
        OptionError: a spec that weights cannot have.
    """
    if scale is None:
        scale, _ = scale_zero_point(0.0, weight_absmax(weight, spec), _signed(spec), reduce_range)
    q_low, q_high = integer_range(_signed(spec), reduce_range)
    q = quantize(weight, scale, np.zeros(scale.shape, np.int8), spec.group_size)
    return np.clip(q, q_low, q_high), scale


def weight_absmax(weight: Array, spec: TensorSpec) -> Array:
    """max|W| of each set of weights [in, out] that shares a scale: [], [out] or [ceil(in / group_size), out]."""
    if not spec.symmetric or spec.dynamic:
        raise OptionError(f"weights are quantized symmetrically and ahead of time, not {spec}.")
    magnitude = np.abs(np.asarray(weight, np.float32))
    if spec.granularity == "per_tensor":
        return np.asarray(magnitude.max(initial=0.0))
    if spec.granularity == "per_channel":
        return np.asarray(magnitude.max(0, initial=0.0))
    if spec.group_size is None:
        raise OptionError(f"weights cannot be quantized {spec.granularity}.")
    return np.asarray(np.maximum.reduceat(magnitude, np.arange(0, magnitude.shape[0], spec.group_size), axis=0))


def dequantize_weight(q: Array, scale: Array, spec: TensorSpec) -> Array:
    """The float32 weight [in, out] that (q, scale) of :func:`quantize_weight` stands for."""
    return dequantize(q, scale, np.zeros(scale.shape, np.int8), spec.group_size)


def _signed(spec: TensorSpec) -> TensorSpec:
    """Weights are held as int8; a kernel that wants uint8 about 128 adds 128 when it is lowered to."""
    return TensorSpec("int8", True, spec.granularity, spec.group_size)


def _spread(per_group: Array, group_size: int, rows: int) -> Array:
    return np.repeat(per_group, group_size, axis=0)[:rows]
