"""The scales that suit integers once they are chosen: least squares in the norm of the output error."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.grids import Grid

Array = npt.NDArray[Any]

_OUTPUTS = 512  # output channels at a time
_FURTHEST = 2.0  # times the old scale, or a part of it: further away the integers no longer fit
_RIDGE = 1e-6  # of the mean diagonal: groups of zeros keep their scale


def refitted_scales(weight: Array, q: Array, hessian: Array, grid: Grid) -> npt.NDArray[np.float32]:
    """The scales s that minimise (w - Σ_g s_g v_g)ᵀ H (w - Σ_g s_g v_g), v_g the integers of group g less zero_point.

    All groups of an output channel are solved at once, from the normal equations vᵀHv s = vᵀHw: the quadratic error of
    GPTQ (Frantar et al. 2023, equation 1), seen as a function of the scales.

    Args:
        weight, q: [in, out].
        hessian: [in, in].
        grid: where the integers come from, scales [groups, out], or [out] without groups.

    Returns:
        Scales of the shape that the grid's have, at most twice and at least half as large.
    """
    starts = np.arange(0, len(weight), grid.group_size or len(weight))
    old = np.atleast_2d(np.asarray(grid.scale, np.float64))
    unit = dataclasses.replace(grid, scale=np.ones_like(old if grid.group_size else old[0]))
    steps = unit.dequantized(q)
    found = np.empty_like(old)
    for first in range(0, weight.shape[1], _OUTPUTS):
        part = slice(first, first + _OUTPUTS)
        found[:, part] = old[:, part] + _change(weight[:, part], steps[:, part], old[:, part], hessian, starts)
    scale = (old * np.clip(found / old, 1 / _FURTHEST, _FURTHEST)).astype(np.float32)
    return scale if grid.group_size else scale[0]


def _change(weight: Array, steps: Array, old: Array, hessian: Array, starts: Array) -> Array:
    """By how much the scales [groups, out] of some output channels are to change."""
    groups, edges = len(starts), [*starts, len(weight)]
    error = weight - np.repeat(old, np.diff(edges), axis=0) * steps
    right = np.add.reduceat(steps * (hessian @ error), starts, axis=0)
    matrix = np.empty((weight.shape[1], groups, groups))
    for g in range(groups):
        rows = slice(edges[g], edges[g + 1])
        matrix[:, :, g] = np.add.reduceat(steps * (hessian[:, rows] @ steps[rows]), starts, axis=0).T
    diagonal = np.einsum("ngg->ng", matrix)
    diagonal += _RIDGE * diagonal.mean(1, keepdims=True) + np.finfo(np.float32).tiny
    return np.asarray(np.linalg.solve(matrix, right.T[..., None])[..., 0].T)
