"""Elementwise operators, comparisons and reductions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Integers are divided as in C, towards zero."""
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def modulo(a: Tensor, b: Tensor, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def maximum(*values: Tensor) -> Tensor:
    return functools.reduce(torch.maximum, values)


def minimum(*values: Tensor) -> Tensor:
    return functools.reduce(torch.minimum, values)


def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


def cumulative_sum(x: Tensor, axis: Tensor) -> Tensor:
    return torch.cumsum(x, int(axis)).to(x.dtype)


def _reduction(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reduction of torch over axes that arrive as a tensor; without any, over all or, if so asked, over none."""

    def reduce(x: Tensor, axes: Tensor | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        dims = axes.tolist() if axes is not None else []
        if not dims and noop_with_empty_axes:
            return x
        return function(x, dim=dims or list(range(x.ndim)), keepdim=bool(keepdims))

    return reduce


def _sum(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    return torch.sum(x, dim=dim, keepdim=keepdim, dtype=x.dtype)  # torch alone would widen int32


ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "Ceil": torch.ceil,
    "Clip": clip,
    "Cos": torch.cos,
    "CumSum": cumulative_sum,
    "Div": divide,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "IsNaN": torch.isnan,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "Max": maximum,
    "Min": minimum,
    "Mod": modulo,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Pow": torch.pow,
    "Reciprocal": torch.reciprocal,
    "ReduceL2": _reduction(torch.linalg.vector_norm),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin),
    "ReduceSum": _reduction(_sum),
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Where": torch.where,
    "Xor": torch.logical_xor,
}
