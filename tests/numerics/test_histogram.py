"""Zero-anchored histograms: where numbers fall, how bins widen, and that merging is exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.numerics.histogram import SIDE, Histogram

NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
ARRAYS = hnp.arrays(np.float32, st.integers(0, 20), elements=NUMBERS)


def histogram_of(*arrays: np.ndarray) -> Histogram:
    histogram = Histogram()
    for array in arrays:
        histogram.add(array)
    return histogram


@given(st.lists(ARRAYS, max_size=5), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_batches_and_merges_are_the_whole(parts: list[np.ndarray], order: object) -> None:
    whole = histogram_of(np.concatenate([np.zeros(0, np.float32), *parts]))
    shards = [histogram_of(part) for part in parts]
    order.shuffle(shards)  # type: ignore[attr-defined]
    total = Histogram()
    for shard in shards:
        total.merge(shard)
    for other in (histogram_of(*parts), total):
        assert (other.exponent, other.low, other.high) == (whole.exponent, whole.low, whole.high)
        np.testing.assert_array_equal(other.counts, whole.counts)


@given(ARRAYS.filter(lambda x: x.size > 0))
@settings(deadline=None)
def test_every_number_is_in_its_bin(x: np.ndarray) -> None:
    histogram = histogram_of(x)
    magnitudes = np.floor(np.abs(x.astype(np.float64)) / histogram.width).astype(int)
    places = np.where(x < 0, SIDE - 1 - magnitudes, SIDE + magnitudes)
    np.testing.assert_array_equal(histogram.counts, np.bincount(places, minlength=2 * SIDE))


@pytest.mark.parametrize("reach", [1e-20, 0.1, 1.0, 1.999, 3e5, 3e38])
def test_resolution_never_falls_below_2048_bins(reach: float) -> None:
    for data in ([reach], [-reach], [reach * 1e-6, reach]):
        histogram = histogram_of(*(np.array([x], np.float32) for x in data))
        assert 2048 <= reach / histogram.width <= SIDE


def test_quantiles_are_numpys_within_a_bin() -> None:
    x = np.random.default_rng(0).standard_t(3, 100_000).astype(np.float32)
    histogram = histogram_of(*np.split(x, 10))
    for fraction in (0.0, 0.001, 0.3, 0.5, 0.9999, 1.0):
        assert abs(histogram.quantile(fraction) - np.quantile(x, fraction)) <= 2 * histogram.width
    assert histogram.quantile(0.0) == x.min()
    assert histogram.quantile(1.0) == x.max()


def test_large_arrays_go_through_in_parts() -> None:
    x = np.random.default_rng(1).normal(size=(700, 300)).astype(np.float32)
    np.testing.assert_array_equal(histogram_of(x).counts, histogram_of(*x, *x[:0]).counts)
    np.testing.assert_array_equal(histogram_of(x.T).counts, histogram_of(x).counts)
