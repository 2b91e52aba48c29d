"""HQQ: the scale and zero point of each group of a weight, refitted without any data (Badri and Shaji 2023).

Half-quadratic quantization minimises Σ|w - ŵ|^p over the grid of each group, with p < 1 a loss that a few large errors
hardly move. An auxiliary error e splits it into two easy steps: e = shrink(w - ŵ), the proximal operator of the l_p
norm, and a quadratic fit of the grid to w - e. The authors move a zero point in float and leave the scale; here the
scale is fitted too, because zero points are whole numbers: MatMulNBits takes float ones, but then dequantizes the
weight in every run (onnxruntime 1.31, 768 x 768 and one row: 20 times as long) and multiplies no integers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.grids import Grid

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float32]

STARTS, STARTS_OF_TWO_BITS = (1.0, 0.85, 0.7), (1.0, 0.7, 0.5, 0.35)
"""Parts of the full range that the steps start from: each ends in a minimum of its own."""
_CHUNK = 1 << 17  # weights that are worked on at once: they stay in the processor's cache


@dataclasses.dataclass(frozen=True)
class HalfQuadratic:
    """How the loss is minimised.

    Attributes:
        p: of the norm; 2: least squares.
        beta: weight of the quadratic step, for errors in steps of the grid; ``kappa``: its growth by iteration.
        iterations: of each start, at most; a group stops when its loss no longer falls.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20


def hqq_grid(weight: Array, grid: Grid, options: HalfQuadratic = HalfQuadratic()) -> Grid:
    """The grid of least Σ|w - ŵ|^p in each group that the half-quadratic steps come across; never a worse one.

    Args:
        weight: [in, out].
        grid: with groups and scales [groups, out]: where to start. Zero points of a signed grid stay as they are, those
            of an unsigned one move in whole numbers.
    """
    assert grid.scale is not None
    assert grid.group_size is not None
    rows, counts = _by_group(np.asarray(weight, np.float32), grid.group_size)
    scale = np.array(grid.scale, np.float32).reshape(-1)
    zero_point = np.zeros_like(scale) if grid.zero_point is None else np.array(grid.zero_point, np.float32).reshape(-1)
    step = max(_CHUNK // grid.group_size, 1)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        fit = _Fit(rows[part], counts[part], grid.low, grid.high, options)
        scale[part], zero_point[part] = fit(scale[part], zero_point[part])
    shape = np.shape(grid.scale)
    return dataclasses.replace(grid, scale=scale.reshape(shape), zero_point=zero_point.reshape(shape))


def shrink(error: Array, p: float, beta: float) -> Array:
    """sign(x) · max(|x| - |x|^(p - 1) / beta, 0), the proximal operator of HQQ."""
    magnitude = np.abs(error)
    with np.errstate(divide="ignore", over="ignore"):
        kept = magnitude - magnitude ** (p - 1) / beta
    return np.asarray(np.copysign(np.maximum(kept, 0), error), error.dtype)


class _Fit:
    """The steps on groups as rows [n, size], of which the first ``counts`` [n] numbers count and the others are 0."""

    def __init__(self, rows: Array, counts: Array, low: int, high: int, options: HalfQuadratic) -> None:
        self._rows, self._counts, self._low, self._high, self._options = rows, counts, low, high, options

    def __call__(self, scale: Vector, zero_point: Vector) -> tuple[Vector, Vector]:
        """The best scale and zero point [n], from these on."""
        every = np.arange(len(self._rows))
        best = scale.copy(), zero_point.copy()
        least = self._loss(every, *best)
        # A signed grid of few bits has one number more below zero: a negative scale gives it to the other side.
        signs = (1, -1) if self._low == -self._high - 1 else (1,)
        parts = STARTS if self._high - self._low > 3 else STARTS_OF_TWO_BITS
        for start in (part * sign for part in parts for sign in signs):
            self._descend(every, scale * np.float32(start), zero_point, best, least)
        return best

    def _descend(self, active: Array, s: Vector, z: Vector, best: tuple[Vector, Vector], least: Vector) -> None:
        """Steps from one start, each group for as long as its loss falls; ``best`` and ``least`` are written to."""
        beta, last = self._options.beta, np.full(len(active), np.inf, np.float32)
        for _ in range(self._options.iterations):
            s, z = self._step(active, s, z, beta)
            loss = self._loss(active, s, z)
            better = loss < least[active]
            where = active[better]
            best[0][where], best[1][where], least[where] = s[better], z[better], loss[better]
            falls = loss < last
            active, s, z, last = active[falls], s[falls], z[falls], loss[falls]
            if not len(active):
                break
            beta *= self._options.kappa

    def _step(self, active: Array, s: Vector, z: Vector, beta: float) -> tuple[Vector, Vector]:
        """e = shrink(w - ŵ) in steps of the grid; then the least squares fit of zero point and scale to w - e."""
        w, column = self._rows[active], s[:, None]
        steps = self._nearest(w, s, z)
        goal = w - column * shrink(w / column - steps, self._options.p, beta)
        if self._low >= 0:
            # HQQ's update: the mean of q - goal / scale, here over the numbers that count and to a whole number.
            moved = z + (steps - goal / column).sum(1) / self._counts[active]
            new = np.clip(np.rint(moved), self._low, self._high).astype(np.float32)
            steps += (z - new)[:, None]
            steps *= np.arange(w.shape[1]) < self._counts[active, None]
            z = new
        length = np.einsum("nk,nk->n", steps, steps)
        fitted = np.einsum("nk,nk->n", steps, goal) / np.where(length > 0, length, 1)
        # A scale that vanishes would make the next step infinite: such a group keeps the one it has.
        return np.where(np.abs(fitted) > np.finfo(np.float32).tiny, fitted, s), z

    def _loss(self, active: Array, s: Vector, z: Vector) -> Vector:
        w = self._rows[active]
        error = np.abs(w - s[:, None] * self._nearest(w, s, z))
        return np.asarray((error**self._options.p).sum(1))

    def _nearest(self, w: Array, s: Vector, z: Vector) -> Array:
        """q - zero_point of the nearest numbers of the grid."""
        zero = z[:, None]
        return np.asarray(np.clip(np.rint(w / s[:, None]), self._low - zero, self._high - zero))


def _by_group(weight: Array, size: int) -> tuple[Array, Array]:
    """The groups of a weight [in, out] as rows [groups · out, size], filled up with 0; and how many numbers count."""
    inputs, outputs = weight.shape
    groups = -(-inputs // size)
    padded = np.zeros((groups * size, outputs), np.float32)
    padded[:inputs] = weight
    rows = padded.reshape(groups, size, outputs).transpose(0, 2, 1).reshape(-1, size)
    counts = np.minimum(inputs - size * np.arange(groups), size)
    return rows, np.repeat(counts, outputs).astype(np.float32)
