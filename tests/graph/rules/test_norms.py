from __future__ import annotations

import numpy as np
import pytest

from qcompiler.graph.rules.rewriter import MAP, PARAMETER
from tests.graph.rules.spelling import counts, normal, raised, spelled

HEAD = "g (float[B, 3, 8] x) => (float[B, 3, 8] y) {"
AXES = "axes = Constant<value_ints = [-1]>() eps = Constant<value_float = 0.01>() two = Constant<value_float = 2.0>()"
CENTRE = f"{AXES} m = ReduceMean(x, axes) d = Sub(x, m)"
FEEDS = {"x": 3 * normal(2, 3, 8) + 1}

LAYER_NORMS = {
    "pow": f"""{CENTRE} q = Pow(d, two) v = ReduceMean(q, axes) a = Add(v, eps) r = Sqrt(a) n = Div(d, r)
        s = Mul(n, w) y = Add(s, b)""",
    "mul and swapped": f"""{CENTRE} q = Mul(d, d) v = ReduceMean(q, axes) a = Add(eps, v) r = Sqrt(a)
        n = Div(d, r) s = Mul(w, n) """
    "y = Add(b, s)",
    "second subtraction": f"{CENTRE} q = Pow(d, two) v = ReduceMean(q, axes) a = Add(v, eps) r = Sqrt(a) e = Sub(x, m) "
    "n = Div(e, r) s = Mul(n, w) y = Add(s, b)",
    "casts": f"""{CENTRE} c = Cast<to = 1>(d) q = Pow(c, two) v = ReduceMean(q, axes) a = Add(v, eps) r = Sqrt(a)
        n = Div(d, r) """
    "k = Cast<to = 1>(n) s = Mul(k, w) y = Add(s, b)",
}


@pytest.mark.parametrize("spelling", LAYER_NORMS)
def test_layer_norm_is_raised(spelling: str) -> None:
    model = raised(spelled(f"{HEAD} {LAYER_NORMS[spelling]} }}", {"w": (8,), "b": (8,)}), FEEDS)
    (node,) = model.graph
    assert node.op_type == "LayerNormalization"
    assert [v.name for v in node.inputs if v is not None] == ["x", "w", "b"]
    assert node.attributes["epsilon"].as_float() == pytest.approx(0.01)


def test_layer_norm_without_bias_keeps_none() -> None:
    body = f"{CENTRE} q = Pow(d, two) v = ReduceMean(q, axes) a = Add(v, eps) r = Sqrt(a) n = Div(d, r) y = Mul(n, w)"
    (node,) = raised(spelled(f"{HEAD} {body} }}", {"w": (8,)}), FEEDS).graph
    assert node.op_type == "LayerNormalization"
    assert len(node.inputs) == 2


def test_layer_norm_without_affine_gets_ones() -> None:
    body = f"{CENTRE} q = Pow(d, two) v = ReduceMean(q, axes) a = Add(v, eps) r = Sqrt(a) y = Div(d, r)"
    (node,) = raised(spelled(f"{HEAD} {body} }}"), FEEDS).graph
    assert node.op_type == "LayerNormalization"


def test_layer_norm_of_opset_11_has_its_axes_as_attribute() -> None:
    body = """m = ReduceMean<axes = [-1]>(x) d = Sub(x, m) two = Constant<value = float {2.0}>() q = Pow(d, two)
        v = ReduceMean<axes = [-1]>(q) eps = Constant<value = float {0.01}>() a = Add(v, eps) r = Sqrt(a) n = Div(d, r)
        s = Mul(n, w) y = Add(s, b)"""
    model = raised(spelled(f"{HEAD} {body} }}", {"w": (8,), "b": (8,)}, opset=11), FEEDS)
    assert counts(model) == {"LayerNormalization": 1}


def test_a_scaled_norm_with_a_residual_keeps_the_residual() -> None:
    """The Add behind reads a computed value: no bias."""
    body = f"""{CENTRE} q = Pow(d, two) v = ReduceMean(q, axes) a = Add(v, eps) r = Sqrt(a) n = Div(d, r)
        s = Mul(n, w) y = Add(s, x)"""
    assert counts(raised(spelled(f"{HEAD} {body} }}", {"w": (8,)}), FEEDS)) == {"LayerNormalization": 1, "Add": 1}


SQUARE = f"{AXES} q = Pow(x, two) v = ReduceMean(q, axes) a = Add(v, eps) r = Sqrt(a)"
RMS_NORMS = {
    "reciprocal": f"{SQUARE} i = Reciprocal(r) n = Mul(x, i) y = Mul(w, n)",
    "div": f"{SQUARE} n = Div(x, r) y = Mul(n, w)",
    "one over": f"{SQUARE} one = Constant<value_float = 1.0>() i = Div(one, r) n = Mul(i, x) y = Mul(n, w)",
    "pow": f"""{AXES} q = Mul(x, x) v = ReduceMean(q, axes) a = Add(v, eps) h = Constant<value_float = -0.5>()
        i = Pow(a, h) """
    "n = Mul(x, i) y = Mul(n, w)",
}


@pytest.mark.parametrize("spelling", RMS_NORMS)
def test_rms_norm_is_raised(spelling: str) -> None:
    model = raised(spelled(f"{HEAD} {RMS_NORMS[spelling]} }}", {"w": (8,)}), FEEDS)
    assert counts(model) == {"qcompiler::RMSNorm": 1}
    (node,) = model.graph
    assert [v.name for v in node.inputs if v is not None] == ["x", "w"]


def test_gemmas_offset_becomes_a_plain_vector_with_its_map() -> None:
    body = f"{SQUARE} n = Div(x, r) one = Constant<value_float = 1.0>() o = Add(one, w) y = Mul(n, o)"
    before = spelled(f"{HEAD} {body} }}", {"w": (8,)})
    plain = before.graph.initializers["w"].const_value
    assert plain is not None
    model = raised(before, FEEDS)
    assert counts(model) == {"qcompiler::RMSNorm": 1}
    vector = model.graph.initializers["w"]
    assert vector.metadata_props == {PARAMETER: "w", MAP: "one_plus"}
    assert vector.const_value is not None
    np.testing.assert_array_equal(vector.const_value.numpy(), 1 + plain.numpy())


@pytest.mark.parametrize(
    "body",
    [
        f"{SQUARE} n = Div(x, r) y = Mul(n, x)",  # no weight
        f"""{AXES} q = Mul(x, x) z = Constant<value_ints = [1]>() v = ReduceMean(q, z) a = Add(v, eps)
            r = Sqrt(a) n = Div(x, r) y = Mul(n, w)""",
        f"""{AXES} three = Constant<value_float = 3.0>() t = Abs(x) q = Pow(t, three) v = ReduceMean(q, axes)
            a = Add(v, eps) r = Sqrt(a) """
        "n = Div(x, r) y = Mul(n, w)",
        f"{SQUARE} z = Abs(x) n = Div(z, r) y = Mul(n, w)",
    ],
)
def test_what_is_no_rms_norm_stays(body: str) -> None:
    model = raised(spelled(f"{HEAD} {body} }}", {"w": (8,)}), FEEDS)
    assert not any(node.domain == "qcompiler" for node in model.graph)
