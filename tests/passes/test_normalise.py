from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.capability import Capability
from qcompiler.graph import canonical
from qcompiler.graph.linear import linears
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.rules.rewriter import MAP, PARAMETER, TIED
from qcompiler.graph.run import Runner
from qcompiler.passes import make_pass
from qcompiler.passes.annotate import Annotate
from qcompiler.passes.base import Context
from qcompiler.passes.normalise import Normalise
from qcompiler.presets import PRESETS
from tests import families
from tests.graph.rules.spelling import counts
from tests.passes.blocks import block, context

# Linears, LayerNormalization, RMSNorm, Gelu, RotaryEmbedding, Attention, MaskedAttention of the two-layer families.
# gemma2's softcap stands between product and softmax, cohere rotates interleaved pairs: both stay as they are.
EXPECTED = {
    "llama": (15, 0, 5, 0, 4, 0, 2),
    "mistral": (15, 0, 5, 0, 4, 0, 2),
    "opt": (13, 5, 0, 0, 0, 0, 2),
    "bert": (12, 5, 0, 2, 0, 0, 2),
    "gpt2": (9, 5, 0, 2, 0, 0, 2),
    "gemma2": (15, 0, 9, 2, 4, 0, 0),
    "qwen2": (15, 0, 5, 0, 4, 0, 2),
    "qwen3": (15, 0, 9, 0, 4, 0, 2),
    "phi3": (9, 0, 5, 0, 4, 0, 2),
    "cohere": (15, 3, 0, 0, 0, 0, 2),
    "falcon": (9, 3, 0, 2, 4, 0, 2),
    "gpt_neox": (9, 5, 0, 2, 4, 0, 2),
    "bloom": (9, 6, 0, 2, 0, 0, 2),
    "vit": (12, 5, 0, 2, 0, 2, 0),
    "distilbert": (12, 5, 0, 2, 0, 0, 2),
    "t5_encoder": (12, 0, 5, 0, 0, 0, 2),
    "whisper_encoder": (12, 5, 0, 4, 0, 2, 0),
    "mixtral": (27, 0, 5, 0, 4, 0, 2),
}


def shape_of(model: ir.Model) -> tuple[int, ...]:
    """The counts of EXPECTED."""
    found: Counter[str] = counts(model)
    ours = ("RMSNorm", "RotaryEmbedding", "Attention", "MaskedAttention")
    rms, rotary, attention, masked = (found[f"qcompiler::{name}"] for name in ours)
    return len(linears(model)), found["LayerNormalization"], rms, found["Gelu"], rotary, attention, masked


@pytest.mark.parametrize("name", families.FAMILIES)
def test_families_become_canonical_and_say_the_same(name: str) -> None:
    before = ir.load(families.exported(name))
    model = before.clone()
    context = Context(PRESETS["w8a8"], Capability("none", ()))
    result = make_pass("normalise", {}).run(model, {}, context)
    assert result.changed
    assert result.notes == ()
    canonical.check(model)
    assert shape_of(model) == EXPECTED[name]
    found = counts(model)
    assert not {"Constant", "Identity", "CastLike", "Dropout", "Gemm", "ReduceMean", "SplitToSequence"} & set(found)
    for feeds in (families.feeds(name), families.feeds(name, batch=1, seq=7, seed=1)):
        old, new = Runner(before, threads=1)(feeds), Runner(model, threads=1)(feeds)
        for key, reference in old.items():
            assert float(np.abs(new[key] - reference).max() / np.abs(reference).max()) <= 2e-6


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "gemma2"])
def test_parameters_keep_their_names_and_maps_lead_back(name: str) -> None:
    before = ir.load(families.exported(name))
    model = before.clone()
    canonicalise(model)
    originals = before.graph.initializers
    seen = 0
    for linear in linears(model):
        parameter = linear.weight.metadata_props[PARAMETER]
        assert linear.name == parameter.removesuffix(".weight")
        assert TIED in linear.weight.metadata_props or linear.weight.name == parameter
        assert (linear.bias is None) or linear.bias.metadata_props[PARAMETER] == f"{linear.name}.bias"
    for value in model.graph.initializers.values():
        parameter = value.metadata_props.get(PARAMETER)
        if parameter in originals and value.const_value is not None:
            array = originals[parameter].const_value.numpy()
            for step in filter(None, value.metadata_props.get(MAP, "").split(",")):
                array = {"transpose": np.transpose, "one_plus": lambda a: 1 + a}[step](array)
            np.testing.assert_array_equal(value.const_value.numpy(), array)
            seen += 1
    assert seen >= len(linears(model))


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_normalising_again_changes_nothing(name: str) -> None:
    model = ir.load(families.exported(name))
    canonicalise(model)
    once = counts(model), [linear.name for linear in linears(model)], shape_of(model)
    canonicalise(model)
    canonical.check(model)
    assert (counts(model), [linear.name for linear in linears(model)], shape_of(model)) == once


def test_features_of_linears_are_known_and_values_keep_rank_3() -> None:
    for name in ("llama", "bert", "gpt2"):
        model = ir.load(families.exported(name))
        canonicalise(model)
        for linear in linears(model):
            assert linear.x.shape is not None
            assert (len(linear.x.shape), linear.x.shape[-1]) == (3, linear.in_features)
            assert linear.output.shape is not None
            assert (len(linear.output.shape), linear.output.shape[-1]) == (3, linear.out_features)


def test_weights_stay_on_disk_unless_they_are_transposed(tmp_path: Path) -> None:
    model = ir.load(families.exported("llama"))
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    canonicalise(model)
    for name, value in model.graph.initializers.items():
        if value.dtype == ir.DataType.FLOAT and PARAMETER in value.metadata_props:
            assert isinstance(value.const_value, ir.ExternalTensor) != (MAP in value.metadata_props), name


def test_what_an_earlier_compile_decided_is_forgotten() -> None:
    model, fresh = block(), block()
    for item in (Normalise(), Annotate()):
        item.run(model, {}, context("w4a8", ignore=("wo",)))
    item = Normalise()
    item.run(model, {}, context())
    item.run(fresh, {}, context())
    assert [dict(node.metadata_props) for node in model.graph] == [dict(node.metadata_props) for node in fresh.graph]
