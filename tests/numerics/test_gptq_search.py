"""The damping is chosen on folds that did not round."""

from __future__ import annotations

import numpy as np

from qcompiler.numerics.gptq import gptq
from qcompiler.numerics.gptq_search import DAMPS, search_damp
from qcompiler.numerics.grids import Grid
from qcompiler.numerics.hessian import hessian_error

WEIGHT = np.random.default_rng(0).standard_normal((24, 30))
GRID = Grid(-7, 7)


def hessians(rows: int, seed: int, directions: int = 24, folds: int = 2) -> np.ndarray:
    """Of inputs with few directions and some noise, or (24) of noise alone."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(5).standard_normal((directions, 24)) if directions < 24 else np.eye(24)
    x = rng.standard_normal((folds, rows, directions)) @ mix + 0.3 * rng.standard_normal((folds, rows, 24))
    return np.einsum("fnk,fnl->fkl", x, x)


def test_a_few_rows_of_noise_want_much_damping() -> None:
    damp, errors = search_damp(WEIGHT, hessians(8, 1), GRID)
    assert damp == DAMPS[int(np.argmin(errors))] == 1.0


def test_many_rows_of_few_directions_want_little_and_new_data_agree() -> None:
    seen, unseen = hessians(2000, 2, 6), hessians(2000, 3, 6).sum(0)
    damp, _ = search_damp(WEIGHT, seen, GRID)
    assert damp < 1.0
    light, heavy = (
        hessian_error(WEIGHT, gptq(WEIGHT, seen.sum(0), GRID, damp=d).values(GRID), unseen).sum() for d in (damp, 1.0)
    )
    assert light < heavy


def test_of_one_fold_nothing_can_be_held_out() -> None:
    assert search_damp(WEIGHT, hessians(50, 0, folds=1), GRID) == (DAMPS[-1], [])


def test_many_outputs_are_judged_by_a_sample_of_them() -> None:
    """Every 2nd of 1000 outputs: the same as a search on those alone."""
    weight = np.random.default_rng(1).standard_normal((24, 1000))
    scale = np.abs(weight).max(0) / 7
    seen = hessians(200, 2, 6)
    assert search_damp(weight, seen, Grid(-7, 7, scale=scale)) == search_damp(
        weight[:, ::2], seen, Grid(-7, 7, scale=scale[::2])
    )
