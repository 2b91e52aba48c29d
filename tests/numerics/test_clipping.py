"""The MSE search against brute force on the numbers themselves."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.numerics.affine import dequantize_weight, fake_quantize, quantize_weight, scale_zero_point
from qcompiler.numerics.clipping import mse_range, mse_weight_scale
from qcompiler.numerics.histogram import Histogram
from qcompiler.scheme import TensorSpec

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=(200, 100))
DATA = {
    "normal": NORMAL,
    "laplace": RNG.laplace(size=(200, 100)),
    "gelu": NORMAL / (1 + np.exp(-1.702 * NORMAL)),
    "relu": np.maximum(NORMAL, 0),
    "negative": -np.abs(NORMAL),
    "outlier channels": NORMAL * np.where(np.arange(100) % 50 == 3, 40, 1),
    "shifted": NORMAL + 7,
}
SPECS = {symmetric: TensorSpec("uint8", symmetric) for symmetric in (False, True)}


def mean_error(x: np.ndarray, low: float, high: float, spec: TensorSpec) -> float:
    scale, zero_point = scale_zero_point(low, high, spec)
    return float(((fake_quantize(x, scale, zero_point) - x) ** 2).mean())


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_range_is_as_good_as_brute_force(name: str, symmetric: bool) -> None:
    x, spec = DATA[name].astype(np.float32), SPECS[symmetric]
    histogram = Histogram()
    histogram.add(x)
    low, high = mse_range(histogram, symmetric=symmetric)
    bottom, top = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    grid = np.linspace(0.1, 1, 19)
    best = min(mean_error(x, a * bottom, b * top, spec) for a in grid for b in (grid if not symmetric else [a]))
    assert mean_error(x, low, high, spec) <= 1.01 * best
    assert mean_error(x, low, high, spec) <= 1.0001 * mean_error(x, bottom, top, spec)


def test_mse_range_clips_what_is_rare_and_keeps_zero() -> None:
    x = np.concatenate([RNG.normal(size=1_000_000), [10.0]]).astype(np.float32)
    histogram = Histogram()
    histogram.add(x)
    low, high = mse_range(histogram)
    assert -6 < low < -3
    assert 3 < high < 6
    low4, high4 = mse_range(histogram, bits=4)
    assert low < low4 < 0 < high4 < high
    assert low4 / ((high4 - low4) / 15) == pytest.approx(round(low4 / ((high4 - low4) / 15)))


def test_mse_range_of_zeros() -> None:
    histogram = Histogram()
    histogram.add(np.zeros(10, np.float32))
    assert mse_range(histogram) == (0.0, 0.0)


WEIGHT_SPECS = [
    TensorSpec("int8"),
    TensorSpec("int8", granularity="per_channel"),
    TensorSpec("int8", granularity="per_group", group_size=48),
]


def weight_error(weight: np.ndarray, spec: TensorSpec, scale: np.ndarray | None, importance: np.ndarray) -> float:
    q, used = quantize_weight(weight, spec, scale=scale)
    return float((importance[:, None] * (dequantize_weight(q, used, spec) - weight) ** 2).sum())


@pytest.mark.parametrize("spec", WEIGHT_SPECS, ids=str)
def test_mse_weight_scale_clips_what_does_not_matter(spec: TensorSpec) -> None:
    weight = RNG.uniform(-1, 1, (112, 20)).astype(np.float32)
    weight[[5, 60, 100]] = 1.3
    weight[:, 3] = 0
    importance = np.ones(112, np.float32)
    importance[[5, 60, 100]] = 0
    scale = mse_weight_scale(weight, spec, importance=importance)
    assert weight_error(weight, spec, scale, importance) < 0.8 * weight_error(weight, spec, None, importance)
    np.testing.assert_array_equal(scale[..., 3] if scale.ndim else 1.0, 1.0)


@pytest.mark.parametrize("spec", WEIGHT_SPECS, ids=str)
def test_mse_weight_scale_clips_only_where_it_pays(spec: TensorSpec) -> None:
    ones = np.ones(400, np.float32)
    flat = RNG.uniform(-1, 1, (400, 100)).astype(np.float32)
    normal = RNG.normal(size=(400, 100)).astype(np.float32)
    assert weight_error(flat, spec, mse_weight_scale(flat, spec), ones) <= weight_error(flat, spec, None, ones)
    ratio = weight_error(normal, spec, mse_weight_scale(normal, spec), ones) / weight_error(normal, spec, None, ones)
    assert ratio < 0.9 if spec.granularity == "per_tensor" else ratio <= 1.0
