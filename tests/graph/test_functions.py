"""The model-local functions compute what their docstrings and the papers say, in ONNX Runtime, at any rank and size."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.core import DOMAIN
from qcompiler.graph.functions import FAKE_QUANT, NAMES, OPSET, ensure_function, inline_functions, is_call
from qcompiler.graph.run import Runner
from qcompiler.numerics.affine import fake_quantize, fake_quantize_dynamic, scale_zero_point
from qcompiler.numerics.codebooks import CODEBOOKS, CodebookGrid, block_absmax, quantize_scales
from qcompiler.numerics.grids import weight_grid
from qcompiler.scheme import TensorSpec
from tests.graph.tiny import HEADER, tiny

STATIC = [TensorSpec(dtype, symmetric) for dtype in ("int8", "uint8") for symmetric in (True, False)]
PER_TOKEN = TensorSpec("uint8", True, "per_token", dynamic=True)
PER_TENSOR = TensorSpec("uint8", False, "per_tensor", dynamic=True)
FINITE = st.floats(-(2.0**60), 2.0**60, width=32)
ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=FINITE)


def runner(body: str) -> Runner:
    """The graph of that text, whose nodes call functions of ours, in ONNX Runtime as a stage of the pipeline runs."""
    model = ir.from_proto(onnx.parser.parse_model(HEADER + body))
    for node in model.graph:
        if node.domain == DOMAIN:
            ensure_function(model, node.op_type)
    return Runner(model, threads=1)


def run(body: str, **feeds: Any) -> np.ndarray:
    return runner(body)(feeds)["y"]


PER_GROUP_RUNNER = runner("g (float[N,C] x) => (float[N,C] y) { y = qcompiler.FakeQuantPerGroup<block_size = 16>(x) }")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_rms_norm() -> None:
    body = "g (float[B,S,C] x, float[C] w) => (float[B,S,C] y) { y = qcompiler.RMSNorm<epsilon = 0.001>(x, w) }"
    x, w = normal(2, 3, 8), normal(8, seed=1)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.001) * w
    np.testing.assert_allclose(run(body, x=x, w=w), expected, rtol=1e-5)


def test_rotary_embedding_turns_each_pair_of_features() -> None:
    body = """g (float[B,H,S,D] x, float[B,1,S,D] cos, float[B,1,S,D] sin) => (float[B,H,S,D] y)
        { y = qcompiler.RotaryEmbedding(x, cos, sin) }"""
    x, angles = normal(2, 3, 5, 8), normal(2, 1, 5, 4, seed=1)
    cos, sin = (np.concatenate([f(angles)] * 2, axis=-1) for f in (np.cos, np.sin))
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)  # a rotation is a product of complex numbers
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(run(body, x=x, cos=cos, sin=sin), expected, rtol=1e-5, atol=1e-6)


def test_attention_and_its_mask() -> None:
    q, k, v = normal(2, 3, 4, 8), normal(2, 3, 6, 8, seed=1), normal(2, 3, 6, 8, seed=2)
    scores = q.astype(np.float64) @ np.swapaxes(k, -1, -2) * 0.3
    operands = "float[B,H,S,D] q, float[B,H,T,D] k, float[B,H,T,D] v"
    plain = f"g ({operands}) => (float[B,H,S,D] y) {{ y = qcompiler.Attention<scale = 0.3>(q, k, v) }}"
    np.testing.assert_allclose(run(plain, q=q, k=k, v=v), softmax(scores) @ v, rtol=1e-4, atol=1e-6)
    masked = f"""g ({operands}, float[B,M,S,T] mask) => (float[B,H,S,D] y)
        {{ y = qcompiler.MaskedAttention<scale = 0.3>(q, k, v, mask) }}"""
    mask = normal(2, 1, 4, 6, seed=3)
    mask[:, :, :, 4:] = -np.inf
    expected = softmax(scores + mask) @ v
    mask[1, 0, 2] = -np.inf  # a query that may look at nothing gives 0, not NaN
    expected[1, :, 2] = 0
    np.testing.assert_allclose(run(masked, q=q, k=k, v=v, mask=mask), expected, rtol=1e-4, atol=1e-6)


_FAKE_QUANT = {
    (dtype, rank): runner(
        f"""g (float[N,C] x, float{shape} s, {dtype}{shape} z) => (float[N,C] y)
        {{ y = qcompiler.FakeQuant<axis = 1>(x, s, z) }}"""
    )
    for dtype in ("int8", "uint8")
    for rank, shape in ((0, "[]"), (1, "[C]"))
}
_DYNAMIC = {
    spec: runner(f"g (float[N,C] x) => (float[N,C] y) {{ y = qcompiler.{name}(x) }}")
    for name, spec in (("FakeQuantPerToken", PER_TOKEN), ("FakeQuantPerTensor", PER_TENSOR))
}


@settings(max_examples=60, deadline=None)
@given(x=ROWS, spec=st.sampled_from(STATIC), shrink=st.sampled_from([1.0, 0.5, 1e-3]))
def test_fake_quant_is_the_formula_bit_for_bit(x: np.ndarray, spec: TensorSpec, shrink: float) -> None:
    """Whole ranges, and ranges that saturate; one scale, and one for each column."""
    for rank, axis in ((0, None), (1, 0)):
        scale, zero_point = scale_zero_point(x.min(axis) * shrink, x.max(axis) * shrink, spec)
        got = _FAKE_QUANT[spec.dtype, rank]({"x": x, "s": scale, "z": zero_point})["y"]
        np.testing.assert_array_equal(got, fake_quantize(x, scale, zero_point))


@settings(max_examples=60, deadline=None)
@given(x=ROWS)
def test_fake_quant_per_token_is_the_formula_bit_for_bit(x: np.ndarray) -> None:
    np.testing.assert_array_equal(_DYNAMIC[PER_TOKEN]({"x": x})["y"], fake_quantize_dynamic(x, PER_TOKEN))


@settings(max_examples=60, deadline=None)
@given(x=ROWS)
def test_fake_quant_per_tensor_is_within_a_step_of_the_formula(x: np.ndarray) -> None:
    """ONNX rounds the scale's quotient in float32, so that a tie may fall to the other side."""
    x = np.where(np.abs(x) < 1e-30, 0, x).astype(np.float32)  # DynamicQuantizeLinear has no scale for less
    scale, _ = scale_zero_point(x.min(), x.max(), PER_TENSOR)
    got = _DYNAMIC[PER_TENSOR]({"x": x})["y"]
    assert np.abs(got - fake_quantize_dynamic(x, PER_TENSOR)).max() <= scale * 1.001
    assert np.abs(got - x).max() <= scale * 1.001


