"""The site search judges on rows that did not make the scales."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.numerics.affine import (
    dequantize_weight,
    fake_quantize,
    fake_quantize_dynamic,
    quantize_weight,
    scale_zero_point,
)
from qcompiler.numerics.site_judge import LOSSES, Judge, Reader, Transform, held_out
from qcompiler.numerics.site_search import (
    ALPHAS,
    FLOORS,
    PLAIN,
    SCALES,
    SHIFTS,
    SiteSearch,
    Smoothing,
    search_site,
    search_smoothing,
)
from qcompiler.numerics.smoothing import smoothing_scale
from qcompiler.scheme import TensorSpec

STATIC = TensorSpec("uint8", symmetric=False)
PER_TOKEN = TensorSpec("uint8", True, "per_token", dynamic=True)
WEIGHT = TensorSpec("int8", granularity="per_channel")
CHANNELS = 32
OUTLIERS = np.where(np.arange(CHANNELS) % 10 == 3, 50, 1).astype(np.float32)


def reader(x: np.ndarray, fold: np.ndarray, outputs: int = 24, columns: np.ndarray | None = None) -> Reader:
    folds = range(fold.max() + 1)
    return Reader(
        rows=x,
        fold=fold,
        low=np.stack([x[fold == f].min(0) for f in folds]),
        high=np.stack([x[fold == f].max(0) for f in folds]),
        weight=np.random.default_rng(1).normal(size=(x.shape[1], outputs)).astype(np.float32),
        columns=np.arange(x.shape[1]) if columns is None else columns,
    )


def normal(n: int = 400, channels: int = CHANNELS, folds: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(n, channels)).astype(np.float32)
    return x, np.arange(n) // 5 % folds


@pytest.mark.parametrize("spec", [STATIC, PER_TOKEN], ids=str)
def test_outlier_channels_are_smoothed(spec: TensorSpec) -> None:
    x, fold = normal()
    site = reader(x * OUTLIERS, fold)
    choice = search_site([site], spec, WEIGHT, channels=CHANNELS)
    assert choice.error < 0.3 * choice.plain
    assert choice.candidate.alpha in ALPHAS
    assert choice.candidate.floor in FLOORS
    absmax = np.abs(site.rows).max(0), np.abs(site.weight).max(1)
    expected = smoothing_scale(*absmax, choice.candidate.alpha or 0, floor=choice.candidate.floor)
    np.testing.assert_allclose(choice.transform.scale, expected, rtol=1e-6)


def test_the_error_is_that_of_held_out_rows() -> None:
    x, fold = normal()
    site = reader(x * OUTLIERS, fold)
    choice = SiteSearch([site], STATIC, WEIGHT, channels=CHANNELS, margins=(1.0,)).best(
        [Smoothing(0.5, 1.0)], lambda t: 1.0
    )
    wq = dequantize_weight(*quantize_weight(site.weight, WEIGHT), WEIGHT)
    exact = site.rows @ site.weight
    weights = row_weights(exact)
    noise = 0.0
    for f, held in enumerate(held_out(fold, 4)):
        own = site.rows[fold == f]
        xq = fake_quantize(site.rows[held], *scale_zero_point(own.min(), own.max(), STATIC))
        noise += float((((xq @ wq - exact[held]) ** 2).sum(1) * weights[held]).sum())
    assert choice.plain == pytest.approx(noise / float(((exact**2).sum(1) * weights).sum()), rel=1e-3)


def row_weights(exact: np.ndarray) -> np.ndarray:
    squares = (exact.astype(np.float64) ** 2).sum(1)
    by_row = 1 / (squares + np.median(squares))
    return 1 / squares.sum() + by_row / (by_row * squares).sum()


def test_tokens_that_outlier_tokens_drown_out_are_seen() -> None:
    """One row in twenty is a thousand times as large: in one static scale nothing is left of the others."""
    x, fold = normal()
    x[np.arange(400) % 20 == 3] *= 1000
    static, token = (search_site([reader(x, fold)], spec, WEIGHT, channels=CHANNELS) for spec in (STATIC, PER_TOKEN))
    assert static.error > 0.1
    assert token.error < 1e-3


def test_every_row_is_judged_once_and_never_by_its_own_fold() -> None:
    fold = np.random.default_rng(0).integers(0, 4, 300)
    parts = list(held_out(fold, 4))
    assert sorted(np.concatenate(parts)) == list(range(300))
    for f, held in enumerate(parts):
        assert f not in fold[held]
        assert len(set(fold[held])) == 3


def test_a_channel_that_calibration_hardly_hears_is_not_divided_by_next_to_nothing() -> None:
    """Channel 0 fires in one sample in a hundred: scales from the other folds must not make it an outlier."""
    x, fold = normal(800)
    x[:, 0] = np.where(np.arange(800) % 100 == 7, 3.0, 1e-4)
    site = reader(x, fold)
    search = SiteSearch([site], PER_TOKEN, WEIGHT, channels=CHANNELS)
    no_floor = search_smoothing(search, alphas=(1.0,), floors=(0.0,))
    floor = search_smoothing(search, alphas=(1.0,), floors=(1.0,))
    forced = search_smoothing(search, alphas=(1.0,), floors=(0.0,), keep_plain=False)
    assert no_floor.candidate.alpha is None  # plain was better, on held-out rows
    assert no_floor.transform.scale is None
    assert floor.error <= no_floor.error
    assert forced.transform.scale is not None
    assert forced.error > forced.plain == no_floor.error


@pytest.mark.parametrize(("spec", "by"), [(STATIC, "rms"), (PER_TOKEN, "fourth")], ids=str)
def test_rare_maxima_set_scales_only_where_ranges_are_static(spec: TensorSpec, by: str) -> None:
    """Each channel has a spread of its own, and in one row of forty one channel is twelve times as loud."""
    rng = np.random.default_rng(5)
    x, fold = normal(1200)
    rare = rng.random(x.shape) < 1 / (40 * CHANNELS)
    x = (x * np.where(rare, 12, 1) * np.geomspace(0.1, 10, CHANNELS)).astype(np.float32)
    search = SiteSearch([reader(x, fold)], spec, WEIGHT, channels=CHANNELS)
    best = search_smoothing(search, alphas=(), scales=SCALES)
    paper = search_smoothing(search)
    assert best.candidate.by == by
    assert best.error < paper.error


def test_a_range_that_others_exceed_gets_a_margin() -> None:
    x, fold = normal(40)
    x *= 1 + 1.5 * (fold[:, None] == 0)  # one fold is larger: the others' ranges saturate it
    choice = search_site([reader(x, fold)], STATIC, WEIGHT, channels=CHANNELS)
    assert choice.specs[0].observer.startswith("minmax{margin=")
    margin = float(choice.specs[0].observer.removeprefix("minmax{margin=").rstrip("}"))
    assert margin > 1
    low, high = (fn(x / (1 if choice.transform.scale is None else choice.transform.scale)) for fn in (np.min, np.max))
    np.testing.assert_allclose(choice.ranges[0], (low * margin, high * margin), rtol=1e-6)
    assert search_site([reader(x, fold)], PER_TOKEN, WEIGHT, channels=CHANNELS).specs == (PER_TOKEN,)
    flat = np.random.default_rng(0).uniform(-1, 1, (400, CHANNELS)).astype(np.float32)
    assert search_site([reader(flat, np.arange(400) % 4)], STATIC, WEIGHT, channels=CHANNELS).specs == (STATIC,)


def test_blocked_channels_keep_scale_one() -> None:
    x, fold = normal()
    blocked = (np.arange(CHANNELS) >= 4) & (np.arange(CHANNELS) < 9)
    choice = search_smoothing(
        SiteSearch([reader(x * OUTLIERS, fold)], STATIC, WEIGHT, channels=CHANNELS, blocked=blocked)
    )
    assert choice.transform.scale is not None
    np.testing.assert_array_equal(choice.transform.scale[blocked], 1)
    assert (choice.transform.scale[~blocked] != 1).all()


def test_features_of_one_channel_share_its_scale() -> None:
    """Grouped queries: features 0 to 15 and 16 to 31 carry channels 0 to 15; two readers share the site."""
    x, fold = normal()
    columns = np.arange(CHANNELS) % 16
    columns[31] = -1
    wide = reader(x * OUTLIERS, fold, columns=columns)
    narrow = reader(x[:, :16] * OUTLIERS[:16], fold, outputs=7)
    choice = search_site([wide, narrow], STATIC, WEIGHT, channels=16)
    assert choice.transform.scale is not None
    assert choice.transform.scale.shape == (16,)
    assert len(choice.specs) == 2
    absmax = np.abs(wide.rows).max(0)
    shared = np.maximum(absmax[:16], np.where(np.arange(16) == 15, 0, absmax[16:]))
    weights = [np.abs(r.weight).max(1) for r in (wide, narrow)]
    weight = np.maximum(np.maximum(weights[0][:16], np.where(np.arange(16) == 15, 0, weights[0][16:])), weights[1])
    expected = smoothing_scale(shared, weight, choice.candidate.alpha or 0, floor=choice.candidate.floor)
    np.testing.assert_allclose(choice.transform.scale, expected, rtol=1e-6)


def test_one_fold_is_judged_by_itself() -> None:
    x, fold = normal(50, folds=1)
    choice = search_site([reader(x * OUTLIERS, fold)], PER_TOKEN, WEIGHT, channels=CHANNELS, alphas=())
    wq = dequantize_weight(*quantize_weight(reader(x, fold).weight, WEIGHT), WEIGHT)
    exact = (x * OUTLIERS) @ reader(x, fold).weight
    weights = row_weights(exact)
    noise = float((((fake_quantize_dynamic(x * OUTLIERS, PER_TOKEN) @ wq - exact) ** 2).sum(1) * weights).sum())
    assert choice.error == choice.plain == pytest.approx(noise / float(((exact**2).sum(1) * weights).sum()), rel=1e-3)


def test_float_activations_leave_the_weights_error() -> None:
    x, fold = normal()
    choice = search_site([reader(x, fold)], None, WEIGHT, channels=CHANNELS)
    assert 0 < choice.error < 1e-4


ABOUT = TensorSpec("uint8", False, "per_token", dynamic=True)
GELU_LIKE = np.maximum(np.random.default_rng(3).normal(size=(400, CHANNELS)), -0.17).astype(np.float32)


def test_one_sided_rows_get_a_zero_point_near_their_end() -> None:
    """What follows a GELU goes from -0.17 upwards: half of a symmetric range would stand empty."""
    fold = np.arange(400) % 4
    symmetric = search_site([reader(GELU_LIKE, fold)], PER_TOKEN, WEIGHT, channels=CHANNELS, alphas=())
    about = search_site([reader(GELU_LIKE, fold)], ABOUT, WEIGHT, channels=CHANNELS, alphas=())
    mirrored = search_site([reader(-GELU_LIKE, fold)], ABOUT, WEIGHT, channels=CHANNELS, alphas=())
    assert about.specs[0].zero_point < 64
    assert mirrored.specs[0].zero_point > 192
    for choice in (about, mirrored):
        assert choice.error < 0.65 * symmetric.error  # the weights' own error stays
    even = search_site([reader(normal()[0], fold)], ABOUT, WEIGHT, channels=CHANNELS, alphas=())
    assert even.specs[0].zero_point == 128


@pytest.mark.parametrize("kind", SHIFTS)
def test_channels_off_zero_are_shifted(kind: str) -> None:
    """Half the channels lie about 20, half about -20: shifted, a range of 6 is enough."""
    x, fold = normal()
    off = np.where(np.arange(CHANNELS) % 2, 20, -20).astype(np.float32)
    choice = search_smoothing(
        SiteSearch([reader(x + off, fold)], STATIC, WEIGHT, channels=CHANNELS), alphas=(), shifts=(kind,)
    )
    assert choice.candidate == Smoothing(shift=kind)
    np.testing.assert_allclose(choice.transform.shift, off, atol=1)
    # The exact outputs hold the offsets, so that the error is relative to much more than before.
    assert choice.error < 0.03 * choice.plain
    assert choice.ranges[0][1] - choice.ranges[0][0] < 15


def test_a_fixed_channel_is_not_shifted() -> None:
    x, fold = normal()
    fixed = np.arange(CHANNELS) < 5
    search = SiteSearch([reader(x + 20, fold)], STATIC, WEIGHT, channels=CHANNELS, fixed=fixed)
    shift = search_smoothing(search, alphas=(), shifts=("mean",)).transform.shift
    np.testing.assert_array_equal(shift[fixed], 0)
    assert (shift[~fixed] > 19).all()


def test_price_decides_between_candidates_of_like_error() -> None:
    x, fold = normal()
    search = SiteSearch([reader(x * OUTLIERS, fold)], STATIC, WEIGHT, channels=CHANNELS)
    free = search_smoothing(search)
    gain = free.plain / free.error
    dear = search_smoothing(search, price=lambda t: 1.0 if t.scale is None else 2 * gain)
    never = search_smoothing(search, keep_plain=False, price=lambda t: 1.0 if t.scale is None else np.inf)
    assert free.candidate != PLAIN
    assert dear.candidate == PLAIN
    assert never.candidate == PLAIN


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), loss=st.sampled_from(sorted(LOSSES)))
def test_a_transform_is_the_identity_in_float(seed: int, loss: str) -> None:
    """Float activations, weights of 8 bits that hold them exactly: (x - z) / s times s W plus z W is x W."""
    rng = np.random.default_rng(seed)
    x, fold = normal(40, 8, seed=seed)
    scale = 2.0 ** rng.integers(-3, 4, 8)
    site = dataclasses.replace(
        reader(x, fold, outputs=3), weight=(127 * rng.choice([-1, 1], (8, 3)) / scale[:, None]).astype(np.float32)
    )
    transform = Transform(scale.astype(np.float32), rng.normal(size=8).astype(np.float32))
    error, _ = Judge(site, [(None, 1.0)], WEIGHT, loss=loss)([transform] * 4)
    assert abs(error) < 1e-6
