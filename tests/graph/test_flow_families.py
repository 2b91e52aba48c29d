"""The flow analysis on whole models: which module may absorb a scale for which, and folds that leave the outputs."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qcompiler.graph.flow import analyse
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.sources import as_source
from qcompiler.graph.verify import relative_error
from tests import families
from tests.graph.tiny import fold_everything, outputs

GATED = {
    "self_attn.v_proj": "self_attn.o_proj",
    "post_attention_layernorm": "mlp.gate_proj mlp.up_proj",
    "mlp.up_proj": "mlp.down_proj",
}
QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
LLAMA = {"input_layernorm": QKV, **GATED}
LLAMA_TAIL = {"model.norm": "lm_head"}

# family -> (prefix of layer 0 and 1, source -> sinks in each layer, source -> sinks elsewhere)
EXPECTED: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "llama": ("model.layers.{}.", LLAMA, LLAMA_TAIL),
    "mistral": ("model.layers.{}.", LLAMA, LLAMA_TAIL),
    "qwen2": ("model.layers.{}.", LLAMA, LLAMA_TAIL),
    "qwen3": ("model.layers.{}.", LLAMA, LLAMA_TAIL),  # q_norm and k_norm absorb nothing: rope follows
    "gemma2": (
        "model.layers.{}.",
        {
            "input_layernorm": QKV,
            "self_attn.v_proj": "self_attn.o_proj",
            "pre_feedforward_layernorm": "mlp.gate_proj mlp.up_proj",
            "mlp.up_proj": "mlp.down_proj",
        },
        LLAMA_TAIL,
    ),
    "phi3": (
        "model.layers.{}.",
        {
            "input_layernorm": "self_attn.qkv_proj",
            "self_attn.qkv_proj": "self_attn.o_proj",
            "post_attention_layernorm": "mlp.gate_up_proj",
            "mlp.gate_up_proj": "mlp.down_proj",
        },
        LLAMA_TAIL,
    ),
    "cohere": (
        "model.layers.{}.",
        {
            "input_layernorm": f"{QKV} mlp.gate_proj mlp.up_proj",
            "self_attn.v_proj": "self_attn.o_proj",
            "mlp.up_proj": "mlp.down_proj",
        },
        LLAMA_TAIL,
    ),
    "mixtral": (
        "model.layers.{}.",
        {
            "input_layernorm": QKV,
            "self_attn.v_proj": "self_attn.o_proj",
            "post_attention_layernorm": "mlp.gate " + " ".join(f"mlp.experts.{e}.gate_up_proj" for e in range(4)),
        },
        LLAMA_TAIL,
    ),
    "opt": (
        "model.decoder.layers.{}.",
        {
            "self_attn_layer_norm": QKV,
            "self_attn.v_proj": "self_attn.out_proj",
            "final_layer_norm": "fc1",
            "fc1": "fc2",  # ReLU between
        },
        {"model.decoder.final_layer_norm": "lm_head"},
    ),
    "bert": ("encoder.layer.{}.", {"attention.self.value": "attention.output.dense"}, {}),
    "distilbert": ("transformer.layer.{}.", {"attention.v_lin": "attention.out_lin"}, {}),
    "gpt2": (
        "transformer.h.{}.",
        {"ln_1": "attn.c_attn", "attn.c_attn": "attn.c_proj", "ln_2": "mlp.c_fc"},
        {"transformer.ln_f": "lm_head"},
    ),
    "falcon": (
        "transformer.h.{}.",
        {
            "input_layernorm": "self_attention.query_key_value mlp.dense_h_to_4h",
            "self_attention.query_key_value": "self_attention.dense",
        },
        {"transformer.ln_f": "lm_head"},
    ),
    "gpt_neox": (
        "gpt_neox.layers.{}.",
        {
            "input_layernorm": "attention.query_key_value",
            "attention.query_key_value": "attention.dense",
            "post_attention_layernorm": "mlp.dense_h_to_4h",
        },
        {"gpt_neox.final_layer_norm": "lm_head"},
    ),
    "bloom": (
        "transformer.h.{}.",
        {
            "input_layernorm": "self_attention.query_key_value",
            "self_attention.query_key_value": "self_attention.dense",
            "post_attention_layernorm": "mlp.dense_h_to_4h",
        },
        {"transformer.ln_f": "lm_head"},
    ),
    "vit": (
        "layers.{}.",
        {
            "layernorm_before": "attention.q_proj attention.k_proj attention.v_proj",
            "attention.v_proj": "attention.o_proj",
            "layernorm_after": "mlp.fc1",
        },
        {},
    ),
    "whisper_encoder": (
        "layers.{}.",
        {"self_attn_layer_norm": QKV, "self_attn.v_proj": "self_attn.out_proj", "final_layer_norm": "fc1"},
        {},
    ),
    "t5_encoder": (
        "encoder.block.{}.",
        {
            "layer.0.layer_norm": "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v",
            "layer.0.SelfAttention.v": "layer.0.SelfAttention.o",
            "layer.1.layer_norm": "layer.1.DenseReluDense.wi",
            "layer.1.DenseReluDense.wi": "layer.1.DenseReluDense.wo",
        },
        {},
    ),
}

FREE_SHARE = {"gpt2": 1 / 3, "bloom": 1 / 3, "gpt_neox": 1 / 3, "phi3": 1 / 4, "falcon": 1 / 6}
"""Of a fused qkv Linear's channels, those of V: a third; a quarter with 4 query and 2 kv heads; a sixth with 1."""


