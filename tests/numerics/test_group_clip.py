"""Clipped groups never err more than the full range, and use the side that has a number more."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.numerics.grids import weight_grid
from qcompiler.numerics.group_clip import clipped_grid
from qcompiler.scheme import TensorSpec


@given(st.integers(0, 2**16), st.sampled_from(["int4", "uint4", "int2"]), st.integers(1, 50))
def test_never_worse_than_the_full_range(seed: int, dtype: str, rows: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, 4)).astype(np.float32)
    importance = rng.uniform(0, 3, rows)
    grid = weight_grid(weight, TensorSpec(dtype, not dtype.startswith("u"), "per_group", 16))
    clipped = clipped_grid(weight, grid, importance)
    full, short = (((g.rounded(weight) - weight) ** 2 * importance[:, None]).sum(0) for g in (grid, clipped))
    assert (short <= full * (1 + 1e-5)).all()
    np.testing.assert_array_equal(clipped.rounded(np.zeros_like(weight)), 0)


def test_the_larger_side_gets_the_number_more() -> None:
    weight = np.linspace(-0.7, 0.8, 16, dtype=np.float32)[:, None]
    grid = weight_grid(weight, TensorSpec("int4", True, "per_group", 16))
    clipped = clipped_grid(weight, grid, np.ones(16), shortest=0.875, steps=8)
    assert clipped.scale is not None
    assert clipped.scale[0, 0] < 0
    np.testing.assert_allclose(clipped.rounded(weight), weight, atol=1e-6)
