from __future__ import annotations

import numpy as np
import pytest

from tests.graph.rules.spelling import counts, normal, raised, spelled

QKV = "float[B, 2, S, 4] q, float[B, 2, T, 4] k, float[B, 2, T, 4] v"
Y = "(float[B, 2, S, 4] y)"
HALF = "half = Constant<value_float = 0.5>() two = Constant<value_float = 2.0>()"
KEYS = "t = Transpose<perm = [0, 1, 3, 2]>(k)"
FEEDS = {"q": normal(2, 2, 3, 4), "k": normal(2, 2, 5, 4, seed=2), "v": normal(2, 2, 5, 4, seed=3)}
MASK = np.where(np.arange(5)[None, None, None, :] < np.array([5, 3])[:, None, None, None], 0, -3.4e38).astype(
    np.float32
)

SCALES = {
    "none": (f"{KEYS} s = MatMul(q, t) p = Softmax<axis = -1>(s) y = MatMul(p, v)", 1.0),
    "behind, mul": (f"{KEYS} {HALF} m = MatMul(q, t) s = Mul(m, half) p = Softmax(s) y = MatMul(p, v)", 0.5),
    "behind, div": (f"{KEYS} {HALF} m = MatMul(q, t) s = Div(m, two) p = Softmax<axis = 3>(s) y = MatMul(p, v)", 0.5),
    "on q": (f"{KEYS} {HALF} a = Mul(half, q) s = MatMul(a, t) p = Softmax(s) y = MatMul(p, v)", 0.5),
    "roots on both": (
        f"{KEYS} {HALF} a = Mul(q, half) b = Mul(t, half) s = MatMul(a, b) p = Softmax(s) y = MatMul(p, v)",
        0.25,
    ),
    "on k before its transpose": (
        f"""{HALF} c = Div(k, two) t = Transpose<perm = [0, 1, 3, 2]>(c) s = MatMul(q, t) p = Softmax(s)
            y = MatMul(p, v)""",
        0.5,
    ),
    "guard": (
        f"""{KEYS} zero = Constant<value_float = 0.0>() s = MatMul(q, t) p = Softmax(s) n = IsNaN(p)
            g = Where(n, zero, p) """
        "y = MatMul(g, v)",
        1.0,
    ),
    "dropout": (f"{KEYS} s = MatMul(q, t) p = Softmax(s) d = Dropout(p) y = MatMul(d, v)", 1.0),
}


@pytest.mark.parametrize("spelling", SCALES)
def test_scale_is_found_wherever_it_is(spelling: str) -> None:
    body, scale = SCALES[spelling]
    model = raised(spelled(f"g ({QKV}) => {Y} {{ {body} }}"), FEEDS)
    assert counts(model) == {"qcompiler::Attention": 1}
    (node,) = model.graph
    assert [v.name for v in node.inputs if v is not None] == ["q", "k", "v"]
    assert node.attributes["scale"].as_float() == pytest.approx(scale)


MASKS = {
    "added": "m = MatMul(q, t) c = Mul(m, half) s = Add(c, mask)",
    "added on the left": "m = MatMul(q, t) c = Mul(m, half) s = Add(mask, c)",
    "clamped": """m = MatMul(q, t) c = Mul(m, half) a = Add(c, mask)
        low = Constant<value_float = -3.4028234e38>() s = Max(a, low)""",
}


@pytest.mark.parametrize("spelling", MASKS)
def test_an_additive_mask_is_the_fourth_input(spelling: str) -> None:
    body = f"{KEYS} {HALF} {MASKS[spelling]} p = Softmax(s) y = MatMul(p, v)"
    model = raised(spelled(f"g ({QKV}, float[B, 1, 1, T] mask) => {Y} {{ {body} }}"), {**FEEDS, "mask": MASK})
    assert counts(model) == {"qcompiler::MaskedAttention": 1}
    (node,) = model.graph
    assert [v.name for v in node.inputs if v is not None] == ["q", "k", "v", "mask"]
    assert node.attributes["scale"].as_float() == pytest.approx(0.5)


