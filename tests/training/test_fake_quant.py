"""Each fake-quant of torch against the numbers of ``numerics``, and its gradients by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.numerics.affine import fake_quantize, fake_quantize_dynamic
from qcompiler.numerics.codebooks import CODEBOOKS, CodebookGrid, block_absmax, quantize_scales
from qcompiler.numerics.grids import weight_grid
from qcompiler.scheme import TensorSpec

torch = pytest.importorskip("torch")
from qcompiler.training import fake_quant as fq  # noqa: E402

Array = npt.NDArray[Any]
SEEDS, SIZES = st.integers(0, 1 << 16), st.integers(1, 40)
GROUPS = st.sampled_from((1, 3, 16, 32))
FEW = settings(max_examples=30)


def draw(seed: int, *shape: int) -> Array:
    """Numbers of many sizes, some of them 0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 2, shape)
    return np.where(rng.random(shape) < 0.1, 0.0, x).astype(np.float32)


def tensors(*arrays: Any) -> list[Any]:
    return [torch.from_numpy(np.asarray(array).copy()) for array in arrays]


def same(want: Array, got: Any) -> None:
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(want, got.numpy())


@FEW
@given(SEEDS, SIZES, SIZES, GROUPS, st.sampled_from(("int4", "uint4", "int2", "int8")), st.booleans())
def test_blocks_and_rows_round_as_the_grid_does(
    seed: int, rows: int, columns: int, group: int, dtype: str, symmetric: bool
) -> None:
    weight = draw(seed, rows, columns)
    grid = weight_grid(weight, TensorSpec(dtype, symmetric, "per_group", group))
    narrower = draw(seed + 1, rows, columns)  # some of its numbers are clipped
    options = {"block_size": group, "low": float(grid.low), "high": float(grid.high)}
    w, scale, zero_point = tensors(narrower, grid.scale, grid.zero_point)
    want = grid.rounded(narrower)
    same(want, fq.fake_quant_blocks(w, scale, zero_point, **options))
    same(want.T, fq.fake_quant_rows(w.T, scale.T, zero_point.T, **options))


@FEW
@given(SEEDS, SIZES, SIZES, st.sampled_from((np.int8, np.uint8)), st.booleans())
def test_static_rounds_as_quantize_linear_does(seed: int, rows: int, columns: int, dtype: Any, by_column: bool) -> None:
    rng = np.random.default_rng(seed)
    x = draw(seed, 2, rows, columns)
    shape = (columns,) if by_column else ()
    scale = np.asarray(rng.uniform(0.01, 1, shape), np.float32)
    zero_point = np.asarray(rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, endpoint=True), dtype)
    want = fake_quantize(x, scale, zero_point)
    same(want, fq.fake_quant(*tensors(x, scale, zero_point), axis=2))
    same(want, fq.fake_quant(*tensors(x, scale, zero_point), axis=-1))


@FEW
@given(SEEDS, SIZES, SIZES, GROUPS, st.integers(2, 254))
def test_dynamic_rounds_as_at_run_time(seed: int, rows: int, columns: int, group: int, zero_point: int) -> None:
    x = draw(seed, 2, rows, columns)
    (t,) = tensors(x)
    token = TensorSpec("uint8", False, "per_token", dynamic=True, zero_point=zero_point)
    same(fake_quantize_dynamic(x, token), fq.fake_quant_per_token(t, float(zero_point)))
    by_group = TensorSpec("int8", True, "per_group", group, dynamic=True)
    same(fake_quantize_dynamic(x, by_group), fq.fake_quant_per_group(t, group))


@FEW
@given(SEEDS, SIZES, SIZES, st.sampled_from((1, 7, 64)), st.sampled_from(sorted(CODEBOOKS)))
def test_codebooks_round_as_theirs_do(seed: int, rows: int, columns: int, size: int, table: str) -> None:
    weight = draw(seed, rows, columns)
    grid = CodebookGrid(CODEBOOKS[table], size, block_absmax(weight, size))
    want = grid.rounded(weight)
    same(want, fq.fake_quant_codebook(*tensors(weight, grid.values, grid.scale), block_size=size))
    scales = quantize_scales(grid.scale)
    got = fq.dequantize_scales(*tensors(scales.q, scales.step, scales.mean), count=scales.count)
    np.testing.assert_allclose(got.numpy(), scales.expanded(), rtol=1e-6)


def test_floats_of_16_bits() -> None:
    (w,) = tensors(draw(0, 20, 30))
    same(w.numpy().astype(np.float16).astype(np.float32), fq.fake_quant_float(w, 10))
    assert torch.equal(fq.fake_quant_float(w, 16), w.bfloat16().float())


