"""The site search judges on rows that did not make the scales."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.numerics.affine import (
    dequantize_weight,
    fake_quantize,
    fake_quantize_dynamic,
    quantize_weight,
    scale_zero_point,
)
from qcompiler.numerics.site_search import ALPHAS, FLOORS, Reader, _held_out, search_site
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
    np.testing.assert_allclose(choice.scale, expected, rtol=1e-6)


def test_the_error_is_that_of_held_out_rows() -> None:
    x, fold = normal()
    site = reader(x * OUTLIERS, fold)
    choice = search_site([site], STATIC, WEIGHT, channels=CHANNELS, margins=(1.0,), alphas=(0.5,), floors=(1.0,))
    wq = dequantize_weight(*quantize_weight(site.weight, WEIGHT), WEIGHT)
    exact = site.rows @ site.weight
    noise = 0.0
    for f, held in enumerate(_held_out(fold, 4)):
        own = site.rows[fold == f]
        xq = fake_quantize(site.rows[held], *scale_zero_point(own.min(), own.max(), STATIC))
        noise += float(((xq @ wq - exact[held]) ** 2).sum())
    assert choice.plain == pytest.approx(noise / float((exact**2).sum()), rel=1e-3)


def test_every_row_is_judged_once_and_never_by_its_own_fold() -> None:
    fold = np.random.default_rng(0).integers(0, 4, 300)
    parts = list(_held_out(fold, 4))
    assert sorted(np.concatenate(parts)) == list(range(300))
    for f, held in enumerate(parts):
        assert f not in fold[held]
        assert len(set(fold[held])) == 3


def test_a_channel_that_calibration_hardly_hears_is_not_divided_by_next_to_nothing() -> None:
    """Channel 0 fires in one sample in a hundred: scales from the other folds must not make it an outlier."""
    x, fold = normal(800)
    x[:, 0] = np.where(np.arange(800) % 100 == 7, 3.0, 1e-4)
    site = reader(x, fold)
    no_floor = search_site([site], PER_TOKEN, WEIGHT, channels=CHANNELS, alphas=(1.0,), floors=(0.0,))
    floor = search_site([site], PER_TOKEN, WEIGHT, channels=CHANNELS, alphas=(1.0,), floors=(1.0,))
    forced = search_site([site], PER_TOKEN, WEIGHT, channels=CHANNELS, alphas=(1.0,), floors=(0.0,), keep_plain=False)
    assert no_floor.candidate.alpha is None  # plain was better, on held-out rows
    assert no_floor.scale is None
    assert floor.error <= no_floor.error
    assert forced.scale is not None
    assert forced.error > forced.plain == no_floor.error


def test_a_range_that_others_exceed_gets_a_margin() -> None:
    x, fold = normal(40)
    x *= 1 + 1.5 * (fold[:, None] == 0)  # one fold is larger: the others' ranges saturate it
    assert search_site([reader(x, fold)], STATIC, WEIGHT, channels=CHANNELS).margins[0] > 1
    assert search_site([reader(x, fold)], PER_TOKEN, WEIGHT, channels=CHANNELS).margins == (1.0,)
    flat = np.random.default_rng(0).uniform(-1, 1, (400, CHANNELS)).astype(np.float32)
    assert search_site([reader(flat, np.arange(400) % 4)], STATIC, WEIGHT, channels=CHANNELS).margins == (1.0,)


def test_blocked_channels_keep_scale_one() -> None:
    x, fold = normal()
    blocked = (np.arange(CHANNELS) >= 4) & (np.arange(CHANNELS) < 9)
    choice = search_site([reader(x * OUTLIERS, fold)], STATIC, WEIGHT, channels=CHANNELS, blocked=blocked)
    assert choice.scale is not None
    np.testing.assert_array_equal(choice.scale[blocked], 1)
    assert (choice.scale[~blocked] != 1).all()


def test_features_of_one_channel_share_its_scale() -> None:
    """Grouped queries: features 0 to 15 and 16 to 31 carry channels 0 to 15; two readers share the site."""
    x, fold = normal()
    columns = np.arange(CHANNELS) % 16
    columns[31] = -1
    wide = reader(x * OUTLIERS, fold, columns=columns)
    narrow = reader(x[:, :16] * OUTLIERS[:16], fold, outputs=7)
    choice = search_site([wide, narrow], STATIC, WEIGHT, channels=16)
    assert choice.scale is not None
    assert choice.scale.shape == (16,)
    assert len(choice.margins) == 2
    absmax = np.abs(wide.rows).max(0)
    shared = np.maximum(absmax[:16], np.where(np.arange(16) == 15, 0, absmax[16:]))
    weights = [np.abs(r.weight).max(1) for r in (wide, narrow)]
    weight = np.maximum(np.maximum(weights[0][:16], np.where(np.arange(16) == 15, 0, weights[0][16:])), weights[1])
    expected = smoothing_scale(shared, weight, choice.candidate.alpha or 0, floor=choice.candidate.floor)
    np.testing.assert_allclose(choice.scale, expected, rtol=1e-6)


def test_one_fold_is_judged_by_itself() -> None:
    x, fold = normal(50, folds=1)
    choice = search_site([reader(x * OUTLIERS, fold)], PER_TOKEN, WEIGHT, channels=CHANNELS, alphas=())
    wq = dequantize_weight(*quantize_weight(reader(x, fold).weight, WEIGHT), WEIGHT)
    exact = (x * OUTLIERS) @ reader(x, fold).weight
    noise = float(((fake_quantize_dynamic(x * OUTLIERS, PER_TOKEN) @ wq - exact) ** 2).sum())
    assert choice.error == choice.plain == pytest.approx(noise / float((exact**2).sum()), rel=1e-3)


def test_float_activations_leave_the_weights_error() -> None:
    x, fold = normal()
    choice = search_site([reader(x, fold)], None, WEIGHT, channels=CHANNELS)
    assert 0 < choice.error < 1e-4
