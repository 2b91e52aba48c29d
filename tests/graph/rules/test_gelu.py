from __future__ import annotations

import pytest

from tests.graph.rules.spelling import counts, normal, raised, spelled

HEAD = "g (float[B, 8] x) => (float[B, 8] y) {"
CONSTANTS = """half = Constant<value_float = 0.5>() one = Constant<value_float = 1.0>()
    root = Constant<value_float = 1.4142135>()
    inverse = Constant<value_float = 0.70710678>() three = Constant<value_float = 3.0>()
    c = Constant<value_float = 0.044715>()
    k = Constant<value_float = 0.79788456>() two = Constant<value_float = 2.0>()"""
ERF = "s = Div(x, root) e = Erf(s) a = Add(e, one)"
CUBE = "p = Pow(x, three) q = Mul(p, c) u = Add(x, q) v = Mul(u, k) t = Tanh(v) a = Add(t, one)"

EXACT = {
    "x · (1 + erf) · 0.5": f"{ERF} m = Mul(x, a) y = Mul(m, half)",
    "0.5 · x · (1 + erf)": f"{ERF} h = Mul(half, x) y = Mul(h, a)",
    "x · (0.5 · (1 + erf))": f"{ERF} h = Mul(a, half) y = Mul(x, h)",
    "x · (1 + erf) / 2": f"{ERF} m = Mul(a, x) y = Div(m, two)",
    "erf(x · 0.707)": "s = Mul(x, inverse) e = Erf(s) a = Add(one, e) m = Mul(x, a) y = Mul(m, half)",
}
TANH = {
    "pow": f"{CUBE} h = Mul(x, half) y = Mul(h, a)",
    "x · x": """h = Mul(x, half) z = Mul(k, x) w = Mul(c, x) r = Mul(w, x) o = Add(one, r) v = Mul(z, o)
        t = Tanh(v) a = Add(one, t) """
    "y = Mul(h, a)",
    "x · x · x": """d = Mul(x, x) p = Mul(d, x) q = Mul(c, p) u = Add(x, q) v = Mul(k, u) t = Tanh(v)
        a = Add(t, one) b = Mul(half, a) """
    "y = Mul(x, b)",
}


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("source", ["x", "i"])
def test_gelu_in_any_order_of_factors(approximate: str, source: str) -> None:
    for body in (EXACT if approximate == "none" else TANH).values():
        if source == "i":  # of a value that is itself a scaled one
            body = "i = Mul(x, two) " + body.replace("(x,", "(i,").replace(", x)", ", i)").replace(
                "Mul(i, two)", "Mul(x, two)", 1
            )
        model = raised(spelled(f"{HEAD} {CONSTANTS} {body} }}"), {"x": 3 * normal(2, 8)})
        assert counts(model) == {"Gelu": 1} | ({"Mul": 1} if source == "i" else {})
        node = next(node for node in model.graph if node.op_type == "Gelu")
        assert node.attributes["approximate"].as_string() == approximate
        assert node.inputs[0] is not None
        assert node.inputs[0].name == source


@pytest.mark.parametrize(
    "body",
    [
        f"{ERF} y = Mul(x, a)",  # twice a Gelu
        "e = Erf(x) a = Add(e, one) m = Mul(x, a) y = Mul(m, half)",  # no root
        f"{ERF} z = Abs(x) m = Mul(z, a) y = Mul(m, half)",  # another factor
        "t = Tanh(x) y = Mul(x, t)",
        "s = Sigmoid(x) y = Mul(x, s)",
    ],
)
def test_what_is_no_gelu_stays(body: str) -> None:
    model = raised(spelled(f"{HEAD} {CONSTANTS} {body} }}"), {"x": 3 * normal(2, 8)})
    assert "Gelu" not in counts(model)


def test_a_gelu_that_others_read_in_the_middle_leaves_the_middle() -> None:
    body = f"g (float[B, 8] x) => (float[B, 8] y, float[B, 8] a) {{ {CONSTANTS} {ERF} m = Mul(x, a) y = Mul(m, half) }}"
    assert counts(raised(spelled(body), {"x": normal(2, 8)}))["Gelu"] == 1
