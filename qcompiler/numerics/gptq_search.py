"""Which damping suits GPTQ at a Linear: judged on calibration samples that the rounding did not see."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.gptq import gptq
from qcompiler.numerics.grids import Grid
from qcompiler.numerics.hessian import hessian_error

Array = npt.NDArray[Any]

DAMPS = (0.01, 0.1, 1.0)
_OUTPUTS = 512  # output channels that a damping is judged on: it is of the inputs, and any sample of outputs tells


def search_damp(
    weight: Array, hessians: Array, grid: Grid, damps: Sequence[float] = DAMPS, **options: Any
) -> tuple[float, list[float]]:
    """The damping whose rounding errs least on held-out folds, and the error of each.

    GPTQ lets inputs that were silent take up all errors for free; where the tokens are few, they fire on other data.

    Args:
        weight: [in, out].
        hessians: [folds, in, in], one Hessian for each fold of the samples; where there is but one, the last and
            safest damping is taken.
        grid: its scales, where it has them, are [out] or [groups, out].
        options: of :func:`qcompiler.numerics.gptq.gptq`.

    Raises:
        DataError: as ``gptq``.
    """
    if len(hessians) < 2:
        return damps[-1], []
    weight, grid = _sampled(np.asarray(weight), grid)
    total = hessians.sum(0)
    errors = []
    for damp in damps:
        error = 0.0
        for held in hessians:
            rounded = gptq(weight, total - held, grid, damp=damp, **options)
            error += float(hessian_error(weight, rounded.values(grid), held).sum())
        errors.append(error)
    return damps[int(np.argmin(errors))], errors


def _sampled(weight: Array, grid: Grid) -> tuple[Array, Grid]:
    """Output channels at even distances, and their part of the grid."""
    step = -(-weight.shape[1] // _OUTPUTS)
    parts = [None if a is None or not np.ndim(a) else a[..., ::step] for a in (grid.scale, grid.zero_point)]
    return weight[:, ::step], dataclasses.replace(grid, scale=parts[0], zero_point=parts[1])
