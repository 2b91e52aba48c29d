"""The 24 cases of DESIGN.md section 3, each a graph in ONNX text (whole models: test_flow_families)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.core import OptionError
from qcompiler.graph.absorb import FoldError, fold, insert_scale
from qcompiler.graph.flow import analyse
from qcompiler.graph.verify import relative_error
from tests.graph.tiny import assert_folds_keep_outputs, feeds_for, outputs, pairs, site_of, tiny

LN = {"g": [8], "b": [8]}


def random_scale(channels: int, seed: int = 3) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).uniform(-2, 2, channels)).astype(np.float32)


def test_case_01_norm_also_read_by_a_residual() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,8] y) {
            h = LayerNormalization(x, g, b)
            q = MatMul(h, wq)
            y = Add(q, h)
        }""",
        {**LN, "wq": [8, 8]},
    )
    site = site_of(model, "h")
    assert [sink.linear for sink in site.sinks] == ["q"]
    assert site.scale_blocked.all()
    assert not site.foldable
    assert site.blockers[0].node == "y"
    with pytest.raises(FoldError, match="does not carry the same scale"):
        fold(model, site, random_scale(8))
    feeds = feeds_for(model)
    before = outputs(model, feeds)
    insert_scale(model, site.value, ["q"], random_scale(8), np.linspace(-1, 1, 8))
    assert relative_error(before, outputs(model, feeds)) < 1e-5


def test_case_02_q_k_v_share_a_norm() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,8] q, float[B,S,4] k, float[B,S,4] v) {
            h = LayerNormalization(x, g, b)
            q = MatMul(h, wq)
            k = MatMul(h, wk)
            v = MatMul(h, wv)
        }""",
        {**LN, "wq": [8, 8], "wk": [8, 4], "wv": [8, 4]},
    )
    assert pairs(model) == {"h": {"q", "k", "v"}}
    assert_folds_keep_outputs(model, shift=True)


def test_case_03_gate_and_up_share() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,8] y) {
            h = qcompiler.RMSNorm<epsilon: float = 1e-6>(x, g)
            gate = MatMul(h, wg)
            up = MatMul(h, wu)
            act = Gelu(gate)
            product = Mul(act, up)
            y = MatMul(product, wd)
        }""",
        {"g": [8], "wg": [8, 12], "wu": [8, 12], "wd": [12, 8]},
    )
    assert pairs(model) == {"h": {"gate", "up"}, "up": {"y"}}
    assert_folds_keep_outputs(model)


@pytest.mark.parametrize("two_norms", [False, True], ids=["falcon", "neox"])
def test_case_04_parallel_attention_and_mlp(two_norms: bool) -> None:
    second = "LayerNormalization(x, g2, b2)" if two_norms else "Identity(h)"
    model = tiny(
        f"""g (float[B,S,8] x) => (float[B,S,8] y) {{
            h = LayerNormalization(x, g, b)
            h2 = {second}
            attn = MatMul(h, wa)
            fc1 = MatMul(h2, w1)
            act = Gelu(fc1)
            fc2 = MatMul(act, w2)
            both = Add(attn, fc2)
            y = Add(both, x)
        }}""",
        {**LN, **({"g2": [8], "b2": [8]} if two_norms else {}), "wa": [8, 8], "w1": [8, 16], "w2": [16, 8]},
    )
    assert pairs(model) == ({"h": {"attn"}, "h2": {"fc1"}} if two_norms else {"h": {"attn", "fc1"}})
    assert_folds_keep_outputs(model, shift=True)


