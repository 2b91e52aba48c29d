"""SmoothQuant's scales, and the site error against the same sum written out plainly."""

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
from qcompiler.numerics.clipping import mse_range
from qcompiler.numerics.histogram import Histogram
from qcompiler.numerics.smoothing import SiteError, site_error, smoothing_scale
from qcompiler.scheme import TensorSpec

RNG = np.random.default_rng(0)
OUTLIERS = np.where(np.arange(48) % 20 == 3, 40, 1).astype(np.float32)
ROWS = RNG.normal(size=(200, 48)).astype(np.float32) * OUTLIERS
WEIGHTS = [RNG.normal(size=(48, n)).astype(np.float32) for n in (32, 17)]
PER_CHANNEL = TensorSpec("int8", granularity="per_channel")
ACTIVATIONS = {
    "mse": TensorSpec("uint8", False, observer="mse"),
    "minmax": TensorSpec("uint8", False),
    "percentile": TensorSpec("uint8", False, observer="percentile{percent=99}"),
    "int8": TensorSpec("int8", True),
    "per_token": TensorSpec("uint8", True, "per_token", dynamic=True),
    "per_tensor": TensorSpec("uint8", False, dynamic=True),
    "float": None,
}


def absmax() -> tuple[np.ndarray, np.ndarray]:
    return np.abs(ROWS).max(0), np.max([np.abs(w).max(1) for w in WEIGHTS], axis=0)


def test_equation_4() -> None:
    x, w = np.array([1.0, 8.0, 2.0]), np.array([4.0, 2.0, 0.5])
    np.testing.assert_allclose(smoothing_scale(x, w, 0.5, None), np.sqrt(x / w), rtol=1e-6)
    np.testing.assert_allclose(smoothing_scale(x, w, 1.0, None), x, rtol=1e-6)
    np.testing.assert_allclose(smoothing_scale(x, w, 0.0, None), 1 / w, rtol=1e-6)
    geometric, largest = smoothing_scale(x, w, 0.3), smoothing_scale(x, w, 0.3, "max")
    assert np.exp(np.log(geometric).mean()) == pytest.approx(1)
    assert largest.max() == 1
    np.testing.assert_allclose(geometric / geometric[0], largest / largest[0], rtol=1e-6)
    assert geometric.dtype == np.float32


def test_dead_channels_keep_scale_one() -> None:
    scale = smoothing_scale(np.array([0.0, 5.0, 3.0, 0.0]), np.array([1.0, 0.0, 2.0, 0.0]), 0.5)
    np.testing.assert_array_equal(scale, np.ones(4))
    faint = smoothing_scale(np.array([1e-30, 1.0]), np.ones(2), 1.0, None)
    np.testing.assert_allclose(faint, [1e-5, 1.0], rtol=1e-6)


def plain_error(scale: np.ndarray | None, activation: TensorSpec | None, weight: TensorSpec, reduced: bool) -> float:
    s = np.ones(48, np.float32) if scale is None else scale
    x = ROWS / s
    if activation is None:
        xq = x
    elif activation.dynamic:
        xq = fake_quantize_dynamic(x, activation)
    else:
        low, high = float(x.min()), float(x.max())
        histogram = Histogram()
        histogram.add(x)
        if activation.observer == "mse":
            low, high = mse_range(histogram)
        elif activation.observer.startswith("percentile"):
            low, high = histogram.quantile(0.005), histogram.quantile(0.995)
        xq = fake_quantize(x, *scale_zero_point(low, high, activation))
    total = 0.0
    for w in WEIGHTS:
        wq = dequantize_weight(*quantize_weight(w * s[:, None], weight, reduced), weight)
        exact = ROWS.astype(np.float64) @ w
        total += float(((xq.astype(np.float64) @ wq - exact) ** 2).sum() / (exact**2).sum())
    return total


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("reduced", [False, True])
def test_site_error_is_the_plain_sum(name: str, reduced: bool) -> None:
    scale = smoothing_scale(*absmax(), 0.5)
    error = SiteError(ROWS, WEIGHTS, ACTIVATIONS[name], PER_CHANNEL, reduce_range=reduced)
    for s in (None, scale):
        assert error(s) == pytest.approx(plain_error(s, ACTIVATIONS[name], PER_CHANNEL, reduced), rel=1e-3)


@pytest.mark.parametrize(
    "weight", [TensorSpec("int8"), TensorSpec("int8", granularity="per_group", group_size=20)], ids=str
)
def test_site_error_of_other_weight_granularities(weight: TensorSpec) -> None:
    scale = smoothing_scale(*absmax(), 0.5)
    got = site_error(ROWS, WEIGHTS, scale, None, weight)
    assert got == pytest.approx(plain_error(scale, None, weight, False), rel=1e-3)


@pytest.mark.parametrize("name", ["mse", "minmax", "per_token"])
def test_smoothing_outlier_channels_pays(name: str) -> None:
    error = SiteError(ROWS, WEIGHTS, ACTIVATIONS[name], PER_CHANNEL)
    assert error(smoothing_scale(*absmax(), 0.6)) < 0.35 * error()


def test_static_minmax_uses_the_extremes_of_all_data() -> None:
    wide = site_error(ROWS, WEIGHTS, None, ACTIVATIONS["minmax"], PER_CHANNEL, low=ROWS.min(0), high=3 * ROWS.max(0))
    assert wide > 2 * site_error(ROWS, WEIGHTS, None, ACTIVATIONS["minmax"], PER_CHANNEL)


def test_the_inputs_stay_as_they_are_and_a_silent_linear_counts_nothing() -> None:
    rows, weights = ROWS.copy(), [w.copy() for w in WEIGHTS]
    alone = site_error(ROWS, WEIGHTS, None, ACTIVATIONS["mse"], PER_CHANNEL)
    with_zero = site_error(ROWS, [*WEIGHTS, np.zeros((48, 5), np.float32)], None, ACTIVATIONS["mse"], PER_CHANNEL)
    assert with_zero == pytest.approx(alone, rel=1e-6)
    np.testing.assert_array_equal(rows, ROWS)
    for before, after in zip(weights, WEIGHTS, strict=True):
        np.testing.assert_array_equal(before, after)
