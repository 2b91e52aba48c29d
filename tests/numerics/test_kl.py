"""Entropy calibration: what it clips and what it keeps."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.numerics.histogram import Histogram
from qcompiler.numerics.kl import kl_range

RNG = np.random.default_rng(0)


def of(x: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.add(x.astype(np.float32))
    return histogram


def test_far_outliers_are_clipped() -> None:
    x = np.concatenate([RNG.normal(size=200_000), [60.0, -50.0]])
    low, high = kl_range(of(x))
    assert 3 < high < 20
    assert -20 < low < -3


def test_what_fills_its_range_is_kept() -> None:
    low, high = kl_range(of(RNG.uniform(-1, 1, 200_000)))
    assert low == pytest.approx(-1, abs=0.02)
    assert high == pytest.approx(1, abs=0.02)


def test_one_sided_ranges_stay_so() -> None:
    """Half of a ReLU's outputs are zero: that mass must not drag the range towards zero."""
    x = np.maximum(RNG.normal(size=200_000), 0)
    low, high = kl_range(of(x))
    assert low == 0.0
    assert 3 < high <= x.max() + 1e-6
    low, high = kl_range(of(-x))
    assert high == 0.0
    assert -x.max() - 1e-6 <= low < -3


def test_symmetric_ranges_are_so() -> None:
    low, high = kl_range(of(np.abs(RNG.normal(size=50_000)) + 1), symmetric=True)
    assert low == -high
    assert high > 3


@pytest.mark.parametrize("x", [np.zeros(5), np.full(5, 3.0), np.array([-2.0])], ids=str)
def test_degenerate_values(x: np.ndarray) -> None:
    low, high = kl_range(of(x))
    assert low == min(x.min(), 0)
    assert high == pytest.approx(max(x.max(), 0))
