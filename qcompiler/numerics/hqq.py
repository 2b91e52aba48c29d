"""HQQ: the scale and zero point of each group of a weight, refitted without any data (Badri and Shaji 2023).

Half-quadratic quantization minimises Σ|w - ŵ|^p over the grid of each group, with p < 1 a loss that a few large errors
hardly move. An auxiliary error e splits it into two easy steps: e = shrink(w - ŵ), the proximal operator of the l_p
norm, and a quadratic fit of the grid to w - e. The authors move a zero point in float and leave the scale; here the
scale is fitted too, because zero points are whole numbers: MatMulNBits takes float ones, but then dequantizes the
weight in every run (onnxruntime 1.31, 768 x 768 and one row: 20 times as long) and multiplies no integers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.grids import Grid

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float32]

STARTS, STARTS_OF_TWO_BITS = np.linspace(1.0, 0.85, 4), np.linspace(1.0, 0.5, 6)
"""Parts of the full range whose loss is looked at: the steps go on from the best, for each ends in its own minimum.

Smaller parts are not: with p < 1 there are grids there that hit more numbers and miss the others by far. Normal weights
in int4 by 32, p = 0.7: down to 0.85 of the range 0.88 of the loss and 0.73 of the squared error of rounding to nearest,
down to 0.5 of it 0.84 and 1.34.
"""
CHUNK = 1 << 18
"""Weights that are worked on at once: they stay in the processor's cache, and need no memory to speak of."""