def test_functions_take_any_rank() -> None:
    x = normal(2, 3, 4, 5)
    for name, spec in (("FakeQuantPerToken", PER_TOKEN), ("FakeQuantPerTensor", PER_TENSOR)):
        got = run(f"g (float[a,b,c,d] x) => (float[a,b,c,d] y) {{ y = qcompiler.{name}(x) }}", x=x)
        expected = fake_quantize_dynamic(x.reshape(-1, 5), spec).reshape(x.shape)
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_function_is_registered_once_and_with_the_opset_of_the_graph() -> None:
    model = tiny("g (float[B,4] x) => (float[B,4] y) { y = Relu(x) }", {})
    for _ in range(2):
        ensure_function(model, "RMSNorm")
    ((key, function),) = model.functions.items()
    assert key == (DOMAIN, "RMSNorm", "")
    assert function.opset_imports == {"": OPSET}
    with pytest.raises(KeyError):
        ensure_function(model, "Softplus")


def test_is_call() -> None:
    model = tiny("g (float[B,4] x) => (float[B,4] y) { a = qcompiler.FakeQuantPerToken(x)  y = Relu(a) }", {})
    call, relu = model.graph
    assert is_call(call)
    assert is_call(call, "RMSNorm", "FakeQuantPerToken")
    assert is_call(call, *FAKE_QUANT)
    assert not is_call(call, "RMSNorm")
    assert not is_call(relu)
    assert not is_call(None)
    assert set(FAKE_QUANT) < set(NAMES)


