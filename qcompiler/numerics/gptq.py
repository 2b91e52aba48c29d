"""GPTQ: round a Linear's weight input by input, and let the weights not yet rounded make up for the error.

Frantar et al. 2023, algorithm 1. Weights are [in, out] here: what the paper calls a column, one input's weights, is a
row. With H the Hessian of the output error, H^-1 = UᵀU and U upper triangular, input k is rounded, and every later
input j takes -U_kj / U_kk times its rounding error: exactly Optimal Brain Surgeon's elimination, without its updates of
the inverse. The updates of inputs beyond the current block are kept back and done in one product (lazy batches).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.core import DataError, OptionError
from qcompiler.numerics.gptq_beam import eliminate_beam
from qcompiler.numerics.gptq_scales import refitted_scales
from qcompiler.numerics.grids import Grid
from qcompiler.numerics.hessian import damped, hessian_error, inverse_root

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Rounded:
    """What GPTQ made of a weight.

    Attributes:
        q: int32 [in, out].
        scale: float32, and zero_point: float32; [out] or [groups, out].
        damp: the damping that the Cholesky factorisation needed, relative to the Hessian's mean diagonal.
        dead: number of inputs that were zero in all data; they are rounded to nearest.
        nearest: number of output channels that are rounded to nearest, because GPTQ's greedy order did worse on them.
        error, nearest_error: float64 [out], (W - Ŵ)ᵀ H (W - Ŵ) of this rounding and of rounding to nearest.
    """

    q: npt.NDArray[np.int32]
    scale: Array
    zero_point: Array
    damp: float
    dead: int
    nearest: int
    error: npt.NDArray[np.float64]
    nearest_error: npt.NDArray[np.float64]

    def values(self, grid: Grid) -> Array:
        """The weight [in, out] that the integers stand for; ``grid`` is the one it was rounded to."""
        return dataclasses.replace(grid, scale=self.scale, zero_point=self.zero_point).dequantized(self.q)


def gptq(
    weight: Array,
    hessian: Array,
    grid: Grid,
    *,
    act_order: bool = True,
    damp: float = 0.01,
    block_size: int = 64,
    beam: int = 1,
    refits: int = 0,
    dtype: type[np.floating[Any]] = np.float32,
    keep_nearest: bool = True,
) -> Rounded:
    """Round a weight so that its output error on the Hessian's data is small.

    Args:
        weight: float [in, out].
        hessian: [in, in], XᵀX of the Linear's input, at any scale.
        grid: the integers; see :class:`Grid`.
        act_order: round inputs of large diagonal first, while most others can still make up for them.
        damp: added to the diagonal, times its mean; raised tenfold until the factorisation succeeds.
        block_size: inputs of a lazy batch.
        beam: roundings of each output channel that are kept from input to input (:mod:`qcompiler.numerics.gptq_beam`);
            scales have to be known beforehand where it is more than 1.
        refits: times that the scales are fitted to the integers, and the integers found anew in these scales; each
            output channel keeps the best it had.
        dtype: of the elimination; the factorisation is float64 always.
        keep_nearest: output channels that rounding to nearest leaves with less error keep it.

    Raises:
        OptionError: shapes that do not fit.
        DataError: the weight or the Hessian is not finite, or no damping makes it positive definite.
    """
    weight = np.asarray(weight, np.float64)
    hessian = np.asarray(hessian, np.float64)
    rows = len(weight)
    if hessian.shape != (rows, rows) or min(block_size, beam) < 1:
        raise OptionError(f"gptq cannot use a weight {weight.shape} with a Hessian {hessian.shape}.")
    if not (np.isfinite(weight).all() and np.isfinite(hessian).all()):
        raise DataError("the weight or its Hessian holds NaN or inf.")
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(rows)
    upper, used = inverse_root(hessian[np.ix_(order, order)], damp)
    upper, goal = upper.astype(dtype), weight[order].astype(dtype)

    def solve(grid: Grid) -> tuple[npt.NDArray[np.int32], Grid]:
        scales = _Scales(grid, weight, static=act_order or beam > 1)
        integers = np.empty(weight.shape, np.int32)
        if beam > 1:
            scale, zero_point = (
                np.broadcast_to(array, weight.shape)[order].astype(dtype) for array in scales.found().spread(rows)
            )
            limits = grid.low, grid.high
            integers[order] = eliminate_beam(goal, upper, scale, zero_point, limits, beam, block_size)
        else:
            integers[order] = _eliminate(goal.copy(), upper, scales, order, block_size)
        return integers, scales.found()

    integers, found = solve(grid)
    for _ in range(refits):
        integers, found = _refitted(weight, damped(hessian, used), integers, found, solve)
    exact = found.in_double()
    nearest = exact.nearest(weight)
    error, nearest_error = (hessian_error(weight, exact.dequantized(q), hessian) for q in (integers, nearest))
    worse = (error > nearest_error) & keep_nearest
    integers[:, worse] = nearest[:, worse]
    assert found.scale is not None
    assert found.zero_point is not None
    return Rounded(
        integers,
        found.scale,
        found.zero_point,
        used,
        int(np.count_nonzero(np.diag(hessian) <= 0)),
        int(worse.sum()),
        np.where(worse, nearest_error, error),
        nearest_error,
    )


def _refitted(
    weight: Array,
    hessian: Array,
    integers: npt.NDArray[np.int32],
    grid: Grid,
    solve: Callable[[Grid], tuple[npt.NDArray[np.int32], Grid]],
) -> tuple[npt.NDArray[np.int32], Grid]:
    """Fit the scales to the integers, then find integers for these scales; an output channel that loses stays."""
    fitted = dataclasses.replace(grid, scale=refitted_scales(weight, integers, hessian, grid))
    choices = [(integers, grid), (integers, fitted), (solve(fitted)[0], fitted)]
    errors = [hessian_error(weight, choice.in_double().dequantized(q), hessian) for q, choice in choices]
    best = np.argmin(errors, axis=0)
    scale = np.where(best > 0, np.asarray(fitted.scale), np.asarray(grid.scale))
    return np.where(best == 2, choices[2][0], integers), dataclasses.replace(grid, scale=scale)


def _eliminate(goal: Array, upper: Array, scales: _Scales, order: Array, block_size: int) -> npt.NDArray[np.int32]:
    """The integers of ``goal`` (overwritten), whose rows are in elimination order; the same order comes back."""
    low, high = goal.dtype.type(scales.grid.low), goal.dtype.type(scales.grid.high)
    integers = np.empty(goal.shape, np.int32)
    for start, stop in _blocks(len(goal), block_size, scales):
        errors = np.empty((stop - start, goal.shape[1]), goal.dtype)
        scales.enter(start, goal)
        for k in range(start, stop):
            scale, zero_point = scales.of(int(order[k]), goal.dtype)
            q = np.clip(np.rint(goal[k] / scale) + zero_point, low, high)
            integers[k] = q
            error = errors[k - start]
            np.divide(goal[k] - (q - zero_point) * scale, upper[k, k], out=error)
            goal[k + 1 : stop] -= upper[k, k + 1 : stop, None] * error
        goal[stop:] -= upper[start:stop, stop:].T @ errors
    return integers


def _blocks(rows: int, block_size: int, scales: _Scales) -> list[tuple[int, int]]:
    """Lazy batches. Where a group's scale is found on the way it starts a batch, so that no update is pending then."""
    group = scales.grid.group_size
    starts = set(range(0, rows, block_size))
    if scales.searched and not scales.static and group is not None:
        starts = {g + i for g in range(0, rows, group) for i in range(0, min(group, rows - g), block_size)}
    edges = [*sorted(starts), rows]
    return list(itertools.pairwise(edges))