def test_case_05_rms_norm_has_no_bias() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,6] y) {
            h = qcompiler.RMSNorm<epsilon: float = 1e-6>(x, g)
            y = MatMul(h, w)
        }""",
        {"g": [8], "w": [8, 6]},
    )
    site = site_of(model, "h")
    assert site.shift_blocked.all()
    assert not site.scale_blocked.any()
    with pytest.raises(FoldError, match="RMSNorm has no bias"):
        fold(model, site, shift=np.ones(8))
    assert fold(model, site, random_scale(8), np.ones(8)).shift is None
    assert "h.bias" not in model.graph.initializers


def test_case_06_offset_norm() -> None:
    """Gemma's 1 + w arrives as one vector: it is scaled like any other, and the numbers say so."""
    offset = 1 + np.linspace(-0.3, 0.3, 8)
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,6] y) {
            h = qcompiler.RMSNorm<epsilon: float = 1e-6>(x, one_plus_w)
            y = MatMul(h, w)
        }""",
        {"one_plus_w": offset, "w": [8, 6]},
    )
    scale = random_scale(8)
    fold(model, site_of(model, "h"), scale)
    assert np.allclose(model.graph.initializers["one_plus_w"].const_value.numpy(), offset / scale, rtol=1e-6)


def test_case_07_layer_norm_without_affine() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,6] y, float[B,S,6] z) {
            h = LayerNormalization(x, ones)
            y = MatMul(h, w)
            h2 = LayerNormalization(y, ones6)
            z = MatMul(h2, w2)
        }""",
        {"ones": np.ones(8), "ones6": np.ones(6), "w": [8, 6], "w2": [6, 6]},
    )
    assert_folds_keep_outputs(model, shift=True)
    assert {"h.bias", "h2.bias"} <= set(model.graph.initializers)


def test_case_08_linear_without_bias_under_shift() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,6] y) {
            h = LayerNormalization(x, g, b)
            y = MatMul(h, w)
        }""",
        {**LN, "w": [8, 6]},
    )
    feeds = feeds_for(model)
    before = outputs(model, feeds)
    plan = fold(model, site_of(model, "h"), shift=np.linspace(-2, 2, 8))
    assert plan.shift is not None
    assert "y.bias" in model.graph.initializers
    assert relative_error(before, outputs(model, feeds)) < 1e-5
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_case_09_bias_after_the_matmul_and_weights_of_three_axes() -> None:
    """Gemm and Conv1D become MatMul + Add in canonical form (test_flow_families); a batched weight is a sink itself."""
    model = tiny(
        """g (float[2,S,8] x) => (float[2,S,6] y, float[2,S,6] z) {
            h = LayerNormalization(x, g, b)
            y = MatMul(h, batched)
            product = MatMul(h, w)
            z = Add(bias, product)
        }""",
        {**LN, "batched": [2, 8, 6], "w": [8, 6], "bias": [6]},
    )
    site = site_of(model, "h")
    assert {sink.linear for sink in site.sinks} == {"y", "product"}
    assert site.shift_blocked.all()
    assert not site.scale_blocked.any()
    assert_folds_keep_outputs(model)


def test_case_09_gemm_that_is_not_canonical_blocks() -> None:
    model = tiny(
        """g (float[B,8] x) => (float[B,6] y, float[B,6] z) {
            h = LayerNormalization(x, g, b)
            y = Gemm<transB: int = 1, alpha: float = 0.5>(h, w)
            z = MatMul(h, w2)
        }""",
        {**LN, "w": [6, 8], "w2": [8, 6]},
    )
    assert site_of(model, "h").scale_blocked.all()


def test_case_10_reshape_between() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[N,6] y) {
            h = LayerNormalization(x, g, b)
            shape = Shape(h)
            batch = Slice(shape, zero, one)
            joined = Concat<axis: int = 0>(minus, eight)
            rows = Reshape(h, joined)
            y = MatMul(rows, w)
        }""",
        {
            **LN,
            "zero": np.array([0]),
            "one": np.array([1]),
            "minus": np.array([-1]),
            "eight": np.array([8]),
            "w": [8, 6],
        },
    )
    assert pairs(model) == {"h": {"y"}}
    assert_folds_keep_outputs(model, shift=True)


def test_case_10_reshape_that_mixes_positions_into_channels_blocks() -> None:
    model = tiny(
        """g (float[B,4,8] x) => (float[B,2,6] y) {
            h = LayerNormalization(x, g, b)
            rows = Reshape(h, shape)
            y = MatMul(rows, w)
        }""",
        {**LN, "shape": np.array([0, 2, 16]), "w": [16, 6]},
    )
    site = site_of(model, "h")
    assert site.foldable  # two tokens side by side: each channel feeds two rows of w
    assert (site.sinks[0].columns == np.tile(np.arange(8), 2)).all()
    assert_folds_keep_outputs(model)
    model = tiny(
        """g (float[B,4,8] x) => (float[B,8,6] y) {
            h = LayerNormalization(x, g, b)
            rows = Reshape(h, shape)
            y = MatMul(rows, w)
        }""",
        {**LN, "shape": np.array([0, 8, 4]), "w": [4, 6]},
    )
    assert site_of(model, "h").scale_blocked.all()


