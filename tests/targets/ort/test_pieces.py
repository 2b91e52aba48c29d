"""A graph in pieces: each within the limit, and one after the other they compute what the graph does."""

from __future__ import annotations

import numpy as np
import pytest

import qcompiler
from qcompiler.graph.run import Runner
from qcompiler.targets.ort import readback
from qcompiler.targets.ort.pieces import pieces
from tests.passes.blocks import HELD_OUT, block
from tests.targets.ort.graphs import decoder


def test_pieces_compute_what_the_model_does() -> None:
    model = qcompiler.compile(block(), scheme="w4a8", progress=False).model
    parts = list(pieces(model, 1500))
    assert len(parts) > 2
    assert sum(len(list(part.graph)) for part in parts) == len(list(model.graph))
    for part in parts:
        size = sum(v.const_value.nbytes for v in part.graph.initializers.values() if v.const_value is not None)
        assert size <= 1500 or sum(bool(node.domain) for node in part.graph) == 1  # one node may read more
    for feeds in HELD_OUT:
        values = dict(feeds)
        for part in parts:
            runner = Runner(part, threads=1)
            values.update(runner({name: values[name] for name in runner.inputs}))
        want = Runner(model, threads=1)(feeds)
        assert all(np.array_equal(values[name], want[name]) for name in want)


def test_a_small_model_is_one_piece() -> None:
    model = block()
    assert list(pieces(model, 1 << 20)) == [model]


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8-dynamic"])
def test_coverage_in_pieces_is_that_of_the_whole(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = qcompiler.compile(block(), scheme=scheme, progress=False).report
    monkeypatch.setattr(readback, "PIECE", 1500)
    parts = qcompiler.compile(block(), scheme=scheme, progress=False).report
    assert whole.coverage_body == 1
    assert (parts.coverage_body, parts.coverage_head) == (whole.coverage_body, whole.coverage_head)
    assert [row.kernel for row in parts.rows] == [row.kernel for row in whole.rows]


def test_a_decoder_is_cut_within_its_layers() -> None:
    """Although its rotary tables, made by the lowering, are read by all of them: their types are known."""
    model = qcompiler.compile(decoder(None, layers=4), scheme="w4a16", progress=False).model
    assert sum(node.op_type == "RotaryEmbedding" for node in model.graph) == 8
    assert all(output.type is not None for node in model.graph for output in node.outputs)
    parts = list(pieces(model, 1000))
    assert len(parts) > 4
    assert max(sum(node.op_type == "MatMulNBits" for node in part.graph) for part in parts) < 4
