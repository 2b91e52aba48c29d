"""The elimination that GPTQ is measured against: by a fixed order it is GPTQ's own, greedily it is one that pays."""

from __future__ import annotations

import numpy as np

from benchmarks.obq import DAMP, obs
from qcompiler.numerics.gptq import gptq
from qcompiler.numerics.grids import weight_grid
from qcompiler.numerics.hessian import hessian_error
from qcompiler.presets import resolve

RNG = np.random.default_rng(0)
X = RNG.normal(size=(400, 48)) @ RNG.normal(size=(48, 48))
HESSIAN, WEIGHT = X.T @ X, RNG.normal(size=(48, 6)).astype(np.float32).astype(np.float64)
GRID = weight_grid(WEIGHT, resolve("w4a8{group_size=16,symmetric=false}").weight)


def test_in_gptqs_order_it_is_gptq() -> None:
    solved = gptq(WEIGHT, HESSIAN, GRID, damp=DAMP, dtype=np.float64, keep_nearest=False)
    explicit = obs(WEIGHT, HESSIAN, GRID, np.argsort(-np.diag(HESSIAN), kind="stable"))
    np.testing.assert_allclose(GRID.in_double().dequantized(solved.q), explicit, atol=1e-9)


def test_greedily_it_errs_less_than_rounding_to_nearest() -> None:
    greedy = obs(WEIGHT, HESSIAN, GRID)
    np.testing.assert_allclose(GRID.in_double().rounded(greedy), greedy, atol=1e-12)
    nearest = hessian_error(WEIGHT, GRID.in_double().rounded(WEIGHT), HESSIAN)
    assert hessian_error(WEIGHT, greedy, HESSIAN).sum() < 0.8 * nearest.sum()
