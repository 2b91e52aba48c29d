"""exp, erf, tanh and what is made of them, on vectors: LLVM's own call libm for every lane.

Errors are relative, against float64, over the range where the result is a normal float.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import cast, f32, i32, lanes_of, typed

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""exp(r) = 1 + r + r² · p(r) on |r| <= ln(2)/2: Cephes' expf."""

_ERF_ABOVE = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_BELOW = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
"""erf(x) = x · above(x²) / below(x²) on |x| <= 4: the rational approximation that Eigen and XLA use."""


def round_even(x: Any) -> Any:
    """To the nearest integer, ties to even. (Adding and subtracting 1.5 · 2^23 would be simplified away.)"""
    return T.nearbyint(x)


def exp(x: Any) -> Any:
    """e^x within 2e-7; exactly 0 below -87.3, and at most e^88."""
    lanes = lanes_of(x)
    inside = tirx.min(tirx.max(x, f32(-87.33, lanes)), f32(88.0, lanes))
    n = round_even(inside * f32(1.44269504088896341, lanes))
    r = inside - n * f32(0.693359375, lanes) - n * f32(-2.12194440e-4, lanes)
    value = _horner(r, _EXP) * r * r + r + f32(1.0, lanes)
    power = T.reinterpret((cast(n, "int32") + i32(127, lanes)) << i32(23, lanes), dtype=typed("float32", lanes))
    return tirx.Select(x < f32(-87.33, lanes), f32(0.0, lanes), value * power)


def erf(x: Any) -> Any:
    """Within 4e-7 absolute."""
    lanes = lanes_of(x)
    inside = tirx.min(tirx.max(x, f32(-4.0, lanes)), f32(4.0, lanes))
    square = inside * inside
    return inside * _horner(square, _ERF_ABOVE) / _horner(square, _ERF_BELOW)


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)."""
    lanes = lanes_of(x)
    return f32(1.0, lanes) / (f32(1.0, lanes) + exp(f32(0.0, lanes) - x))


def tanh(x: Any) -> Any:
    """2 · sigmoid(2x) - 1: within 2e-7 absolute."""
    lanes = lanes_of(x)
    return f32(2.0, lanes) * sigmoid(x + x) - f32(1.0, lanes)


def relu(x: Any) -> Any:
    """max(x, 0)."""
    return tirx.max(x, f32(0.0, lanes_of(x)))


def gelu(x: Any) -> Any:
    """x · Φ(x), by erf."""
    lanes = lanes_of(x)
    return f32(0.5, lanes) * x * (f32(1.0, lanes) + erf(x * f32(0.70710678118654752, lanes)))


def gelu_tanh(x: Any) -> Any:
    """The tanh approximation of GELU (Hendrycks & Gimpel 2016)."""
    lanes = lanes_of(x)
    inner = f32(0.79788456080286536, lanes) * (x + f32(0.044715, lanes) * x * x * x)
    return x * sigmoid(inner + inner)


def silu(x: Any) -> Any:
    """x · sigmoid(x)."""
    return x * sigmoid(x)


ACTIVATIONS = {"relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu, "sigmoid": sigmoid, "tanh": tanh}


def _horner(x: Any, coefficients: Sequence[float]) -> Any:
    lanes = lanes_of(x)
    value = f32(coefficients[0], lanes)
    for coefficient in coefficients[1:]:
        value = value * x + f32(coefficient, lanes)
    return value