def test_inlining_leaves_standard_operators_that_compute_the_same() -> None:
    text = """g (float[B,S,8] x) => (float[B,S,8] y) {
        h = qcompiler.RMSNorm<epsilon = 0.00001>(x, w)
        y = qcompiler.FakeQuantPerToken(h)
    }"""
    model = tiny(text, {"w": [8]})
    x = normal(2, 3, 8)
    before = Runner(model, threads=1)({"x": x})["y"]
    inline_functions(model)
    assert not model.functions
    assert {node.domain for node in model.graph} == {""}
    assert DOMAIN not in model.graph.opset_imports
    np.testing.assert_array_equal(Runner(model, threads=1)({"x": x})["y"], before)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=FINITE))
@settings(max_examples=30)
def test_per_group_is_per_token_of_each_group(x: np.ndarray) -> None:
    spec = TensorSpec("int8", True, "per_group", 16, dynamic=True)
    got = PER_GROUP_RUNNER({"x": x})["y"]
    np.testing.assert_allclose(got, fake_quantize_dynamic(x, spec), rtol=1e-6)
    assert got.shape == x.shape


@pytest.mark.parametrize("shape", [(5, 40), (2, 5, 32), (1, 2, 5, 7)])
def test_per_group_keeps_every_rank(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    axes = ",".join(f"d{i}" for i in range(len(shape)))
    body = f"g (float[{axes}] x) => (float[{axes}] y) {{ y = qcompiler.FakeQuantPerGroup<block_size = 16>(x) }}"
    spec = TensorSpec("int8", True, "per_group", 16, dynamic=True)
    np.testing.assert_allclose(run(body, x=x), fake_quantize_dynamic(x, spec), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int2", "uint2", "int4", "uint4", "int8", "uint8"])
def test_blocks_are_the_grid_of_a_weight(dtype: str) -> None:
    spec = TensorSpec(dtype, not dtype.startswith("u"), "per_group", 16)
    weight = normal(40, 6)
    grid = weight_grid(weight / 1.5, spec)  # narrower than the weight: what is beyond it saturates
    assert grid.zero_point is not None
    body = f"""g (float[40,6] w, float[3,6] s, {grid.zero_point.dtype}[3,6] z) => (float[40,6] y) {{
        y = qcompiler.FakeQuantBlocks<block_size = 16, low = {grid.low}.0, high = {grid.high}.0>(w, s, z)
    }}"""
    np.testing.assert_array_equal(run(body, w=weight, s=grid.scale, z=grid.zero_point), grid.rounded(weight))


_CODEBOOK = {
    name: runner(
        """g (float[K,N] w, float[16] v, float[B] s) => (float[K,N] y)
        { y = qcompiler.FakeQuantCodebook<block_size = 16>(w, v, s) }"""
    )
    for name in CODEBOOKS
}


@given(st.sampled_from(sorted(CODEBOOKS)), ROWS)
@settings(max_examples=30, deadline=None)
def test_codebook_is_the_grid_of_a_weight(name: str, weight: np.ndarray) -> None:
    grid = CodebookGrid(CODEBOOKS[name], 16, block_absmax(weight, 16) * np.float32(0.7))
    got = _CODEBOOK[name]({"w": weight, "v": grid.values, "s": grid.scale})["y"]
    np.testing.assert_array_equal(got, grid.rounded(weight))


def test_dequantized_scales_are_expanded_bit_for_bit() -> None:
    scales = quantize_scales(np.abs(normal(300)))
    body = f"""g (int8[2,256] q, float[2] s, float[] m) => (float[300] y) {{
        y = qcompiler.DequantizeScales<count = {scales.count}>(q, s, m)
    }}"""
    np.testing.assert_array_equal(run(body, q=scales.q, s=scales.step, m=scales.mean), scales.expanded())
