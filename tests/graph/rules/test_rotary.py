from __future__ import annotations

import pytest

from tests.graph.rules.spelling import counts, normal, raised, spelled

HEAD = "g (float[B, 2, S, 8] x, float[C, 1, S, 8] cos, float[C, 1, S, 8] sin) => (float[B, 2, S, 8] y) {"
SLICES = """zero = Constant<value_ints = [0]>() mid = Constant<value_ints = [4]>()
    end = Constant<value_ints = [9223372036854775807]>()
    axis = Constant<value_ints = [3]>() a = Slice(x, zero, mid, axis) b = Slice(x, mid, end, axis)"""
SPLIT = "a, b = Split<axis = -1, num_outputs = 2>(x)"
TAIL = "n = Neg(b) r = Concat<axis = -1>(n, a) p = Mul(r, sin) c = Mul(x, cos) y = Add(c, p)"


def _feeds(batch: int) -> dict[str, object]:
    return {"x": normal(2, 2, 3, 8), "cos": normal(batch, 1, 3, 8, seed=2), "sin": normal(batch, 1, 3, 8, seed=3)}


@pytest.mark.parametrize("halves", [SLICES, SPLIT])
@pytest.mark.parametrize("batch", [1, 2])
def test_rotary_embedding_is_raised(halves: str, batch: int) -> None:
    model = raised(spelled(f"{HEAD} {halves} {TAIL} }}"), _feeds(batch))
    assert counts(model) == {"qcompiler::RotaryEmbedding": 1}
    (node,) = model.graph
    assert [v.name for v in node.inputs if v is not None] == ["x", "cos", "sin"]


def test_factors_in_the_other_order() -> None:
    tail = "n = Neg(b) r = Concat<axis = 3>(n, a) p = Mul(sin, r) c = Mul(cos, x) y = Add(p, c)"
    assert counts(raised(spelled(f"{HEAD} {SPLIT} {tail} }}"), _feeds(1))) == {"qcompiler::RotaryEmbedding": 1}


@pytest.mark.parametrize(
    "tail",
    [
        "n = Neg(b) r = Concat<axis = -1>(a, n) p = Mul(r, sin) c = Mul(x, cos) y = Add(c, p)",  # halves swapped
        """n = Neg(a) r = Concat<axis = -1>(n, b) p = Mul(r, sin) c = Mul(x, cos)
            y = Add(c, p)""",  # the wrong half negated
        "n = Neg(b) r = Concat<axis = -1>(n, a) p = Mul(r, sin) c = Mul(x, cos) y = Sub(c, p)",
        "n = Neg(b) r = Concat<axis = -1>(n, a) p = Mul(r, sin) z = Abs(x) c = Mul(z, cos) y = Add(c, p)",
    ],
)
def test_what_is_no_rotation_stays(tail: str) -> None:
    assert "qcompiler::RotaryEmbedding" not in counts(raised(spelled(f"{HEAD} {SPLIT} {tail} }}"), _feeds(1)))


def test_unequal_halves_stay() -> None:
    body = f"{HEAD} sizes = Constant<value_ints = [2, 6]>() a, b = Split<axis = -1>(x, sizes) {TAIL} }}"
    assert "qcompiler::RotaryEmbedding" not in counts(raised(spelled(body), _feeds(1)))
