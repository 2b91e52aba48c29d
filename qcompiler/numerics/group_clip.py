"""Shorter ranges for weights by group: the steps get finer, and only the largest weights of a group are cut off."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.grids import Grid

Array = npt.NDArray[Any]

_STEP = 0.05
_MANY = 256  # inputs of a group: as many as a kernel's groups have at most, so that one scale an output has more


def clipped_grid(
    weight: Array, grid: Grid, importance: Array, shortest: float | None = None, steps: int | None = None
) -> Grid:
    """The scales of least Σ importance · (ŵ - w)² for each group, among ranges down to ``shortest`` of the given one.

    A symmetric grid of few bits has one number more below zero than above: a negative scale gives it to the other
    side, and is tried too.

    Args:
        weight: [in, out].
        grid: with groups and scales [groups, out].
        importance: mean square of each input [in]: by it an error counts at the output.
        shortest: None: 0.7 for groups of up to 256 inputs, else 0.5: the largest of many weights is further out.
        steps: how many ranges are tried; None: one every 5 % of the full range.
    """
    assert grid.scale is not None
    assert grid.group_size is not None
    if shortest is None:
        shortest = 0.7 if grid.group_size <= _MANY else 0.5
    weight = np.asarray(weight, np.float32)
    starts = np.arange(0, len(weight), grid.group_size)
    signs = (1, -1) if grid.low == -grid.high - 1 and not np.any(grid.zero_point) else (1,)
    best_scale = grid.scale
    best_error = np.full(grid.scale.shape, np.inf)
    count = round((1 - shortest) / _STEP) + 1 if steps is None else steps
    for factor in np.linspace(1, shortest, count, dtype=np.float32):
        for sign in signs:
            scale = np.asarray(grid.scale * factor * sign, np.float32)
            tried = dataclasses.replace(grid, scale=scale)
            squares = (tried.rounded(weight) - weight) ** 2 * np.asarray(importance, np.float32)[:, None]
            error = np.add.reduceat(squares, starts, axis=0)
            better = error < best_error
            best_scale = np.where(better, scale, best_scale)
            best_error = np.where(better, error, best_error)
    return dataclasses.replace(grid, scale=best_scale)
