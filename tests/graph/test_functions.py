"""The model-local functions of norms and attention compute what the papers say; calling and inlining functions."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.core import DOMAIN
from qcompiler.graph.functions import FAKE_QUANT, NAMES, OPSET, ensure_function, inline_functions, is_call
from qcompiler.graph.run import Runner
from tests.graph.calls import normal, run
from tests.graph.tiny import tiny


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