@dataclasses.dataclass(frozen=True)
class HalfQuadratic:
    """How the loss is minimised.

    Attributes:
        p: of the norm; 2: least squares.
        beta: weight of the quadratic step, for errors in steps of the grid; ``kappa``: its growth by iteration.
        iterations: from the best start.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 8


def hqq_grid(weight: Array, grid: Grid, options: HalfQuadratic = HalfQuadratic(), chunk: int = CHUNK) -> Grid:
    """The grid of least Σ|w - ŵ|^p in each group that the half-quadratic steps come across; never a worse one.

    Args:
        weight: [in, out].
        grid: with groups and scales [groups, out]: where to start. Zero points of a signed grid stay as they are, those
            of an unsigned one move in whole numbers.
        chunk: weights that are worked on at once, which is what memory is needed for; no result depends on it.
    """
    assert grid.scale is not None
    assert grid.group_size is not None
    scale = np.array(grid.scale, np.float32)
    zero_point = np.zeros_like(scale) if grid.zero_point is None else np.array(grid.zero_point, np.float32)
    for groups, columns in _parts(weight.shape, grid.group_size, chunk):
        inputs = slice(groups.start * grid.group_size, groups.stop * grid.group_size)
        start = scale[groups, columns]
        rows = np.asarray(weight[inputs, columns], np.float32).reshape(len(start), -1, start.shape[1])
        steps = np.empty((rows.shape[1], len(start), start.shape[1]), np.float32)
        np.divide(rows.transpose(1, 0, 2), start, out=steps)
        fit = _Fit(steps.reshape(len(steps), -1), grid.low, grid.high, options)
        factor, zero = fit(zero_point[groups, columns].reshape(-1))
        scale[groups, columns] *= factor.reshape(start.shape)
        zero_point[groups, columns] = zero.reshape(start.shape)
    return dataclasses.replace(grid, scale=scale, zero_point=zero_point)


def attraction(error: Array, power: Array, beta: float) -> Array:
    """x - shrink(x) with shrink(x) = sign(x) · max(|x| - |x|^(p - 1) / beta, 0), the proximal operator of HQQ.

    Args:
        error: x.
        power: |x|^p; it is overwritten.
        beta: weight of the quadratic step.
    """
    size = np.abs(error)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.divide(power, size, out=power)
    power *= np.float32(1 / beta)
    return np.copysign(np.fmin(power, size, out=power), error, out=power)  # fmin: 0 / 0 is not taken


class _Fit:
    """Scales and zero points of groups side by side.

    Args:
        weights: [size, n], in units of the scale that each group starts from.
    """

    def __init__(self, weights: Array, low: int, high: int, options: HalfQuadratic) -> None:
        self._weights, self._low, self._high, self._options = weights, low, high, options
        self._q, self._error, self._power = (np.empty_like(weights) for _ in range(3))

    def __call__(self, zero_point: Vector) -> tuple[Vector, Vector]:
        """The best factor of the scale and zero point [n], from 1 and these on."""
        best = np.ones_like(zero_point), zero_point.copy()
        least = self._look(*best)
        # A signed grid of few bits has one number more below zero: a negative scale gives it to the other side.
        signs = (1, -1) if self._low == -self._high - 1 else (1,)
        parts = STARTS if self._high - self._low > 3 else STARTS_OF_TWO_BITS
        for part in np.outer(parts, signs).reshape(-1)[1:]:
            self._keep(np.full_like(least, part), zero_point, best, least)
        factor, zero_point = best[0].copy(), best[1].copy()
        self._look(factor, zero_point)
        for iteration in range(self._options.iterations):
            factor, zero_point = self._step(factor, zero_point, self._options.beta * self._options.kappa**iteration)
            self._keep(factor, zero_point, best, least)
        return best

    def _keep(self, factor: Vector, zero_point: Vector, best: tuple[Vector, Vector], least: Vector) -> None:
        """Look at a grid; where it loses less, it becomes ``best``."""
        loss = self._look(factor, zero_point)
        better = loss < least
        for old, new in ((best[0], factor), (best[1], zero_point), (least, loss)):
            np.copyto(old, new, where=better)

    def _look(self, factor: Vector, zero_point: Vector) -> Vector:
        """The loss [n] of a grid; its q - zero_point, error in steps and |error|^p are left for :meth:`_step`."""
        np.multiply(self._weights, 1 / factor, out=self._error)
        np.rint(self._error, out=self._q)
        np.maximum(self._q, self._low - zero_point, out=self._q)
        np.minimum(self._q, self._high - zero_point, out=self._q)
        self._error -= self._q
        p = np.float32(self._options.p)
        np.power(np.abs(self._error, out=self._power), p, out=self._power)
        return np.asarray(_sum(self._power) * np.abs(factor) ** p, np.float32)

    def _step(self, factor: Vector, zero_point: Vector, beta: float) -> tuple[Vector, Vector]:
        """e = shrink(w - ŵ) in steps of the grid; then the least squares fit of zero point and scale to w - e."""
        pull = attraction(self._error, self._power, beta)  # the goal w - e is q - zero_point + pull
        goal = np.add(self._q, pull, out=self._error)
        if self._low >= 0:
            # HQQ's update: the mean of q - goal / scale, here to a whole number.
            new = np.clip(np.rint(zero_point - _sum(pull) / np.float32(len(pull))), self._low, self._high)
            self._q += zero_point - new
            zero_point = new
        goal *= self._q
        across = _sum(goal)
        self._q *= self._q
        length = _sum(self._q)
        fitted = factor * across / np.where(length > 0, length, np.float32(1))
        # A scale that vanishes would make the next step infinite: such a group keeps the one it has.
        usable = np.abs(fitted) > np.finfo(np.float32).tiny
        return np.asarray(np.where(usable, fitted, factor), np.float32), zero_point


def _sum(array: Array) -> Vector:
    """The sum of each column, row by row however many there are: of a lone one numpy would add pairs."""
    return np.add.reduce(array, axis=0) if array.shape[1] > 1 else np.cumsum(array, axis=0)[-1]


def _parts(shape: tuple[int, ...], group_size: int, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Slices of groups and of columns that cover a weight [in, out]; a short last group comes alone."""
    rows, outputs = shape
    whole, last = rows // group_size, -(-rows // group_size)
    columns = min(outputs, max(chunk // group_size, 1))
    together = max(1, chunk // (group_size * outputs))
    for start in [*range(0, whole, together), *range(whole, last)]:
        groups = slice(start, min(start + together, whole) if start < whole else last)
        for column in range(0, outputs, columns):
            yield groups, slice(column, min(column + columns, outputs))
