"""Rotated streams compute what they did, in another basis, and leave everything else alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.canonical import check
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linear_named, linears
from qcompiler.graph.residual import find_streams
from qcompiler.graph.rotation import rotate_stream
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.run import Runner
from qcompiler.graph.transaction import FoldError
from qcompiler.graph.verify import relative_error
from qcompiler.numerics.hadamard import Rotation, make_rotation
from tests import families
from tests.graph.streams import LAYER, RMS, block, ids
from tests.graph.tiny import outputs


def rotate(model: ir.Model, seed: int = 0) -> None:
    [stream] = find_streams(model)
    plan = rotate_stream(model, stream, make_rotation(stream.channels, seed), seed=seed)
    assert plan.proof < 1e-6
    assert plan.kind == "rotate"
    check(model)


@pytest.mark.parametrize("norm", [RMS, LAYER])
def test_outputs_stay_and_the_stream_is_rotated(norm: str) -> None:
    model = block(norm)
    taps = ["y", "n2"]
    before = Runner(model, taps)(ids())
    rotate(model)
    after = Runner(model, taps)(ids())
    assert relative_error({"head": before["head"]}, {"head": after["head"]}) < 2e-6
    stream = before["y"].astype(np.float64)
    if norm == LAYER:
        stream -= stream.mean(-1, keepdims=True)
    assert np.allclose(make_rotation(12, 0)(stream), after["y"], atol=1e-5)
    assert {node.op_type for node in model.graph if "Norm" in node.op_type} == {"RMSNorm"}
    assert {
        value for reader in find_streams(model) for norm in reader.norms for value in array_of(norm.node.inputs[1])
    } == {1}


def test_a_linear_without_bias_gets_the_norms_bias() -> None:
    model = block(LAYER)
    assert linear_named(model, "head_w").bias is None
    rotate(model)
    assert linear_named(model, "head_w").bias is not None
    assert model.graph.outputs[0].name == "head"


def test_other_users_of_shared_constants_keep_their_numbers() -> None:
    """The exporter shares equal initializers; the table is also read as it is."""
    extra = """
        bare = Gather(table, other)
        gated = Mul(bare, g1)
    """
    model = block(
        extra=extra,
        outputs="float[b, s, 7] head, float[b, s, 12] gated",
        weights={"other": np.arange(10).reshape(2, 5)},
    )
    before = outputs(model, ids())
    rotate(model)
    assert relative_error(before, outputs(model, ids())) < 2e-6


def test_bridges_at_both_ends() -> None:
    """An embedding's norm writes the stream, and an output reads its last norm beside a Linear."""
    body_extra = "t = Tanh(n2)"
    model = block(LAYER, extra=body_extra, outputs="float[b, s, 7] head, float[b, s, 12] n2, float[b, s, 12] t")
    before = outputs(model, ids())
    count = len(linears(model))
    rotate(model)
    assert len(linears(model)) == count + 1
    assert relative_error(before, outputs(model, ids())) < 2e-6


def test_refused_streams_are_left_alone() -> None:
    model = block(outputs="float[b, s, 7] head, float[b, s, 12] y")
    before = outputs(model, ids())
    with pytest.raises(FoldError, match="is an output of the model"):
        rotate(model)
    assert relative_error(before, outputs(model, ids())) == 0


@pytest.mark.parametrize("norm", [RMS, LAYER])
def test_what_cannot_be_proved_is_undone(norm: str) -> None:
    """A matrix that is not orthogonal changes the norms: the proof says so, and every write goes back."""
    model = block(norm, extra="t = Tanh(n2)", outputs="float[b, s, 7] head, float[b, s, 12] t")
    text, before = str(ir.to_proto(model)), outputs(model, ids())
    [stream] = find_streams(model)
    rotation = make_rotation(12)
    skewed = dataclasses.replace(rotation, factors=(rotation.factors[0] + 0.01, *rotation.factors[1:]))
    with pytest.raises(FoldError, match="changes the outputs"):
        rotate_stream(model, stream, skewed)
    assert relative_error(before, outputs(model, ids())) == 0
    assert sorted(text.split("\n")) == sorted(str(ir.to_proto(model)).split("\n"))


def test_half_precision_overflow_is_refused() -> None:
    model = block(weights={"up_w": np.full((12, 16), 6e4, np.float32)})
    for value in list(model.graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)  # type: ignore[union-attr]
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    [stream] = find_streams(model)
    kept = {name: value.const_value for name, value in model.graph.initializers.items()}
    with pytest.raises(FoldError, match="overflow float16"):
        rotate_stream(model, stream, make_rotation(12, random_signs=False))
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == kept


def test_any_width_rotates() -> None:
    assert not make_rotation(18).exact
    rotation = Rotation(np.ones(18), make_rotation(18).factors, False)
    assert np.allclose(rotation.matrix() @ rotation.matrix().T, np.eye(18))


FAMILIES = [
    "llama",
    "mistral",
    "opt",
    "gpt2",
    "gemma2",
    "qwen2",
    "qwen3",
    "phi3",
    "cohere",
    "falcon",
    "gpt_neox",
    "bloom",
    "vit",
    "t5_encoder",
    "whisper_encoder",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_keep_their_outputs(family: str) -> None:
    """gemma2 and whisper need more bridges than the pass would pay for; they are as exact."""
    model = ir.load(families.exported(family))
    canonicalise(model)
    feeds = families.feeds(family, 2, 7, 0)
    before = outputs(model, feeds)
    names = [output.name for output in model.graph.outputs]
    rotate(model, seed=5)
    assert relative_error(before, outputs(model, feeds)) < 5e-6
    assert [output.name for output in model.graph.outputs] == names
