"""The functions that quantize compute what their docstrings say, in ONNX Runtime, at any rank and size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.numerics.affine import fake_quantize, fake_quantize_dynamic, scale_zero_point
from qcompiler.numerics.codebooks import CODEBOOKS, CodebookGrid, block_absmax, quantize_scales
from qcompiler.numerics.grids import weight_grid
from qcompiler.scheme import TensorSpec
from tests.graph.calls import normal, run, runner

STATIC = [TensorSpec(dtype, symmetric) for dtype in ("int8", "uint8") for symmetric in (True, False)]
PER_TOKEN = TensorSpec("uint8", True, "per_token", dynamic=True)
PER_TENSOR = TensorSpec("uint8", False, "per_tensor", dynamic=True)
FINITE = st.floats(-(2.0**60), 2.0**60, width=32)
ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=FINITE)


PER_GROUP_RUNNER = runner("g (float[N,C] x) => (float[N,C] y) { y = qcompiler.FakeQuantPerGroup<block_size = 16>(x) }")


_FAKE_QUANT = {
    (dtype, rank): runner(
        f"""g (float[N,C] x, float{shape} s, {dtype}{shape} z) => (float[N,C] y)
        {{ y = qcompiler.FakeQuant<axis = 1>(x, s, z) }}"""
    )
    for dtype in ("int8", "uint8")
    for rank, shape in ((0, "[]"), (1, "[C]"))
}
_DYNAMIC = {
    spec: runner(f"g (float[N,C] x) => (float[N,C] y) {{ y = qcompiler.{name}(x) }}")
    for name, spec in (("FakeQuantPerToken", PER_TOKEN), ("FakeQuantPerTensor", PER_TENSOR))
}


@settings(max_examples=60, deadline=None)
@given(x=ROWS, spec=st.sampled_from(STATIC), shrink=st.sampled_from([1.0, 0.5, 1e-3]))
def test_fake_quant_is_the_formula_bit_for_bit(x: np.ndarray, spec: TensorSpec, shrink: float) -> None:
    """Whole ranges, and ranges that saturate; one scale, and one for each column."""
    for rank, axis in ((0, None), (1, 0)):
        scale, zero_point = scale_zero_point(x.min(axis) * shrink, x.max(axis) * shrink, spec)
        got = _FAKE_QUANT[spec.dtype, rank]({"x": x, "s": scale, "z": zero_point})["y"]
        np.testing.assert_array_equal(got, fake_quantize(x, scale, zero_point))


@settings(max_examples=60, deadline=None)
@given(x=ROWS)
def test_fake_quant_per_token_is_the_formula_bit_for_bit(x: np.ndarray) -> None:
    np.testing.assert_array_equal(_DYNAMIC[PER_TOKEN]({"x": x})["y"], fake_quantize_dynamic(x, PER_TOKEN))


@settings(max_examples=60, deadline=None)
@given(x=ROWS)
def test_fake_quant_per_tensor_is_within_a_step_of_the_formula(x: np.ndarray) -> None:
    """ONNX rounds the scale's quotient in float32, so that a tie may fall to the other side."""
    x = np.where(np.abs(x) < 1e-30, 0, x).astype(np.float32)  # DynamicQuantizeLinear has no scale for less
    scale, _ = scale_zero_point(x.min(), x.max(), PER_TENSOR)
    got = _DYNAMIC[PER_TENSOR]({"x": x})["y"]
    assert np.abs(got - fake_quantize_dynamic(x, PER_TENSOR)).max() <= scale * 1.001
    assert np.abs(got - x).max() <= scale * 1.001


def test_functions_take_any_rank() -> None:
    x = normal(2, 3, 4, 5)
    for name, spec in (("FakeQuantPerToken", PER_TOKEN), ("FakeQuantPerTensor", PER_TENSOR)):
        got = run(f"g (float[a,b,c,d] x) => (float[a,b,c,d] y) {{ y = qcompiler.{name}(x) }}", x=x)
        expected = fake_quantize_dynamic(x.reshape(-1, 5), spec).reshape(x.shape)
        np.testing.assert_allclose(got, expected, atol=1e-6)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=FINITE))
@settings(max_examples=30)
def test_per_group_is_per_token_of_each_group(x: np.ndarray) -> None:
    spec = TensorSpec("int8", True, "per_group", 16, dynamic=True)
    got = PER_GROUP_RUNNER({"x": x})["y"]
    np.testing.assert_allclose(got, fake_quantize_dynamic(x, spec), rtol=1e-6)
    assert got.shape == x.shape


@pytest.mark.parametrize("shape", [(5, 40), (2, 5, 32), (1, 2, 5, 7)])
def test_per_group_keeps_every_rank(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    axes = ",".join(f"d{i}" for i in range(len(shape)))
    body = f"g (float[{axes}] x) => (float[{axes}] y) {{ y = qcompiler.FakeQuantPerGroup<block_size = 16>(x) }}"
    spec = TensorSpec("int8", True, "per_group", 16, dynamic=True)
    np.testing.assert_allclose(run(body, x=x), fake_quantize_dynamic(x, spec), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int2", "uint2", "int4", "uint4", "int8", "uint8"])
def test_blocks_are_the_grid_of_a_weight(dtype: str) -> None:
    spec = TensorSpec(dtype, not dtype.startswith("u"), "per_group", 16)
    weight = normal(40, 6)
    grid = weight_grid(weight / 1.5, spec)  # narrower than the weight: what is beyond it saturates
    assert grid.zero_point is not None
    body = f"""g (float[40,6] w, float[3,6] s, {grid.zero_point.dtype}[3,6] z) => (float[40,6] y) {{
        y = qcompiler.FakeQuantBlocks<block_size = 16, low = {grid.low}.0, high = {grid.high}.0>(w, s, z)
    }}"""
    np.testing.assert_array_equal(run(body, w=weight, s=grid.scale, z=grid.zero_point), grid.rounded(weight))


_CODEBOOK = {
    name: runner(
        """g (float[K,N] w, float[16] v, float[B] s) => (float[K,N] y)
        { y = qcompiler.FakeQuantCodebook<block_size = 16>(w, v, s) }"""
    )
    for name in CODEBOOKS
}


@given(st.sampled_from(sorted(CODEBOOKS)), ROWS)
@settings(max_examples=30, deadline=None)
def test_codebook_is_the_grid_of_a_weight(name: str, weight: np.ndarray) -> None:
    grid = CodebookGrid(CODEBOOKS[name], 16, block_absmax(weight, 16) * np.float32(0.7))
    got = _CODEBOOK[name]({"w": weight, "v": grid.values, "s": grid.scale})["y"]
    np.testing.assert_array_equal(got, grid.rounded(weight))


def test_dequantized_scales_are_expanded_bit_for_bit() -> None:
    scales = quantize_scales(np.abs(normal(300)))
    body = f"""g (int8[2,256] q, float[2] s, float[] m) => (float[300] y) {{
        y = qcompiler.DequantizeScales<count = {scales.count}>(q, s, m)
    }}"""
    np.testing.assert_array_equal(run(body, q=scales.q, s=scales.step, m=scales.mean), scales.expanded())
