"""Shards observed apart and merged against the whole, for every observer."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.calibration import make_observer
from qcompiler.calibration.observers import OBSERVERS, Observer
from qcompiler.core import DataError, OptionError

EXACT = [("minmax", None), ("minmax", -1), ("absmax", None), ("absmax", -1)]
EXACT += [
    ("minmax{margin=1.5}", None),
    ("percentile{percent=90}", None),
    ("kl", None),
    ("mse", None),
    ("mse{bits=4,symmetric=true}", None),
]
SUMS = [
    ("absmean", None),
    ("absmean", -1),
    ("meansquare", None),
    ("meansquare", -1),
    ("moving", None),
    ("moving", -1),
    ("hessian", -1),
]
ORDERED = [("ema{momentum=0.7}", None), ("ema{momentum=0.7}", -1), ("ema{momentum=0}", None)]
CHANNELS = 3


@st.composite
def batches(draw: st.DrawFn, smallest: int = 1) -> list[np.ndarray]:
    """One to six batches of 0 to 5 rows, at least one of them not empty, of wildly different magnitudes."""
    number = draw(st.integers(smallest, 6))
    lengths = draw(st.lists(st.integers(0, 5), min_size=number, max_size=number).filter(any))
    return [
        draw(hnp.arrays(np.float32, (n, CHANNELS), elements=st.floats(-1, 1, width=32)))
        * np.float32(2.0 ** draw(st.integers(-60, 60)))
        for n in lengths
    ]


def observed(spelling: str, axis: int | None, data: list[np.ndarray], seed: int = 0) -> Observer:
    observer = make_observer(spelling, axis, seed)
    for batch in data:
        observer.update(batch)
    return observer


def merged(shards: list[Observer]) -> Observer:
    total = shards[0]
    for shard in shards[1:]:
        total = total.merge(shard)
    return total


def arrays(result: Any) -> list[np.ndarray]:
    if dataclasses.is_dataclass(result):
        result = tuple(vars(result).values())
    return [np.asarray(a) for a in (result if isinstance(result, tuple) else (result,))]


def assert_same(a: Any, b: Any, rtol: float = 0.0) -> None:
    for x, y in zip(arrays(a), arrays(b), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(float(np.abs(x).max()), 1e-300))


@pytest.mark.parametrize(("spelling", "axis"), EXACT)
@given(data=batches(), order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_merge_is_bit_exact_in_any_order(spelling: str, axis: int | None, data: list[np.ndarray], order: Any) -> None:
    shards = [observed(spelling, axis, [batch]) for batch in data]
    whole = observed(spelling, axis, data).result()
    assert_same(merged(shards).result(), whole)
    order.shuffle(shards)
    assert_same(merged(shards).result(), whole)
    assert merged(shards).seen == sum(map(len, data))


@pytest.mark.parametrize(("spelling", "axis"), SUMS)
@given(data=batches(), order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_sums_merge_within_rounding(spelling: str, axis: int | None, data: list[np.ndarray], order: Any) -> None:
    shards = [observed(spelling, axis, [batch]) for batch in data]
    order.shuffle(shards)
    # Float sums agree within 1e-12; those whose result is float32 then agree but for its last bit.
    rtol = 1e-12 if spelling == "hessian" else 2e-7
    assert_same(merged(shards).result(), observed(spelling, axis, data).result(), rtol)


@pytest.mark.parametrize(("spelling", "axis"), ORDERED)
@given(data=batches(), cut=st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_ema_merge_is_concatenation(spelling: str, axis: int | None, data: list[np.ndarray], cut: int) -> None:
    left, right = observed(spelling, axis, data[:cut]), observed(spelling, axis, data[cut:])
    assert_same(left.merge(right).result(), observed(spelling, axis, data).result(), 2e-7)


def test_ema_is_the_recurrence() -> None:
    steps = [np.array([[x, -x]], np.float32) for x in (4.0, 8.0, 2.0)]
    low, high = observed("ema{momentum=0.5}", None, steps).result()
    assert float(high) == (4 * 0.5 + 8 * 0.5) * 0.5 + 2 * 0.5
    assert float(low) == -float(high)


def test_ema_merges_as_maps_compose() -> None:
    """Three shards in either bracketing, and order matters."""
    parts = [[np.full((1, 1), x, np.float32)] for x in (1.0, 10.0, 100.0)]
    a, b, c = (observed("ema", None, part) for part in parts)
    assert_same(a.merge(b).merge(c).result(), a.merge(b.merge(c)).result(), 1e-6)
    assert float(a.merge(b).result()[1]) != float(b.merge(a).result()[1])


def test_margin_widens_the_range() -> None:
    low, high = observed("minmax{margin=1.5}", None, [np.array([[-2.0, 4.0]], np.float32)]).result()
    assert (low, high) == (-3.0, 6.0)


def test_moving_is_the_mean_of_the_steps() -> None:
    low, high = observed("moving", None, [np.array([[0.0, x]], np.float32) for x in (1, 2, 6)]).result()
    assert (float(low), float(high)) == (0.0, 3.0)


def test_hessian_is_the_gram_matrix() -> None:
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    expected = 2 / 50 * x.astype(np.float64).T @ x.astype(np.float64)
    assert_same(observed("hessian", -1, [x[:20], x[20:]]).result(), expected, 1e-12)


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_not_finite_is_refused_and_leaves_no_trace(name: str) -> None:
    good = np.ones((2, CHANNELS), np.float32)
    for bad, word in ((np.nan, "NaN"), (np.inf, "inf"), (-np.inf, "inf"), (1e300, "inf")):
        observer = observed(name, None, [good])
        poisoned = good.astype(np.float64)
        poisoned[1, 1] = bad
        with pytest.raises(DataError, match=word):
            observer.update(poisoned)
        assert_same(observer.result(), observed(name, None, [good]).result())


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_empty_shards(name: str) -> None:
    data = [np.random.default_rng(1).normal(size=(7, CHANNELS)).astype(np.float32)]
    empty, full = observed(name, None, [np.zeros((0, CHANNELS), np.float32)]), observed(name, None, data)
    with pytest.raises(DataError, match="nothing to observe"):
        empty.result()
    with pytest.raises(DataError, match="nothing to observe"):
        empty.merge(make_observer(name)).result()
    assert_same(empty.merge(full).result(), full.result())
    assert_same(full.merge(empty).result(), full.result())


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_merge_leaves_both_shards_alone(name: str) -> None:
    rng = np.random.default_rng(2)
    a, b = (observed(name, None, [rng.normal(size=(7, CHANNELS)).astype(np.float32)], seed) for seed in (0, 1))
    before = [np.copy(array) for shard in (a, b) for array in arrays(shard.result())]
    a.merge(b).update(np.full((3, CHANNELS), 99, np.float32))
    after = [array for shard in (a, b) for array in arrays(shard.result())]
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)


@given(data=batches(smallest=2), order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_rows_with_their_positions_merge_to_the_sample_of_the_whole(data: list[np.ndarray], order: Any) -> None:
    starts = np.cumsum([0, *(len(batch) for batch in data)])
    for name in ("rows", "folds"):
        shards = [observed(f"{name}{{count=4,start={s}}}", None, [b]) for s, b in zip(starts, data, strict=False)]
        order.shuffle(shards)
        whole = observed(f"{name}{{count=4}}", None, [np.concatenate(data)])
        assert_same(merged(shards).result(), whole.result())


def test_rows_sample_the_same_tokens_of_every_value() -> None:
    rng = np.random.default_rng(3)
    token = np.arange(900, dtype=np.float32)[:, None]
    wide = np.concatenate([token, rng.normal(size=(900, 30)).astype(np.float32)], axis=1)
    small = observed("rows{count=64}", None, np.split(token, 9))
    large = observed("rows{count=64}", -1, np.split(wide, 3))
    np.testing.assert_array_equal(small.result()[:, 0], large.result()[:, 0])
    assert not np.array_equal(small.result(), observed("rows{count=64}", None, [token], seed=1).result())


def test_rows_are_kept_whole_below_the_count_and_bounded_above() -> None:
    token = np.arange(700, dtype=np.float32)[:, None]
    assert sorted(observed("rows", None, [token[:300]]).result()[:, 0]) == list(range(300))
    sample = observed("rows", None, np.split(token, 7)).result()
    assert sample.shape == (512, 1)
    assert len(np.unique(sample)) == 512


def test_rows_are_uniform_merged_or_not() -> None:
    """Each of 60 rows is in a sample of 15 in a quarter of 2,000 seeds: within five standard deviations."""
    token = np.arange(60, dtype=np.float32)[:, None]
    whole, parts = np.zeros(60), np.zeros(60)
    for seed in range(2000):
        whole[observed("rows{count=15}", None, [token], seed).result()[:, 0].astype(int)] += 1
        shards = [observed("rows{count=15}", None, [t], 2 * seed + i) for i, t in enumerate((token[:45], token[45:]))]
        parts[merged(shards).result()[:, 0].astype(int)] += 1
    deviation = np.sqrt(2000 * 0.25 * 0.75)
    assert np.abs(whole - 500).max() < 5 * deviation
    assert np.abs(parts - 500).max() < 5 * deviation


def test_rows_of_shards_at_the_same_positions_are_refused() -> None:
    x = np.ones((5, 2), np.float32)
    with pytest.raises(OptionError, match="its own seed or its start"):
        observed("rows", None, [x]).merge(observed("rows", None, [x]))


def test_a_merged_sample_goes_on_behind_its_last_position() -> None:
    token = np.arange(300, dtype=np.float32)[:, None]
    shards = [
        observed("rows{count=20}", None, [token[:100]]),
        observed("rows{count=20,start=100}", None, [token[100:200]]),
    ]
    for first, second in itertools.permutations(shards):
        total = first.merge(second)
        total.update(token[200:])
        assert_same(total.result(), observed("rows{count=20}", None, [token]).result())


@pytest.mark.parametrize(
    ("spelling", "axis", "message"),
    [
        ("minmx", None, "did you mean 'minmax'"),
        ("percentile{percnt=9}", None, "did you mean 'percent'"),
        ("percentile{percent=0}", None, "percent"),
        ("percentile{percent=x}", None, "not of type"),
        ("ema{momentum=1}", None, "momentum"),
        ("mse{bits=9}", None, "bits"),
        ("rows{count=0}", None, "count"),
        ("folds{folds=0}", None, "fold"),
        ("minmax{margin=0}", None, "margin"),
        ("mse", -1, "axis"),
        ("minmax", 0, "axis"),
        ("minmax,mse", None, "one observer"),
        ("minmax{axis=0}", None, "option"),
    ],
)
def test_bad_spellings_are_refused(spelling: str, axis: int | None, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_observer(spelling, axis)


def test_different_options_do_not_merge() -> None:
    with pytest.raises(OptionError, match="merged"):
        make_observer("ema").merge(make_observer("ema{momentum=0.5}"))
    with pytest.raises(OptionError, match="merged"):
        make_observer("minmax", -1).merge(make_observer("minmax"))
    with pytest.raises(OptionError, match="merged"):
        make_observer("minmax").merge(make_observer("absmax"))
