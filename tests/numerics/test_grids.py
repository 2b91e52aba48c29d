"""Grids with groups: rounding to nearest is what ONNX Runtime does with int4 in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.core import OptionError
from qcompiler.numerics import grids
from qcompiler.numerics.grids import Grid, weight_grid
from qcompiler.scheme import TensorSpec
from tests.numerics.test_affine import run_ort

FINITE = st.floats(-(2.0**60), 2.0**60, width=32)
MATRICES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=FINITE)


def specs() -> st.SearchStrategy[TensorSpec]:
    def make(bits: int, symmetric: bool, group_size: int | None) -> TensorSpec:
        granularity = "per_channel" if group_size is None else "per_group"
        return TensorSpec(f"{'' if symmetric else 'u'}int{bits}", symmetric, granularity, group_size)

    return st.builds(make, st.sampled_from([2, 4, 8]), st.booleans(), st.sampled_from([None, 3, 16]))


@given(MATRICES, specs())
def test_nearest_is_off_by_half_a_step_at_most(weight: np.ndarray, spec: TensorSpec) -> None:
    grid = weight_grid(weight, spec)
    q = grid.nearest(weight)
    assert q.min() >= grid.low
    assert q.max() <= grid.high
    scale, _ = grid.spread(len(weight))
    error = np.abs(weight.astype(np.float64) - grid.in_double().dequantized(q))
    # The zero point of an asymmetric grid is rounded: half a step more at its ends.
    assert (error <= (0.5 if spec.symmetric else 1.0) * scale * (1 + 1e-3)).all()
    np.testing.assert_array_equal(grid.nearest(grid.rounded(weight)), q)


@given(MATRICES, specs())
def test_zero_stays_zero(weight: np.ndarray, spec: TensorSpec) -> None:
    weight[::2] = 0
    assert not weight_grid(weight, spec).rounded(weight)[::2].any()


@pytest.mark.parametrize("rows", [64, 50])
def test_four_bits_in_groups_are_onnx_runtimes_blocks(rows: int) -> None:
    weight = np.random.default_rng(0).standard_normal((rows, 5)).astype(np.float32)
    grid = weight_grid(weight, TensorSpec("uint4", False, "per_group", 16))
    assert grid.scale is not None
    assert grid.zero_point is not None
    groups = len(grid.scale)

    def ort(zero_point: Any) -> np.ndarray:
        body = f"""(float[{rows}, 5] x, float[{groups}, 5] s, uint8[{groups}, 5] z8) => (float[{rows}, 5] y) {{
            z = Cast<to: int = 21>(z8)
            q = QuantizeLinear<axis: int = 0, block_size: int = 16>(x, s, z)
            y = DequantizeLinear<axis: int = 0, block_size: int = 16>(q, s, z)
        }}"""
        return run_ort(body, x=weight, s=grid.scale, z8=zero_point)[0]

    np.testing.assert_array_equal(grid.rounded(weight), ort(grid.zero_point))


def test_squared_error_is_that_of_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "_CHUNK", 100)
    weight = np.random.default_rng(0).standard_normal((70, 5)).astype(np.float32)
    for group_size in (16, None):
        spec = TensorSpec("int4", True, "per_channel" if group_size is None else "per_group", group_size)
        grid = weight_grid(weight, spec)
        want = np.square(weight.astype(np.float64) - grid.rounded(weight)).sum()
        assert grid.squared_error(weight) == pytest.approx(want, rel=1e-6)


def test_a_grid_clips_and_keeps_the_precision_of_its_scales() -> None:
    grid = Grid(-8, 7, None, np.array([0.5], np.float32))
    np.testing.assert_array_equal(grid.nearest(np.array([[9.0], [-9.0], [0.74]])), [[7], [-8], [1]])
    assert grid.rounded(np.array([[1.0]])).dtype == np.float32
    assert grid.in_double().rounded(np.array([[1.0]])).dtype == np.float64


def test_weights_have_no_scales_of_the_run_time() -> None:
    with pytest.raises(OptionError, match="cannot be quantized per_token"):
        weight_grid(np.ones((2, 2)), TensorSpec("int8", granularity="per_token", dynamic=True))
