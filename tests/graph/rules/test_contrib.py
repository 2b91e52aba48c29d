from __future__ import annotations

import numpy as np
import pytest

from qcompiler.graph.linear import linears
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.rules.rewriter import MAP
from tests.graph.rules.spelling import counts, normal, raised, spelled

X = "float[2, 3, 8] x"
Y = "float[2, 3, 8] y"
FEEDS = {"x": normal(2, 3, 8)}

SIMPLE = {
    "Gelu": ("y = com.microsoft.Gelu(x)", {}, {"Gelu": 1}),
    "BiasGelu": ("y = com.microsoft.BiasGelu(x, b)", {"b": (8,)}, {"Add": 1, "Gelu": 1}),
    "FastGelu": ("y = com.microsoft.FastGelu(x)", {}, {"Gelu": 1}),
    "FastGelu with bias": ("y = com.microsoft.FastGelu(x, b)", {"b": (8,)}, {"Add": 1, "Gelu": 1}),
    "QuickGelu": ("y = com.microsoft.QuickGelu<alpha = 1.5>(x)", {}, {"Mul": 2, "Sigmoid": 1}),
    "SimplifiedLayerNormalization": (
        "y = SimplifiedLayerNormalization<axis = -1, epsilon = 0.01>(x, b)",
        {"b": (8,)},
        {"qcompiler::RMSNorm": 1},
    ),
    "FusedMatMul": (
        "y = com.microsoft.FusedMatMul<transB = 1, alpha = 0.5>(x, w)",
        {"w": (8, 8)},
        {"MatMul": 1, "Mul": 1},
    ),
    "FusedGemm": (
        """s = Constant<value_ints = [6, 8]>() f = Reshape(x, s) z = com.microsoft.FusedGemm<transB = 1,
            activation = "Relu">(f, w, b)
        t = Constant<value_ints = [2, 3, 8]>() y = Reshape(z, t)""",
        {"w": (8, 8), "b": (8,)},
        {"Reshape": 2, "MatMul": 1, "Add": 1, "Relu": 1},
    ),
}


@pytest.mark.parametrize("name", SIMPLE)
def test_fused_operators_are_what_they_were_fused_from(name: str) -> None:
    body, weights, wanted = SIMPLE[name]
    model = raised(spelled(f"g ({X}) => ({Y}) {{ {body} }}", weights, opset=17), FEEDS, tolerance=5e-5)
    assert counts(model) == wanted
    assert "com.microsoft" not in model.graph.opset_imports


