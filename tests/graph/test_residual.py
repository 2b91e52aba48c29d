"""Residual streams: what writes and reads them, and why some cannot be rotated."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.residual import Stream, find_streams
from qcompiler.graph.rules import canonicalise
from tests import families
from tests.graph.streams import LAYER, RMS, block


def only(model: ir.Model) -> Stream:
    [stream] = find_streams(model)
    return stream


@pytest.mark.parametrize("norm", [RMS, LAYER])
def test_writers_and_readers_of_a_block(norm: str) -> None:
    stream = only(block(norm))
    assert (stream.name, stream.channels, stream.refused) == ("tokens", 12, "")
    assert {(w.kind, w.value.name) for w in stream.writers} == {
        ("table", "tokens"),
        ("constant", "x"),
        ("linear", "down"),
    }
    assert [[linear.name for linear in reader.linears] for reader in stream.norms] == [["up_w"], ["head_w"]]
    assert stream.centred == (norm == LAYER)
    assert stream.bridge_cost == 0
    assert {linear.name for linear in stream.linears} == {"up_w", "down_w", "head_w"}


def test_factors_by_position_and_moves_of_positions_keep_the_basis() -> None:
    extra = """
        scaled = Mul(y, half)
        first = Gather <axis = 1> (scaled, place)
        n3 = qcompiler.RMSNorm <epsilon = 1e-5>(first, g1)
        n3_last = Unsqueeze(n3, axis)
        second = MatMul(n3_last, head_w)
    """
    stream = only(
        block(
            extra=extra,
            outputs="float[b, s, 7] head, float[b, s, 7] second",
            weights={"half": np.array(0.5), "place": np.array(2, np.int64), "axis": np.array([1], np.int64)},
        )
    )
    assert not stream.refused
    assert not stream.bridges
    assert len(stream.norms) == 3
    assert sum(len(reader.linears) for reader in stream.norms) == 3


@pytest.mark.parametrize(
    ("norm", "extra", "outputs", "why"),
    [
        (RMS, "", "float[b, s, 7] head, float[b, s, 12] y", "'y' is an output of the model"),
        (RMS, "t = Tanh(y)", "float[b, s, 7] head, float[b, s, 12] t", "Tanh 't' reads it, which is no norm"),
        (RMS, "t = MatMul(y, side_w)", "float[b, s, 7] head, float[b, s, 3] t", "reads it, which is no norm"),
        (RMS, f"t = {LAYER}(y, g1)", "float[b, s, 7] head, float[b, s, 12] t", "take the mean away and others do not"),
    ],
)
def test_refused_with_a_reason(norm: str, extra: str, outputs: str, why: str) -> None:
    stream = only(block(norm, extra=extra, outputs=outputs, weights={"side_w": (12, 3)}))
    assert why in stream.refused


def test_ends_that_are_no_linears_have_a_price() -> None:
    stream = only(block(extra="t = Tanh(n2)", outputs="float[b, s, 7] head, float[b, s, 12] t"))
    assert [value.name for value in stream.bridges] == ["n2"]
    assert stream.bridge_cost == pytest.approx(12 * 12 / (12 * 16 + 16 * 12 + 12 * 7))
    assert [linear.name for linear in stream.norms[1].linears] == ["head_w"]


def test_a_linear_that_reads_and_writes_the_stream_is_refused() -> None:
    extra = """
        n3 = qcompiler.RMSNorm <epsilon = 1e-5>(y, g1)
        mixed = MatMul(n3, square)
        z = Add(y, mixed)
        n4 = qcompiler.RMSNorm <epsilon = 1e-5>(z, g1)
        second = MatMul(n4, head_w)
    """
    model = block(extra=extra, outputs="float[b, s, 7] head, float[b, s, 7] second", weights={"square": (12, 12)})
    assert "both reads and writes it" in only(model).refused


def test_sums_of_attention_scores_are_no_stream() -> None:
    """Only what norms read is looked at, and only where Linears read those norms."""
    model = ir.load(families.exported("qwen3"))
    canonicalise(model)
    assert [stream.name for stream in find_streams(model)] == ["embedding"]  # not q_norm's and k_norm's inputs


ROTATABLE = (
    *("llama", "mistral", "opt", "gpt2", "qwen2", "qwen3", "phi3"),
    *("cohere", "falcon", "gpt_neox", "bloom", "vit", "t5_encoder", "mixtral"),
)


@pytest.mark.parametrize("family", ROTATABLE)
def test_families_with_one_free_stream(family: str) -> None:
    model = ir.load(families.exported(family))
    canonicalise(model)
    stream = only(model)
    assert not stream.refused
    assert stream.bridge_cost < 0.1
    products = 2 + 2 * (4 if family == "mixtral" else 1)  # two layers, attention and MLP or four experts
    assert sum(writer.kind == "linear" for writer in stream.writers) == products


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_post_norm_layers_are_refused(family: str) -> None:
    """There the norm's output is the residual: each stream is one sum long, and Linears read it bare."""
    model = ir.load(families.exported(family))
    canonicalise(model)
    streams = find_streams(model)
    assert streams
    assert all(stream.refused or stream.bridge_cost > 0.3 for stream in streams)


def test_norms_before_the_sum_need_bridges() -> None:
    model = ir.load(families.exported("gemma2"))
    canonicalise(model)
    stream = only(model)
    assert len(stream.bridges) == 4
    assert stream.bridge_cost > 0.1