@pytest.mark.parametrize("fill", [-10000.0, -1e9, -3.4028234e38])
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("lengths", [(5, 3), (5, 0)])
def test_a_fill_becomes_an_additive_mask_even_in_rows_masked_throughout(
    fill: float, keeps: bool, lengths: tuple[int, int]
) -> None:
    where = "Where(seen, c, fill)" if keeps else "Where(seen, fill, c)"
    body = f"""{KEYS} {HALF} fill = Constant<value_float = {fill}>() m = MatMul(q, t) c = Mul(m, half)
        s = {where} p = Softmax(s) y = MatMul(p, v)"""
    seen = np.arange(5)[None, None, None, :] < np.array(lengths)[:, None, None, None]
    model = raised(
        spelled(f"g ({QKV}, bool[B, 1, 1, T] seen) => {Y} {{ {body} }}"), {**FEEDS, "seen": seen if keeps else ~seen}
    )
    assert counts(model) == {"Where": 1, "qcompiler::MaskedAttention": 1}


def test_a_fill_and_a_mask_together() -> None:
    """GPT-2's causal fill with a padding mask added behind it."""
    body = f"""{KEYS} fill = Constant<value_float = -10000.0>() m = MatMul(q, t) c = Where(causal, m, fill)
        s = Add(c, mask)
        p = Softmax(s) y = MatMul(p, v)"""
    causal = np.tril(np.ones((3, 5), bool), 2)[None, None]
    model = raised(
        spelled(f"g ({QKV}, bool[1, 1, S, T] causal, float[B, 1, 1, T] mask) => {Y} {{ {body} }}"),
        {**FEEDS, "mask": MASK, "causal": causal},
    )
    assert counts(model) == {"Where": 1, "Add": 1, "qcompiler::MaskedAttention": 1}


def test_a_mask_that_masks_nothing_is_dropped() -> None:
    body = f"""{KEYS} true = Constant<value = bool {{1}}>() zero = Constant<value_float = 0.0>()
        low = Constant<value_float = -3e38>()
        size = Shape(q) cond = Expand(true, size) mask = Where(cond, zero, low) m = MatMul(q, t)
        s = Add(m, mask) p = Softmax(s)
        y = MatMul(p, v)"""
    feeds = {**FEEDS, "k": normal(2, 2, 4, 4, seed=2), "v": normal(2, 2, 4, 4, seed=3)}
    assert counts(raised(spelled(f"g ({QKV}) => {Y} {{ {body} }}"), feeds)) == {"qcompiler::Attention": 1}


def test_keys_transposed_in_one_step_get_a_canonical_transpose() -> None:
    body = """t = Transpose<perm = [0, 2, 3, 1]>(k) s = MatMul(q, t) p = Softmax(s) y = MatMul(p, v)"""
    model = raised(
        spelled(f"g (float[B, 2, S, 4] q, float[B, T, 2, 4] k, float[B, 2, T, 4] v) => {Y} {{ {body} }}"),
        {**FEEDS, "k": normal(2, 5, 2, 4, seed=2)},
    )
    assert counts(model) == {"Transpose": 1, "qcompiler::Attention": 1}
    transpose = next(iter(model.graph))
    assert list(transpose.attributes["perm"].as_ints()) == [0, 2, 1, 3]


def test_keys_through_a_reshape_of_rank_3() -> None:
    """The dynamo exporter's spelling of the transpose."""
    body = """size = Shape(k) minus = Constant<value_ints = [-1]>() tail = Shape<start = 2>(k)
        flat = Concat<axis = 0>(minus, tail)
        f = Reshape(k, flat) ft = Transpose<perm = [0, 2, 1]>(f) head = Shape<start = 0, end = 2>(k)
        d = Shape<start = 3>(k)
        l = Shape<start = 2, end = 3>(k) target = Concat<axis = 0>(head, d, l) t = Reshape(ft, target) s = MatMul(q, t)
        p = Softmax(s) y = MatMul(p, v)"""
    assert counts(raised(spelled(f"g ({QKV}) => {Y} {{ {body} }}"), FEEDS)) == {"qcompiler::Attention": 1}


