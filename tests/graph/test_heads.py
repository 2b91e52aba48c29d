from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.heads import output_heads
from qcompiler.graph.rules import canonicalise
from tests import families
from tests.graph.tiny import tiny


def test_head_under_a_bias_a_soft_cap_and_a_slice() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,1,50] logits) {
            fc = MatMul(x, w1)
            act = Gelu(fc)
            head = MatMul(act, w2)
            biased = Add(head, bias)
            last = Slice(biased, minus, end, axis)
            capped = Div(last, cap)
            tanh = Tanh(capped)
            logits = Mul(cap, tanh)
        }""",
        {
            "w1": [8, 12],
            "w2": [12, 50],
            "bias": [50],
            "minus": np.array([-1]),
            "end": np.array([2**62]),
            "axis": np.array([1]),
            "cap": np.array(30.0),
        },
    )
    assert output_heads(model) == {"head"}


@pytest.mark.parametrize(
    "tail",
    [
        "y = Add(fc, x)",
        "y = LayerNormalization(fc, g)",
        "y = Mul(fc, x)",
        "other = MatMul(fc, w) y = Add(other, x)",
    ],
    ids=["residual", "norm", "gate", "linear"],
)
def test_no_head(tail: str) -> None:
    graph = f"g (float[B,S,8] x) => (float[B,S,8] y) {{ fc = MatMul(x, w) {tail} }}"
    assert output_heads(tiny(graph, {"w": [8, 8], "g": [8]})) == set()


def test_a_cached_value_projection_is_no_head() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,8] y, float[B,S,8] present) {
            v = MatMul(x, w)
            present = Identity(v)
            act = Relu(v)
            y = Mul(act, x)
        }""",
        {"w": [8, 8]},
    )
    assert output_heads(model) == set()


@pytest.mark.parametrize(
    ("family", "heads"),
    [("llama", {"model.lm_head"}), ("gemma2", {"model.lm_head"}), ("cohere", {"model.lm_head"}), ("bert", set())],
)
def test_heads_of_families(family: str, heads: set[str]) -> None:
    model = ir.load(families.exported(family))
    canonicalise(model)
    assert output_heads(model) == heads