def canonical(family: str) -> ir.Model:
    model = ir.load(families.exported(family))
    canonicalise(model)
    return model


def absorbed(model: ir.Model) -> dict[str, set[str]]:
    """source module -> sink modules, without the leading ``model.`` of the test wrapper."""
    found = {}
    for site in analyse(model):
        sinks = {s.linear for s in site.sinks if (~site.scale_blocked[s.columns[s.columns >= 0]]).any()}
        source = as_source(site.source)
        assert source is not None
        node, index = source.weight
        name = node.inputs[index].name
        if sinks:
            found[name.removesuffix(".weight").removeprefix("model.")] = {s.removeprefix("model.") for s in sinks}
    return found


@pytest.mark.parametrize("family", EXPECTED)
def test_pairs(family: str) -> None:
    prefix, layer, elsewhere = EXPECTED[family]
    expected = {source: set(sinks.split()) for source, sinks in elsewhere.items()}
    for i in range(2):
        at = prefix.format(i)
        expected |= {at + source: {at + sink for sink in sinks.split()} for source, sinks in layer.items()}
    assert absorbed(canonical(family)) == expected


@pytest.mark.parametrize("shift", [False, True], ids=["scale", "scale and shift"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_random_folds_everywhere_keep_the_outputs(family: str, shift: bool) -> None:
    model = canonical(family)
    feeds = families.feeds(family, batch=3, seq=7, seed=5)
    before = outputs(model, feeds)
    assert fold_everything(model, shift=shift) == len(absorbed(canonical(family)))
    assert relative_error(before, outputs(model, feeds)) <= 1e-5


@pytest.mark.parametrize("family", FREE_SHARE)
def test_only_v_of_a_fused_qkv_is_free(family: str) -> None:
    fused = [site for site in analyse(canonical(family)) if site.source.name.split(".")[-1] in FUSED]
    assert [float((~site.scale_blocked).mean()) for site in fused] == pytest.approx([FREE_SHARE[family]] * 2)


FUSED = {"c_attn", "query_key_value", "qkv_proj"}


def test_post_norm_is_listed_with_its_reason() -> None:
    """BERT's norms are read by the residual: not foldable, but their sinks are known, so that a Mul may be inserted."""
    blocked = [site for site in analyse(canonical("bert")) if not site.foldable]
    assert [len(site.sinks) for site in blocked] == [3, 1, 3, 1]
    assert all("does not carry the same scale" in site.blockers[0].why for site in blocked)
