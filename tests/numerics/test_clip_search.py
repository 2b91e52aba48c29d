"""ADMM, EasyQuant and range searches: each against what it says it minimises."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.numerics.affine import dequantize_weight, fake_quantize, quantize_weight, scale_zero_point
from qcompiler.numerics.clip_search import METHODS, Clipping, _cosine, admm, admm_scale, eq, output_error
from qcompiler.scheme import TensorSpec

STATIC = TensorSpec("uint8", symmetric=False)
PER_TOKEN = TensorSpec("uint8", True, "per_token", dynamic=True)
CHANNEL = TensorSpec("int8", True, "per_channel")


def site(spec: TensorSpec | None = STATIC, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Clipping]:
    """Inputs with one far outlier, a weight with one far weight a channel, and their min-max scales."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2000, 16)).astype(np.float32)
    x[7, 3] = 40
    weight = rng.normal(size=(16, 12)).astype(np.float32)
    _, scale = quantize_weight(weight, CHANNEL)
    s, z = scale_zero_point(x.min(), x.max(), STATIC)
    return x, weight, Clipping(spec, float(s), int(z), scale)


def test_a_clipping_computes_what_the_model_will() -> None:
    x, weight, start = site()
    zero_point = np.uint8(start.zero_point)
    np.testing.assert_allclose(start.input(x), fake_quantize(x, start.scale, zero_point), atol=1e-7)
    q, scale = quantize_weight(weight, CHANNEL)
    np.testing.assert_array_equal(start.weight(weight), dequantize_weight(q, scale, CHANNEL))
    difference = start.input(x) @ start.weight(weight) - x @ weight
    assert output_error(x, weight, start) == pytest.approx(float((difference**2).sum()))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), high=st.sampled_from([1, 7, 127]), spread=st.floats(0.1, 4))
def test_admm_never_raises_the_error_and_ends_at_a_fixed_point(seed: int, high: int, spread: float) -> None:
    x = np.random.default_rng(seed).laplace(size=(200, 3)) * spread
    start = np.abs(x).max(0) / high

    def error(scale: np.ndarray) -> np.ndarray:
        return ((np.clip(np.rint(x / scale), -high, high) * scale - x) ** 2).sum(0)

    found = admm_scale(x, start, -high, high).astype(np.float64)
    assert (error(found) <= error(start) * (1 + 1e-5)).all()


def test_admm_scale_of_nothing_stays() -> None:
    np.testing.assert_array_equal(admm_scale(np.zeros((4, 2)), np.array([0.5, 2.0]), -127, 127), [0.5, 2.0])


def test_admm_recovers_a_grid() -> None:
    """Numbers on a grid of another step: the alternation finds the step and no error is left."""
    q = np.random.default_rng(0).integers(-7, 8, (500, 1))
    np.testing.assert_allclose(admm_scale(q * 0.3, np.array([0.31]), -7, 7), 0.3, rtol=1e-6)


def test_eq_raises_the_cosine_of_the_outputs() -> None:
    x, weight, start = site()
    x = np.clip(x, -4, 4)  # twice as far as the inputs reach, so that a shorter range loses nothing
    start = dataclasses.replace(start, scale=16 / 255, zero_point=128)
    found = eq(x, weight, start)

    def cosine(c: Clipping) -> float:
        return float(_cosine(x @ weight, c.input(x) @ c.weight(weight), None))

    assert cosine(found) > cosine(start)
    assert 0.59 * start.scale <= found.scale <= 0.66 * start.scale


@pytest.mark.parametrize("method", sorted(METHODS))
def test_dynamic_and_float_inputs_keep_their_scale(method: str) -> None:
    for spec in (PER_TOKEN, None):
        x, weight, start = site(spec)
        found = METHODS[method](x, weight, start)
        assert (found.scale, found.zero_point) == (start.scale, start.zero_point)
        if method in ("kl", "percentile"):
            assert found is start


def test_mse_lowers_the_output_error() -> None:
    rng = np.random.default_rng(3)
    x, weight, start = site()
    start = dataclasses.replace(start, scale=start.scale * 4, zero_point=128)
    assert output_error(x, weight, METHODS["mse"](x, weight, start)) < 0.5 * output_error(x, weight, start)
    coarse = np.concatenate([weight, 30 * np.ones((1, 12), np.float32)])
    wide = np.concatenate([x, 1e-4 * rng.normal(size=(2000, 1)).astype(np.float32)], axis=1)
    _, scale = quantize_weight(coarse, CHANNEL)
    found = METHODS["mse"](wide, coarse, dataclasses.replace(start, weight_scale=scale))
    assert (found.weight_scale < scale).all()  # the far weight hardly counts: its input is faint


def test_ranges_are_those_of_their_methods() -> None:
    x, weight, start = site()
    for method, shorter in (("percentile", True), ("kl", True)):
        found = METHODS[method](x, weight, start)
        assert (found.scale < start.scale) == shorter
        np.testing.assert_array_equal(found.weight_scale, start.weight_scale)
    with_reduced = dataclasses.replace(start, high=64, weight_scale=start.weight_scale * 127 / 64)
    assert (
        np.abs(admm(x, weight, with_reduced).weight(weight) / admm(x, weight, with_reduced).weight_scale).max()
        <= 64.001
    )
