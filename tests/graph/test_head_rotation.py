"""Heads rotated between v and o: found by flow, whatever the layout; gates and activations are no heads."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.canonical import check
from qcompiler.graph.flow import analyse
from qcompiler.graph.head_rotation import HeadSite, head_site, rotate_columns, rotate_heads
from qcompiler.graph.linear import linear_named
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.transaction import FoldError
from qcompiler.graph.verify import relative_error
from qcompiler.numerics.hadamard import make_rotation
from tests import families
from tests.graph.tiny import outputs


def family(name: str) -> ir.Model:
    model = ir.load(families.exported(name))
    canonicalise(model)
    return model


def heads_of(model: ir.Model) -> list[HeadSite]:
    return [found for site in analyse(model) if (found := head_site(model, site)) is not None]


HEADS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "cohere", "mixtral"), ("self_attn.v_proj", 2)),
    **dict.fromkeys(("opt", "whisper_encoder"), ("self_attn.v_proj", 4)),
    "phi3": ("self_attn.qkv_proj", 2),
    "bert": ("attention.self.value", 4),
    "distilbert": ("attention.v_lin", 4),
    "gpt2": ("attn.c_attn", 4),
    "falcon": ("self_attention.query_key_value", 1),  # multi-query: one head for all
    "gpt_neox": ("attention.query_key_value", 4),
    "bloom": ("self_attention.query_key_value", 4),
    "vit": ("attention.v_proj", 4),
    "t5_encoder": ("SelfAttention.v", 4),
}


@pytest.mark.parametrize("name", HEADS)
def test_families_rotate_one_site_a_layer_and_keep_their_outputs(name: str) -> None:
    model = family(name)
    feeds = families.feeds(name, 2, 7, 0)
    before = outputs(model, feeds)
    sites = heads_of(model)
    assert len(sites) == 2
    for seed, heads in enumerate(sites):
        assert (heads.site.source.name or "").endswith(HEADS[name][0])
        assert heads.blocks.shape == (HEADS[name][1], 16)
        source = heads.site.source
        weight = source.inputs[1].const_value.numpy().copy()  # type: ignore[union-attr]
        plan = rotate_heads(model, heads, make_rotation(16, seed))
        assert plan.proof < 1e-6
        assert plan.sinks[0] == source.name
        changed = (source.inputs[1].const_value.numpy() != weight).any(0)  # type: ignore[union-attr]
        assert set(np.flatnonzero(changed)) == set(heads.blocks.ravel())
    check(model)
    assert relative_error(before, outputs(model, feeds)) < 5e-6


def test_a_gate_between_two_linears_is_no_head() -> None:
    """Up and down scale together through the gate, channel by channel; no matrix commutes with it."""
    sources = {heads.site.source.name for heads in heads_of(family("llama"))}
    foldable = {site.source.name for site in analyse(family("llama")) if site.kind == "linear" and site.foldable}
    assert any("up_proj" in (name or "") for name in foldable)
    assert not any("up_proj" in (name or "") for name in sources)


def test_a_relu_between_two_linears_is_no_head() -> None:
    assert not any("fc1" in (heads.site.source.name or "") for heads in heads_of(family("opt")))


def test_what_cannot_be_proved_is_undone() -> None:
    model = family("llama")
    heads = heads_of(model)[0]
    name = heads.site.sinks[0].linear
    weight = linear_named(model, name).weight.const_value.numpy().copy()  # type: ignore[union-attr]
    rotation = make_rotation(16)
    skewed = dataclasses.replace(rotation, factors=(rotation.factors[0] * 1.01,))
    with pytest.raises(FoldError, match="changes the outputs"):
        rotate_heads(model, heads, skewed)
    assert np.array_equal(linear_named(model, name).weight.const_value.numpy(), weight)  # type: ignore[union-attr]


def test_columns_outside_the_blocks_stay() -> None:
    x = np.random.default_rng(0).standard_normal((3, 12))
    rotation = make_rotation(4, 7)
    y = rotate_columns(x, np.array([[8, 9, 10, 11], [1, 3, 5, 7]]), rotation)
    assert np.array_equal(y[:, [0, 2, 4, 6]], x[:, [0, 2, 4, 6]])
    assert np.allclose(y[:, [1, 3, 5, 7]], x[:, [1, 3, 5, 7]] @ rotation.matrix())
    assert np.allclose(y[:, 8:], x[:, 8:] @ rotation.matrix())