ATTENTION = """g (float[B,S,8] x) => (float[B,S,8] y) {{
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    qr = Reshape(q, q_shape)
    kr = Reshape(k, kv_shape)
    vr = Reshape(v, kv_shape)
    qt = Transpose<perm: ints = [0, 2, 1, 3]>(qr)
    kt = Transpose<perm: ints = [0, 2, 1, 3]>(kr)
    vt = Transpose<perm: ints = [0, 2, 1, 3]>(vr)
    k5 = Unsqueeze(kt, two)
    v5 = Unsqueeze(vt, two)
    ke = Expand(k5, repeat)
    ve = Expand(v5, repeat)
    size = Shape(qt)
    kh = Reshape(ke, size)
    vh = Reshape(ve, size)
    {attention}
    at = Transpose<perm: ints = [0, 2, 1, 3]>(a)
    ar = Reshape(at, flat)
    y = MatMul(ar, wo)
}}"""
PLAIN = "a = qcompiler.Attention<scale: float = 0.5>(qt, kh, vh)"


def attention(kv_heads: int, how: str = PLAIN) -> ir.Model:
    """Four heads of two channels, keys and values of ``kv_heads`` heads repeated."""
    return tiny(
        ATTENTION.format(attention=how),
        {
            "wq": [8, 8],
            "wk": [8, 2 * kv_heads],
            "wv": [8, 2 * kv_heads],
            "wo": [8, 8],
            "q_shape": np.array([0, 0, 4, 2]),
            "kv_shape": np.array([0, 0, kv_heads, 2]),
            "two": np.array([2]),
            "repeat": np.array([1, 1, 4 // kv_heads, 1, 1]),
            "flat": np.array([0, 0, 8]),
            "hidden": np.array(-np.inf, dtype=np.float32),
            "least": np.array(-1e30, dtype=np.float32),
            "open": np.array(0, dtype=np.float32),
        },
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_case_11_v_to_o_under_gqa_and_mqa(kv_heads: int) -> None:
    model = attention(kv_heads)
    assert pairs(model) == {"v": {"y"}}
    columns = site_of(model, "v").sinks[0].columns.reshape(4, 2)
    assert (columns // 2 == (np.arange(4) // (4 // kv_heads))[:, None]).all()
    assert_folds_keep_outputs(model, shift=True)


@pytest.mark.parametrize(("constant", "exact"), [("hidden", False), ("least", True)])
def test_case_11_shift_through_attention_only_where_no_row_can_be_masked_throughout(constant: str, exact: bool) -> None:
    how = (
        f"mask_bool = Less(kh, qt) reduced = ReduceMax<keepdims: int = 1>(qt, last) "
        f"seen = Less(reduced, open) mask = Where(seen, open, {constant}) "
        "a = qcompiler.MaskedAttention<scale: float = 0.5>(qt, kh, vh, mask)"
    ).replace("mask_bool = Less(kh, qt) ", "")
    text = ATTENTION.format(attention=how)
    base = attention(2)
    weights = {name: value.const_value.numpy() for name, value in base.graph.initializers.items()}
    model = tiny(text, {**weights, "last": np.array([-1])})
    assert pairs(model) == {"v": {"y"}}
    assert site_of(model, "v").shift_blocked.all() == (not exact)
    assert_folds_keep_outputs(model, shift=True)


def test_case_11_plain_softmax_matmul() -> None:
    model = attention(
        2,
        "kk = Transpose<perm: ints = [0, 1, 3, 2]>(kh) scores = MatMul(qt, kk) p = Softmax(scores) a = MatMul(p, vh)",
    )
    assert pairs(model) == {"v": {"y"}}
    assert not site_of(model, "v").shift_blocked.any()
    assert_folds_keep_outputs(model, shift=True)


@pytest.mark.parametrize("interleaved", [False, True], ids=["gpt2", "bloom"])
def test_case_12_fused_qkv(interleaved: bool) -> None:
    """Only the V channels of the fused Linear are free, wherever they lie."""
    if interleaved:
        split = """r5 = Reshape(qkv, by_head)
            qr, kr, vr = Split<axis: int = 3, num_outputs: int = 3>(r5)
            q4 = Squeeze(qr, three) k4 = Squeeze(kr, three) v4 = Squeeze(vr, three)"""
    else:
        split = """qr, kr, vr = Split<axis: int = 2, num_outputs: int = 3>(qkv)
            q4 = Reshape(qr, heads) k4 = Reshape(kr, heads) v4 = Reshape(vr, heads)"""
    model = tiny(
        f"""g (float[B,S,8] x) => (float[B,S,8] y) {{
            product = MatMul(x, w)
            qkv = Add(product, bias)
            {split}
            qt = Transpose<perm: ints = [0, 2, 1, 3]>(q4)
            kt = Transpose<perm: ints = [0, 2, 1, 3]>(k4)
            vt = Transpose<perm: ints = [0, 2, 1, 3]>(v4)
            a = qcompiler.Attention<scale: float = 0.7>(qt, kt, vt)
            at = Transpose<perm: ints = [0, 2, 1, 3]>(a)
            ar = Reshape(at, flat)
            y = MatMul(ar, wo)
        }}""",
        {
            "w": [8, 24],
            "bias": [24],
            "wo": [8, 8],
            "by_head": np.array([0, 0, 4, 3, 2]),
            "heads": np.array([0, 0, 4, 2]),
            "three": np.array([3]),
            "flat": np.array([0, 0, 8]),
        },
    )
    site = site_of(model, "qkv")
    v = np.arange(24).reshape(4, 3, 2)[:, 2].ravel() if interleaved else np.arange(16, 24)
    assert np.flatnonzero(~site.scale_blocked).tolist() == v.tolist()
    assert site.sinks[0].columns.tolist() == v.tolist()
    assert_folds_keep_outputs(model, shift=True)


def test_case_12_fused_gate_up() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,8] y) {
            gate_up = MatMul(x, w)
            gate, up = Split<axis: int = -1, num_outputs: int = 2>(gate_up)
            half = Sigmoid(gate)
            silu = Mul(gate, half)
            product = Mul(up, silu)
            y = MatMul(product, wd)
        }""",
        {"w": [8, 24], "wd": [12, 8]},
    )
    site = site_of(model, "gate_up")
    assert site.scale_blocked.tolist() == [True] * 12 + [False] * 12
    assert site.shift_blocked.all()
    assert_folds_keep_outputs(model)


def test_case_13_up_to_down_through_a_gate() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,8] y) {
            gate = MatMul(x, wg)
            up = MatMul(x, wu)
            half = Sigmoid(gate)
            silu = Mul(gate, half)
            product = Mul(silu, up)
            y = MatMul(product, wd)
        }""",
        {"wg": [8, 12], "wu": [8, 12], "wd": [12, 8]},
    )
    assert pairs(model) == {"up": {"y"}}
    assert site_of(model, "up").shift_blocked.all()
    assert_folds_keep_outputs(model)


@pytest.mark.parametrize(("op", "legal"), [("Relu", True), ("LeakyRelu", True), ("Gelu", False), ("Tanh", False)])
def test_case_14_activation_between(op: str, legal: bool) -> None:
    model = tiny(
        f"""g (float[B,S,8] x) => (float[B,S,8] y) {{
            product = MatMul(x, w1)
            fc1 = Add(product, b1)
            act = {op}(fc1)
            y = MatMul(act, w2)
        }}""",
        {"w1": [8, 12], "b1": [12], "w2": [12, 8]},
    )
    assert pairs(model) == ({"fc1": {"y"}} if legal else {})
    if legal:
        assert site_of(model, "fc1").shift_blocked.all()
        assert_folds_keep_outputs(model, shift=True)


@pytest.mark.parametrize("constant", [True, False])
def test_case_15_mixture_of_experts(constant: bool) -> None:
    """Router and all experts scale together; experts gathered by token are no constant weight, so all is blocked."""
    experts = "y = MatMul(spread, we)" if constant else "picked = Gather(we, chosen) y = MatMul(rows, picked)"
    model = tiny(
        f"""g (float[S,8] x) => (float[E,S,6] y, float[S,2] router) {{
            h = LayerNormalization(x, g, b)
            router = MatMul(h, wr)
            chosen = ArgMax<axis: int = 1, keepdims: int = 0>(router)
            spread = Expand(h, shape)
            rows = Unsqueeze(h, one)
            {experts}
        }}""",
        {**LN, "wr": [8, 2], "we": [2, 8, 6], "shape": np.array([2, 1, 8]), "one": np.array([1])},
    )
    assert pairs(model) == ({"h": {"router", "y"}} if constant else {})
    if constant:
        assert_folds_keep_outputs(model)
    else:
        assert "not constant" in site_of(model, "h").blockers[0].why


@pytest.mark.parametrize("what", ["q_norm", "rope"])
def test_case_16_norms_and_rope_on_queries_refuse(what: str) -> None:
    how = {
        "q_norm": "qn = qcompiler.RMSNorm<epsilon: float = 1e-6>(qt, g) ",
        "rope": "qn = qcompiler.RotaryEmbedding(qt, cos, sin) ",
    }[what] + "a = qcompiler.Attention<scale: float = 0.5>(qn, kh, vh)"
    base = attention(2)
    weights = {name: value.const_value.numpy() for name, value in base.graph.initializers.items()}
    model = tiny(
        ATTENTION.format(attention=how),
        {**weights, "g": [2], "cos": np.ones(2), "sin": np.zeros(2)},
    )
    assert pairs(model) == {"v": {"y"}}
    assert_folds_keep_outputs(model)


def test_case_17_tied_weights_and_shared_initializers() -> None:
    """A Linear tied to the embedding gets its own weight when scaled; so do norms that share one initializer."""
    model = tiny(
        """g (int64[B,S] ids) => (float[B,S,8] y, float[B,S,8] e) {
            e = Gather(w, ids)
            h = LayerNormalization(e, ones, zeros)
            a = MatMul(h, w)
            h2 = LayerNormalization(a, ones, zeros)
            y = MatMul(h2, w)
        }""",
        {"w": [8, 8], "ones": np.ones(8), "zeros": np.zeros(8)},
    )
    assert pairs(model) == {"h": {"a"}, "h2": {"y"}}
    assert_folds_keep_outputs(model, shift=True)
    gather = next(node for node in model.graph if node.op_type == "Gather")
    assert gather.inputs[0].name == "w"


def test_case_18_cross_attention() -> None:
    """Two norms feed one attention: queries from the decoder's, keys and values from the encoder's."""
    model = tiny(
        """g (float[B,S,8] x, float[B,T,8] encoded) => (float[B,S,8] y) {
            h = LayerNormalization(x, g, b)
            e = LayerNormalization(encoded, g2, b2)
            q = MatMul(h, wq)
            k = MatMul(e, wk)
            v = MatMul(e, wv)
            qt = Unsqueeze(q, one)
            kt = Unsqueeze(k, one)
            vt = Unsqueeze(v, one)
            a = qcompiler.Attention<scale: float = 0.3>(qt, kt, vt)
            at = Squeeze(a, one)
            y = MatMul(at, wo)
        }""",
        {
            **LN,
            "g2": [8],
            "b2": [8],
            "wq": [8, 8],
            "wk": [8, 8],
            "wv": [8, 8],
            "wo": [8, 8],
            "one": np.array([1]),
        },
    )
    assert pairs(model) == {"h": {"q"}, "e": {"k", "v"}, "v": {"y"}}
    assert_folds_keep_outputs(model, shift=True)


def test_case_19_norm_output_is_a_graph_output() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,6] y, float[B,S,8] h, float[B,S,8] i) {
            h = LayerNormalization(x, g, b)
            y = MatMul(h, w)
            h2 = LayerNormalization(x, g, b)
            i = Identity(h2)
            y2 = MatMul(h2, w)
        }""",
        {**LN, "w": [8, 6]},
    )
    assert pairs(model) == {}
    assert all(site.scale_blocked.all() for site in analyse(model))


def test_case_20_one_linear_called_twice() -> None:
    """Called on one value, both calls keep sharing one weight; called on two values, each gets its own."""
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,6] y, float[B,S,6] z, float[B,S,6] t) {
            h = LayerNormalization(x, g, b)
            rows = Identity(h)
            y = MatMul(h, w)
            z = MatMul(rows, w)
            h2 = LayerNormalization(x, g, b)
            t = MatMul(h2, w2)
        }""",
        {**LN, "w": [8, 6], "w2": [8, 6]},
    )
    assert pairs(model) == {"h": {"y", "z"}, "h2": {"t"}}
    assert_folds_keep_outputs(model, shift=True)
    called = [node.inputs[1] for node in model.graph if node.name in ("y", "z")]
    assert called[0] is called[1]
    assert called[0].name == "w"
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,8] y) {
            h = LayerNormalization(x, g, b)
            first = MatMul(h, w)
            act = Relu(first)
            y = MatMul(act, w)
        }""",
        {**LN, "w": [8, 8]},
    )
    assert pairs(model) == {"h": {"first"}, "first": {"y"}}
    assert_folds_keep_outputs(model)


def test_case_21_extra_outputs_of_layer_normalization_are_used() -> None:
    """Mean and inverse deviation are those of the input: a scale of the first output leaves them."""
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,6] y, float[B,S,1] mean, float[B,S,1] deviation) {
            h, mean, deviation = LayerNormalization(x, g, b)
            y = MatMul(h, w)
        }""",
        {**LN, "w": [8, 6]},
    )
    assert pairs(model) == {"h": {"y"}}
    assert_folds_keep_outputs(model, shift=True)


