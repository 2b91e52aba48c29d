"""Affine quantization agrees with ONNX Runtime bit for bit and holds zero exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.core import OptionError
from qcompiler.numerics.affine import (
    dequantize,
    dequantize_weight,
    fake_quantize,
    fake_quantize_dynamic,
    quantize,
    quantize_weight,
    scale_zero_point,
)
from qcompiler.scheme import TensorSpec

SPECS = [TensorSpec(dtype, symmetric) for dtype in ("int8", "uint8") for symmetric in (True, False)]
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
MATRICES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=FINITE)


def run_ort(body: str, **feeds: Any) -> list[np.ndarray]:
    text = f'<ir_version: 10, opset_import: ["": 21]> g {body}'
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        onnx.parser.parse_model(text).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def ort_quantize(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int = 1) -> list[np.ndarray]:
    dtype = str(zero_point.dtype)
    shape = "[C]" if scale.ndim else "[]"
    body = f"""(float[N, C] x, float{shape} s, {dtype}{shape} z) => ({dtype}[N, C] q, float[N, C] y)
        {{ q = QuantizeLinear<axis: int = {axis}>(x, s, z)  y = DequantizeLinear<axis: int = {axis}>(q, s, z) }}"""
    return run_ort(body, x=x, s=scale, z=zero_point)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("reach", [1e-6, 1.0, 37.7, 1e20])
def test_quantize_is_ort_bit_for_bit(spec: TensorSpec, reach: float) -> None:
    rng = np.random.default_rng(3)
    scale, zero_point = scale_zero_point(-0.3 * reach, reach, spec)
    ties = (np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)) * scale
    x = np.concatenate([ties, rng.normal(0, reach, 4200).astype(np.float32)]).reshape(-1, 8)
    expected_q, expected = ort_quantize(x, scale, zero_point)
    np.testing.assert_array_equal(quantize(x, scale, zero_point), expected_q)
    np.testing.assert_array_equal(fake_quantize(x, scale, zero_point), expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_per_channel_quantize_is_ort_bit_for_bit(spec: TensorSpec) -> None:
    x = np.random.default_rng(4).normal(0, 1, (300, 24)).astype(np.float32) * np.logspace(-9, 9, 24, dtype=np.float32)
    scale, zero_point = scale_zero_point(x.min(0) * 0.7, x.max(0) * 0.7, spec)
    expected_q, expected = ort_quantize(x, scale, zero_point)
    np.testing.assert_array_equal(quantize(x, scale, zero_point), expected_q)
    np.testing.assert_array_equal(dequantize(expected_q, scale, zero_point), expected)


def test_per_group_is_blocked_dequantizelinear() -> None:
    weight = np.random.default_rng(5).normal(0, 1, (96, 7)).astype(np.float32)
    spec = TensorSpec("int8", granularity="per_group", group_size=32)
    q, scale = quantize_weight(weight, spec)
    body = """(int8[K, N] q, float[G, N] s) => (float[K, N] y)
        { y = DequantizeLinear<axis: int = 0, block_size: int = 32>(q, s) }"""
    np.testing.assert_array_equal(dequantize_weight(q, scale, spec), run_ort(body, q=q, s=scale)[0])


def test_per_tensor_dynamic_is_dynamicquantizelinear() -> None:
    x = np.random.default_rng(6).normal(0.4, 2, (64, 33)).astype(np.float32)
    spec = TensorSpec("uint8", symmetric=False, dynamic=True)
    body = """(float[N, C] x) => (float[N, C] y)
        { q, s, z = DynamicQuantizeLinear(x)  y = DequantizeLinear(q, s, z) }"""
    np.testing.assert_allclose(fake_quantize_dynamic(x, spec), run_ort(body, x=x)[0], rtol=0, atol=1e-6)


@given(low=FINITE, high=FINITE, spec=st.sampled_from(SPECS))
def test_zero_is_exact_and_the_range_is_covered(low: float, high: float, spec: TensorSpec) -> None:
    low, high = sorted((low, high))
    scale, zero_point = scale_zero_point(low, high, spec)
    assert scale > 0
    assert np.isfinite(scale)
    ends = np.array([0.0, low, high], np.float32)
    got = fake_quantize(ends, scale, zero_point)
    assert got[0] == 0.0
    # Half a step for rounding the value, half for rounding the zero point.
    assert np.all(np.abs(got - ends) <= scale * 1.001)


@given(MATRICES, st.sampled_from(SPECS))
def test_fake_quantize_is_idempotent(x: np.ndarray, spec: TensorSpec) -> None:
    scale, zero_point = scale_zero_point(x.min(), x.max(), spec)
    once = fake_quantize(x, scale, zero_point)
    np.testing.assert_array_equal(fake_quantize(once, scale, zero_point), once)


def test_zeros_get_scale_one() -> None:
    for spec in SPECS:
        scale, zero_point = scale_zero_point(0.0, 0.0, spec)
        assert scale == 1.0
        assert not fake_quantize(np.zeros((2, 2)), scale, zero_point).any()
    q, scale = quantize_weight(np.zeros((4, 3), np.float32), TensorSpec("int8", granularity="per_channel"))
    assert not q.any()
    np.testing.assert_array_equal(scale, np.ones(3))


WEIGHT_SPECS = [
    (TensorSpec("int8"), ()),
    (TensorSpec("int8", granularity="per_channel"), (5,)),
    (TensorSpec("uint8", granularity="per_group", group_size=16), (3, 5)),
]


@pytest.mark.parametrize(("spec", "shape"), WEIGHT_SPECS, ids=lambda v: str(v))
@pytest.mark.parametrize(("reduce_range", "reach"), [(False, 127), (True, 64)])
def test_quantize_weight(spec: TensorSpec, shape: tuple[int, ...], reduce_range: bool, reach: int) -> None:
    weight = np.random.default_rng(7).normal(0, 1, (40, 5)).astype(np.float32) * np.array(
        [1, 1e-3, 5, 0.1, 9], np.float32
    )
    q, scale = quantize_weight(weight, spec, reduce_range)
    assert q.dtype == np.int8
    assert q.shape == weight.shape
    assert scale.dtype == np.float32
    assert scale.shape == shape
    assert q.min() >= -reach
    assert np.abs(q).max() == reach
    step = np.repeat(scale, 16, axis=0)[:40] if spec.group_size else scale
    assert np.all(np.abs(dequantize_weight(q, scale, spec) - weight) <= step * 0.5001)


def test_per_token_and_per_group_take_each_row_by_itself() -> None:
    x = (
        np.random.default_rng(8).normal(0, 1, (6, 10)).astype(np.float32)
        * np.logspace(-5, 5, 6, dtype=np.float32)[:, None]
    )
    token = fake_quantize_dynamic(x, TensorSpec("uint8", True, "per_token", dynamic=True))
    group = fake_quantize_dynamic(x, TensorSpec("uint8", True, "per_group", group_size=4, dynamic=True))
    steps = np.abs(x).max(1, keepdims=True) / 127
    assert np.all(np.abs(token - x) <= steps * 0.5001)
    assert np.linalg.norm(group - x) < np.linalg.norm(token - x)
    for start in (0, 4, 8):
        part = x[:, start : start + 4]
        np.testing.assert_array_equal(
            group[:, start : start + 4],
            fake_quantize_dynamic(part, TensorSpec("uint8", True, "per_token", dynamic=True)),
        )


def test_impossible_specs_are_refused() -> None:
    weight = np.ones((4, 4), np.float32)
    with pytest.raises(OptionError, match="symmetrically"):
        quantize_weight(weight, TensorSpec("uint8", symmetric=False))
    with pytest.raises(OptionError, match="run time"):
        fake_quantize_dynamic(weight, TensorSpec("int8", granularity="per_channel", dynamic=True))