@pytest.mark.parametrize("x", [[[0.0, 0.0]], [[1.0, 2.0], [0.5, 255.0]], [[-3.0, -1.0]], [[-1.0, 1.0]]])
def test_dynamic_per_tensor(x: list[list[float]]) -> None:
    """By DynamicQuantizeLinear's definition; every number has its place on the grid of 255 steps around zero."""
    low, high = min(0.0, np.min(x)), max(0.0, np.max(x))
    scale = np.float32((high - low) / 255) or np.float32(1)
    zero_point = np.rint(-low / scale)
    want = (np.clip(np.rint(np.float32(x) / scale) + zero_point, 0, 255) - zero_point) * scale
    np.testing.assert_allclose(fq.fake_quant_per_tensor(torch.tensor(x)).numpy(), want, rtol=1e-6)


def gradient_of(function: Any, x: Any, given_: Any) -> Any:
    leaf = x.clone().requires_grad_()
    function(leaf).backward(given_)
    return leaf.grad


def test_the_gradient_passes_inside_the_range_and_stops_where_it_is_clipped() -> None:
    """scale 0.5, integers -2 to 1: -1.3 -> -3 and 0.8 -> 2 are clipped, 0.74 -> 1 and -1.2 -> -2 are not."""
    x = torch.tensor([[-1.3, 0.74], [0.8, -1.2], [0.0, 0.1]])
    back = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    scale, zero = torch.full((2, 2), 0.5), torch.zeros(2, 2, dtype=torch.int8)
    kept = torch.tensor([[0.0, 2.0], [0.0, 4.0], [5.0, 6.0]])
    options = {"block_size": 2, "low": -2.0, "high": 1.0}
    assert torch.equal(gradient_of(lambda w: fq.fake_quant_blocks(w, scale, zero, **options), x, back), kept)
    by_row, zeros = torch.full((3, 1), 0.5), torch.zeros(3, 1, dtype=torch.int8)
    assert torch.equal(gradient_of(lambda w: fq.fake_quant_rows(w, by_row, zeros, **options), x, back), kept)
    moved = torch.tensor(125, dtype=torch.int8)  # high 127: integers -253 to 2 about it
    want = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert torch.equal(gradient_of(lambda w: fq.fake_quant(w, torch.tensor(0.5), moved), x, back), want)
    assert torch.equal(
        gradient_of(lambda w: fq.fake_quant(w, torch.tensor(0.25), moved), x, back)[1], torch.tensor([0.0, 4.0])
    )


def test_dynamic_fake_quants_pass_the_gradient_as_it_is() -> None:
    x, back = tensors(draw(1, 3, 5, 20), draw(2, 3, 5, 20))
    for function in (
        fq.fake_quant_per_token,
        lambda x: fq.fake_quant_per_group(x, 8),
        fq.fake_quant_per_tensor,
        lambda x: fq.fake_quant_float(x, 10),
    ):
        assert torch.equal(gradient_of(function, x, back), back)


def test_the_gradient_of_a_codebook_stops_beyond_its_ends() -> None:
    values, scale = torch.from_numpy(CODEBOOKS["nf4"]), torch.tensor([2.0])
    w, back = torch.tensor([[1.9], [2.1], [-2.0], [0.3]]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    got = gradient_of(lambda w: fq.fake_quant_codebook(w, values, scale, 4), w, back)
    assert torch.equal(got, torch.tensor([[1.0], [0.0], [3.0], [4.0]]))


def test_the_gradient_of_the_scale_is_that_of_lsq() -> None:
    """Equation 3 with v / s = -2.6 (clipped to -2), 1.48 (rounded to 1), 1.6 (clipped to 1) and -2.4 (-2)."""
    x = torch.tensor([[-1.3], [0.74], [0.8], [-1.2]])
    back = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    scale = torch.full((2, 1), 0.5, requires_grad=True)
    zero = torch.zeros(2, 1, dtype=torch.int8)
    y = fq.fake_quant_blocks(x, scale, zero, block_size=2, low=-2.0, high=1.0)
    y.backward(back)
    want = torch.tensor([[-2.0 * 1 + (1 - 1.48) * 10], [1.0 * 100 + (-2 + 2.4) * 1000]])
    torch.testing.assert_close(scale.grad, want)
    scalar = torch.tensor(0.5, requires_grad=True)
    fq.fake_quant(x, scalar, torch.tensor(126, dtype=torch.int8)).backward(back)
    exact = (-3 + 2.6) * 1 + (1 - 1.48) * 10 + 1.0 * 100 + (-2 + 2.4) * 1000  # 0.8 -> 2, clipped at 127 - 126
    torch.testing.assert_close(scalar.grad, torch.tensor(exact))
