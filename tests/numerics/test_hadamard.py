"""Hadamard matrices and the rotations made of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.numerics.hadamard import hadamard, make_rotation

KNOWN = (1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 48, 60, 64, 76, 80, 96, 104, 128, 200)
WIDTHS = (312, 384, 512, 576, 768, 832, 896, 960, 1024, 1152, 1280, 1536, 1664, 2048, 2304, 2560, 3072)


@pytest.mark.parametrize("order", KNOWN)
def test_rows_are_orthogonal(order: int) -> None:
    h = hadamard(order)
    assert h is not None
    assert set(np.unique(h)) <= {-1.0, 1.0}
    assert np.array_equal(h @ h.T, order * np.eye(order))


@pytest.mark.parametrize("order", [0, 3, 6, 18, 50])
def test_no_hadamard_matrix_exists_of_other_orders(order: int) -> None:
    assert hadamard(order) is None


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_of_transformers_are_hadamard(width: int) -> None:
    rotation = make_rotation(width, seed=3)
    assert rotation.exact
    row = rotation(np.eye(1, width, width // 3))
    assert np.allclose(np.abs(row), 1 / np.sqrt(width), atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 260), st.integers(0, 2**32 - 1), st.booleans())
def test_any_width_is_orthogonal(size: int, seed: int, random_signs: bool) -> None:
    rotation = make_rotation(size, seed, random_signs)
    q = rotation.matrix()
    assert np.abs(q @ q.T - np.eye(size)).max() < 1e-12
    x = np.random.default_rng(seed).standard_normal((2, 3, size))
    assert np.allclose(rotation(x), x @ q, atol=1e-12)
    assert rotation(x.astype(np.float32)).dtype == np.float32


def test_a_rotation_comes_again_with_its_seed_only() -> None:
    first, again, other = (make_rotation(86, seed).matrix() for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_an_outlier_is_spread_over_all_channels() -> None:
    x = np.full((1, 576), 0.01)
    x[0, 77] = 100.0
    assert np.abs(make_rotation(576)(x)).max() < 100 / np.sqrt(576) * 1.1
