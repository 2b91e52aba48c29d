"""SmoothQuant's scales, and the rounding of weights."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.numerics.affine import dequantize_weight, quantize_weight
from qcompiler.numerics.smoothing import rounded_weight, smoothing_scale
from qcompiler.scheme import TensorSpec


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


def test_a_floor_lifts_faint_channels_to_a_share_of_the_median() -> None:
    x, w = np.array([1e-3, 1.0, 2.0, 3.0, 4.0]), np.ones(5)
    np.testing.assert_allclose(smoothing_scale(x, w, 1.0, None, floor=1.0), [2, 2, 2, 3, 4], rtol=1e-6)
    np.testing.assert_allclose(smoothing_scale(x, w, 1.0, None, floor=0.75), [1.5, 1.5, 2, 3, 4], rtol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("int8"),
        TensorSpec("int8", granularity="per_channel"),
        TensorSpec("int8", granularity="per_group", group_size=20),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduce_range", [False, True])
def test_rounded_weight_is_quantize_weight_and_back(spec: TensorSpec, reduce_range: bool) -> None:
    weight = np.random.default_rng(0).normal(size=(48, 17)).astype(np.float32)
    weight[:, 3] = 0
    expected = dequantize_weight(*quantize_weight(weight, spec, reduce_range), spec)
    np.testing.assert_allclose(rounded_weight(weight.copy(), spec, reduce_range), expected, rtol=1e-6)