@pytest.mark.parametrize("simplified", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("total", [False, True])
def test_skip_layer_normalization(simplified: bool, bias: bool, total: bool) -> None:
    op = "SkipSimplifiedLayerNormalization" if simplified else "SkipLayerNormalization"
    rest = "" if simplified else ", beta"
    outputs = "y, m, v, z" if total else "y"
    body = f"{outputs} = com.microsoft.{op}<epsilon = 0.01>(x, skip, gamma{rest}{', b' if bias else ''})"
    results = f"{Y}, float[2, 3, 8] z" if total else Y
    weights = {"gamma": (8,), "b": (8,)} | ({} if simplified else {"beta": (8,)})
    model = raised(
        spelled(f"g ({X}, float[2, 3, 8] skip) => ({results}) {{ {body} }}", weights),
        {
            **FEEDS,
            "skip": normal(2, 3, 8, seed=2),
        },
    )
    norm = "qcompiler::RMSNorm" if simplified else "LayerNormalization"
    assert counts(model) == {norm: 1, "Add": 2 if bias else 1}


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("positions", [True, False])
def test_embed_layer_normalization(segments: bool, positions: bool) -> None:
    a, b = ("segments", "segment_table") if segments else ("", "")
    last = ", , positions" if positions else ""
    body = (
        f"y, i = com.microsoft.EmbedLayerNormalization<epsilon = 0.01>(ids, {a}, words, places, {b}, gamma, beta{last})"
    )
    weights = {"words": (10, 8), "places": (6, 8), "segment_table": (2, 8), "gamma": (8,), "beta": (8,)}
    feeds = {
        "ids": np.array([[1, 2, 3], [9, 0, 4]], np.int32),
        "segments": np.array([[0, 0, 1], [1, 1, 0]], np.int32),
        "positions": np.array([[2, 1, 0], [5, 3, 4]], np.int32),
    }
    inputs = "int32[2, 3] ids, int32[2, 3] segments, int32[2, 3] positions"
    model = raised(spelled(f"g ({inputs}) => ({Y}) {{ {body} }}", weights), feeds)
    assert counts(model)["LayerNormalization"] == 1
    assert counts(model)["Gather"] == (3 if segments else 2)


MASKS = {
    "none": ("", {}),
    "lengths": ("int32[2] mask", {"mask": np.array([3, 2], np.int32)}),
    "raw": ("int32[2, 3] mask", {"mask": np.array([[1, 1, 1], [1, 1, 0]], np.int32)}),
    "rank 3": ("int32[2, 3, 3] mask", {"mask": np.tril(np.ones((2, 3, 3), np.int32))}),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [0, 1])
def test_attention_hides_a_linear(mask: str, causal: int) -> None:
    text, feeds = MASKS[mask]
    body = f"""y = com.microsoft.Attention<num_heads = 2,
        unidirectional = {causal}>(x, qkv__weight, qkv__bias{", mask" if text else ""})"""
    inputs = f"{X}, {text}" if text else X
    model = raised(
        spelled(f"g ({inputs}) => ({Y}) {{ {body} }}", {"qkv.weight": (8, 24), "qkv.bias": (24,)}),
        {**FEEDS, **feeds},
        tolerance=1e-5,
    )
    (linear,) = linears(model)
    assert (linear.name, linear.out_features, linear.bias is not None) == ("qkv", 24, True)
    kind = "qcompiler::MaskedAttention" if text or causal else "qcompiler::Attention"
    assert counts(model)[kind] == 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", ["none", "raw", "added"])
def test_multi_head_attention(bias: bool, mask: str) -> None:
    extra = {"none": "", "raw": ", mask", "added": ", , added"}[mask]
    body = f"y = com.microsoft.MultiHeadAttention<num_heads = 2>(x, k, v, {'b' if bias else ''}{extra})"
    inputs = f"{X}, float[2, 5, 8] k, float[2, 5, 8] v, int32[2, 5] mask, float[2, 2, 3, 5] added"
    feeds = {
        **FEEDS,
        "k": normal(2, 5, 8, seed=2),
        "v": normal(2, 5, 8, seed=3),
        "mask": np.array([[1] * 5, [1, 1, 1, 0, 0]], np.int32),
        "added": normal(2, 2, 3, 5, seed=4),
    }
    model = raised(spelled(f"g ({inputs}) => ({Y}) {{ {body} }}", {"b": (24,)}), feeds, tolerance=1e-5)
    assert counts(model)["qcompiler::Attention" if mask == "none" else "qcompiler::MaskedAttention"] == 1
    parts = [v for name, v in model.graph.initializers.items() if name.startswith("b.")]
    assert [v.metadata_props[MAP] for v in parts] == (["slice:0:0:8", "slice:0:8:16", "slice:0:16:24"] if bias else [])


def test_what_no_rule_expands_stays_and_is_noted() -> None:
    body = "y = com.microsoft.Attention<num_heads = 2, do_rotary = 1>(x, w, b)"
    model = spelled(f"g ({X}) => ({Y}) {{ {body} }}", {"w": (8, 24), "b": (24,)})
    notes = canonicalise(model)
    assert [note.what for note in notes] == ["com.microsoft::Attention left as it is"]
    assert model.graph.opset_imports["com.microsoft"] == 1
