"""Tiny two-layer causal language models of four architectures, and how each names its weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from qcompiler.frontends import open_source

if TYPE_CHECKING:
    import torch

HIDDEN, VOCABULARY, LAYERS = 128, 512, 2
HEADS, KEY_VALUE_HEADS, HEAD = 4, 2, 32


@dataclasses.dataclass(frozen=True)
class Family:
    """How one architecture names its weights.

    Attributes:
        config, model: classes of transformers.
        options: of the config, beside those that all share.
        layer: prefix of the names of layer {}.
        norms: the norms of a layer, and the Linears that read each.
        v, o, gate, up, down: Linears of a layer; gate None: an activation function stands between up and down.
        final: the last norm.
        embeddings: what the residual stream starts with: tokens first.
        embedding_norm: a norm right behind them, or None.
        exact: whether what stands between up and down passes a positive scale.
    """

    config: str
    model: str
    options: Mapping[str, Any]
    layer: str
    norms: Mapping[str, Sequence[str]]
    v: str
    o: str
    gate: str | None
    up: str
    down: str
    final: str
    embeddings: Sequence[str]
    embedding_norm: str | None = None
    exact: bool = True

    def layers(self) -> list[str]:
        return [self.layer.format(number) for number in range(LAYERS)]

    def norm_readers(self) -> Iterator[tuple[str, list[str]]]:
        """Every norm in front of Linears, with all that read it."""
        for layer in self.layers():
            for norm, readers in self.norms.items():
                yield layer + norm, [layer + reader for reader in readers]
        yield self.final, ["lm_head"]


_GROUPED = {
    "intermediate_size": 320,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": HEAD,
    "max_position_embeddings": 128,
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Family(
    "LlamaConfig",
    "LlamaForCausalLM",
    _GROUPED,
    "model.layers.{}.",
    {"input_layernorm": _QKV, "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")},
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    final="model.norm",
    embeddings=("model.embed_tokens",),
)
FAMILIES = {
    "llama": _LLAMA,
    "opt": Family(
        "OPTConfig",
        "OPTForCausalLM",
        {"ffn_dim": 4 * HIDDEN, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 128},
        "model.decoder.layers.{}.",
        {"self_attn_layer_norm": _QKV, "final_layer_norm": ("fc1",)},
        v="self_attn.v_proj",
        o="self_attn.out_proj",
        gate=None,
        up="fc1",
        down="fc2",
        final="model.decoder.final_layer_norm",
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    ),
    "bloom": Family(
        "BloomConfig",
        "BloomForCausalLM",
        {},
        "transformer.h.{}.",
        {
            "input_layernorm": ("self_attention.query_key_value",),
            "post_attention_layernorm": ("mlp.dense_h_to_4h",),
        },
        v="self_attention.query_key_value",
        o="self_attention.dense",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        final="transformer.ln_f",
        embeddings=("transformer.word_embeddings",),
        embedding_norm="transformer.word_embeddings_layernorm",
        exact=False,
    ),
    "glm": dataclasses.replace(
        _LLAMA,
        config="GlmConfig",
        model="GlmForCausalLM",
        norms={"input_layernorm": _QKV, "post_attention_layernorm": ("mlp.gate_up_proj",)},
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
    ),
}


def module(family: str) -> torch.nn.Module:
    """Weights of a size that keeps activations near 1; norms in [0.5, 1.5]; no two parameters are equal."""
    import torch
    import transformers

    chosen = FAMILIES[family]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    config = getattr(transformers, chosen.config)(
        **ids, **shared, **chosen.options, tie_word_embeddings=False, use_cache=False
    )
    model = getattr(transformers, chosen.model)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed" in name and parameter.ndim == 2:
                parameter.copy_(noise)
            elif parameter.ndim == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


@functools.cache
def exported(family: str) -> ir.Model:
    """Its ONNX graph, with the parameters' names; not to be changed."""
    return open_source(module(family)).model