def test_one_key_head_is_expanded_for_all() -> None:
    body = f"{KEYS} s = MatMul(q, t) p = Softmax(s) y = MatMul(p, v)"
    feeds = {"q": FEEDS["q"], "k": normal(2, 1, 5, 4), "v": normal(2, 1, 5, 4, seed=2)}
    model = raised(
        spelled(f"g (float[B, 2, S, 4] q, float[B, 1, T, 4] k, float[B, 1, T, 4] v) => {Y} {{ {body} }}"), feeds
    )
    assert counts(model) == {"Expand": 2, "qcompiler::Attention": 1}


def test_batched_products_of_rank_3_with_alibi() -> None:
    """BLOOM: baddbmm over [B · H, S, D], the position bias added there, the mask added in rank 4."""
    body = """three = Constant<value_ints = [-1, 3, 4]>() half = Constant<value_float = 0.5>()
        q3 = Reshape(q, three) k3 = Reshape(k, three) v3 = Reshape(v, three) t = Transpose<perm = [0, 2, 1]>(k3)
        m = MatMul(q3, t) c = Mul(m, half) a = Add(c, alibi)
        b = Shape<start = 0, end = 1>(q) rest = Constant<value_ints = [2, 3, 3]>() four = Concat<axis = 0>(b, rest)
        w = Reshape(a, four) s = Add(w, mask) p = Softmax(s) square = Constant<value_ints = [-1, 3, 3]>()
        p3 = Reshape(p, square)
        o = MatMul(p3, v3) r = Constant<value_ints = [2, 3, 4]>() out = Concat<axis = 0>(b, r) y = Reshape(o, out)"""
    one = "float[B, 2, 3, 4]"
    feeds = {name: normal(2, 2, 3, 4, seed=i) for i, name in enumerate("qkv")}
    feeds |= {"alibi": normal(4, 1, 3), "mask": MASK[..., :3]}
    model = raised(
        spelled(
            f"g ({one} q, {one} k, {one} v, float[C, 1, 3] alibi, float[B, 1, 1, 3] mask) => ({one} y) {{ {body} }}"
        ),
        feeds,
    )
    assert counts(model) == {"Unsqueeze": 1, "Reshape": 1, "Add": 1, "qcompiler::MaskedAttention": 1}


@pytest.mark.parametrize(
    "body",
    [
        f"{KEYS} m = MatMul(q, t) s = Tanh(m) p = Softmax(s) y = MatMul(p, v)",  # softcap
        f"{KEYS} s = MatMul(q, t) p = Softmax<axis = 2>(s) y = MatMul(p, v)",  # over the queries
        f"{KEYS} s = MatMul(q, t) p = Softmax(s) n = Neg(p) y = MatMul(n, v)",
        "s = MatMul(q, k) p = Softmax(s) y = MatMul(p, p)",
    ],
)
def test_what_is_no_attention_stays(body: str) -> None:
    square = {name: normal(2, 2, 4, 4, seed=i) for i, name in enumerate("qkv")}
    model = raised(spelled(f"g ({QKV}) => {Y} {{ {body} }}"), square)
    assert "Softmax" in counts(model)


def test_probabilities_that_are_an_output_stay_computed() -> None:
    body = f"{KEYS} s = MatMul(q, t) p = Softmax(s) y = MatMul(p, v)"
    model = raised(spelled(f"g ({QKV}) => (float[B, 2, S, 4] y, float[B, 2, S, T] p) {{ {body} }}"), FEEDS)
    assert "Softmax" in counts(model)
