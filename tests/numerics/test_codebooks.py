"""NF4 and FP4: where the tables come from, nearest values, blocks that run over channels, scales in 8 bits."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.core import OptionError
from qcompiler.numerics.codebooks import CODEBOOKS, FP4, NF4, CodebookGrid, block_absmax, codebook, quantize_scales


def weight(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def test_nf4_is_made_of_quantiles_of_the_normal_distribution() -> None:
    """Appendix E: 8 quantiles below zero, 7 above, zero itself; the outermost probability is 0.9677083."""
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    table = np.sort([*above, 0.0, *below]) / max(above)
    np.testing.assert_allclose(NF4, np.sort(table), atol=1e-6)


def test_fp4_has_two_bits_of_exponent_and_one_of_mantissa() -> None:
    normal = [2.0**exponent * (1 + mantissa / 2) for exponent in (1, 2, 3) for mantissa in (0, 1)]
    magnitudes = np.array([0, 0.0625, *normal]) / 12
    np.testing.assert_allclose(np.unique(np.abs(FP4)), magnitudes, rtol=1e-6)
    np.testing.assert_array_equal(FP4, -FP4[::-1])


@given(
    st.sampled_from(sorted(CODEBOOKS)),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from([16, 64]),
    st.integers(0, 2**16),
)
def test_no_other_value_of_the_table_is_nearer(name: str, rows: int, columns: int, size: int, seed: int) -> None:
    w = weight(rows, columns, seed)
    grid = CodebookGrid(codebook(name), size, block_absmax(w, size))
    flat = w.T.reshape(-1)  # [out, in]: a block may end in another channel than it began in
    scale = np.repeat(grid.scale, size)[: flat.size]
    errors = np.abs(grid.values[:, None].astype(np.float64) * scale - flat)
    got = np.abs(grid.rounded(w).T.reshape(-1).astype(np.float64) - flat)
    np.testing.assert_allclose(got, errors.min(0), atol=1e-6)
    assert grid.nearest(w).shape == (rows, columns)
    assert (np.abs(w).max() == np.abs(grid.rounded(w)).max()).all()  # the largest weight of a block is exact


def test_blocks_of_zeros_stay_zero() -> None:
    w = np.zeros((64, 2), np.float32)
    w[:, 1] = 1
    grid = CodebookGrid(NF4, 64, block_absmax(w, 64))
    np.testing.assert_array_equal(grid.rounded(w), w)


@given(st.integers(1, 600), st.integers(0, 2**16))
def test_quantized_scales_are_within_half_a_step(count: int, seed: int) -> None:
    scale = np.random.default_rng(seed).lognormal(size=count).astype(np.float32)
    quantized = quantize_scales(scale)
    assert quantized.q.shape == (-(-count // 256), 256)
    steps = np.repeat(quantized.step, 256)[:count]
    assert (np.abs(quantized.expanded() - scale) <= steps * 0.5001 + 1e-6).all()
    assert (steps <= np.abs(scale - quantized.mean).max() / 126.9).all() or count == 1


def test_equal_scales_are_exact() -> None:
    scale = np.full(300, 0.7, np.float32)
    np.testing.assert_array_equal(quantize_scales(scale).expanded(), scale)


def test_an_unknown_table_is_told() -> None:
    with pytest.raises(OptionError, match="did you mean 'nf4'"):
        codebook("nf5")