class _Scales:
    """Scale and zero point of each input: given, found beforehand, or found when a group is entered."""

    def __init__(self, grid: Grid, weight: Array, static: bool) -> None:
        self.grid = grid
        self.static = static
        self.searched = grid.scale is None
        self._size = grid.group_size or len(weight)
        groups = -(-len(weight) // self._size)
        self._scale = np.ones((groups, weight.shape[1]), np.float32)
        self._zero_point = np.zeros((groups, weight.shape[1]), np.float32)
        if grid.scale is not None:
            shape = np.shape(grid.scale)
            if shape not in ((), weight.shape[1:], self._scale.shape):
                raise OptionError(f"a weight {weight.shape} in groups of {self._size} cannot have scales {shape}.")
            self._scale[:] = grid.scale
            self._zero_point[:] = 0 if grid.zero_point is None else grid.zero_point
        elif static or grid.group_size is None:
            for group in range(groups):
                self._find(group, weight)

    def enter(self, row: int, weight: Array) -> None:
        """Find the scale of the group that starts here, if it is one to be found on the way."""
        if self.searched and not self.static and self.grid.group_size is not None and row % self._size == 0:
            self._find(row // self._size, weight)

    def of(self, row: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Scale and zero point [out] of one input, by its place in the weight."""
        group = row // self._size
        return self._scale[group].astype(dtype), self._zero_point[group].astype(dtype)

    def found(self) -> Grid:
        """The grid with the scales that were used."""
        scale, zero_point = self._scale, self._zero_point
        if self.grid.group_size is None:
            scale, zero_point = scale[0], zero_point[0]
        return dataclasses.replace(self.grid, scale=scale, zero_point=zero_point)

    def _find(self, group: int, weight: Array) -> None:
        part = weight[group * self._size : (group + 1) * self._size]
        find = self.grid.find or self._symmetric
        self._scale[group], self._zero_point[group] = find(part)

    def _symmetric(self, part: Array) -> tuple[Array, Array]:
        reach = np.abs(part).max(0) / self.grid.high
        return np.where(reach > 0, np.maximum(reach, np.finfo(np.float32).tiny), 1.0), np.zeros(part.shape[1])