def test_case_22_half_precision_overflow_is_refused() -> None:
    weight = np.full((8, 6), 1000, dtype=np.float16)
    model = tiny(
        """g (float16[B,S,8] x) => (float16[B,S,6] y) {
            h = LayerNormalization(x, g, b)
            y = MatMul(h, w)
        }""",
        {"g": np.ones(8, np.float16), "b": np.zeros(8, np.float16), "w": weight},
    )
    with pytest.raises(FoldError, match="'w' would overflow float16"):
        fold(model, site_of(model, "h"), np.full(8, 100))
    with pytest.raises(FoldError, match="'g' would overflow float16"):
        fold(model, site_of(model, "h"), np.full(8, 1e-5))
    assert (model.graph.initializers["w"].const_value.numpy() == weight).all()
    feeds = feeds_for(model)
    before = outputs(model, feeds)
    fold(model, site_of(model, "h"), np.full(8, 4))
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT16
    assert relative_error(before, outputs(model, feeds)) < 2e-3


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
def test_case_23_dead_channels(bad: float) -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,6] y) {
            h = LayerNormalization(x, g, b)
            y = MatMul(h, w)
        }""",
        {"g": np.array([0.0, 1, 1, 1, 1, 1, 1, 1]), "b": np.zeros(8), "w": [8, 6]},
    )
    site = site_of(model, "h")
    scale = np.ones(8)
    scale[0] = bad
    with pytest.raises(OptionError, match="scale must be finite and greater than 0"):
        fold(model, site, scale)
    assert_folds_keep_outputs(model)


def test_case_24_output_head_after_the_final_norm() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,1,50] logits) {
            h = qcompiler.RMSNorm<epsilon: float = 1e-6>(x, g)
            last = Slice(h, minus, end, axis)
            lm_head = MatMul(last, w)
            capped = Div(lm_head, cap)
            tanh = Tanh(capped)
            logits = Mul(tanh, cap)
        }""",
        {
            "g": [8],
            "w": [8, 50],
            "minus": np.array([-1]),
            "end": np.array([2**62]),
            "axis": np.array([1]),
            "cap": np.array(30.0),
        },
    )
    assert pairs(model) == {"h": {"lm_head"}}
    assert_folds_keep_outputs(model)
