"""The scales of cross-layer equalization."""

from __future__ import annotations

import numpy as np

from qcompiler.numerics.equalization import channel_absmax, equalization_scale


def test_both_weights_reach_equally_far() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(6, 10)) * 10 ** rng.uniform(-3, 3, 10), rng.normal(size=(10, 4))
    scale = equalization_scale(np.abs(first).max(0), np.abs(second).max(1)).astype(np.float64)
    np.testing.assert_allclose(np.abs(first / scale).max(0), np.abs(second * scale[:, None]).max(1), rtol=1e-6)
    np.testing.assert_allclose(first / scale @ (second * scale[:, None]), first @ second)


def test_dead_channels_keep_their_scale() -> None:
    np.testing.assert_array_equal(equalization_scale(np.array([0, 4, 1]), np.array([1, 1, 0])), [1, 2, 1])


def test_channels_that_several_rows_carry() -> None:
    weight = np.array([[1, -5], [2, 0], [9, 9], [3, -1]], np.float32)
    columns = np.array([0, 1, -1, 0])
    np.testing.assert_array_equal(channel_absmax([(weight, columns)], 3), [5, 2, 0])
