"""Weights stored in 16 bits: float again when the model is loaded, and kept in float where they do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcompiler
from qcompiler.core import OptionError
from qcompiler.graph.canonical import check
from qcompiler.graph.linear import linears
from qcompiler.graph.run import Runner
from qcompiler.graph.weights import rounded_weight
from qcompiler.numerics.grids import weight_grid
from qcompiler.passes.base import Context
from qcompiler.passes.fold import Fold
from qcompiler.presets import resolve
from qcompiler.scheme import TensorSpec
from qcompiler.targets.ort import OrtCpu
from qcompiler.targets.ort.optimised import optimised_graph
from qcompiler.targets.portable import Portable
from tests.graph.tiny import tiny
from tests.targets.ort.test_nbits import ROWS, layer, quantized

STORED = {"w16": "INT16", "fp16": "FLOAT16", "bf16": "BFLOAT16"}


@pytest.mark.parametrize("scheme", STORED)
@pytest.mark.parametrize("target", [OrtCpu(), Portable()])
@pytest.mark.parametrize("tied", [False, True])
def test_every_stage_computes_the_rounded_weight(scheme: str, target: OrtCpu | Portable, tied: bool) -> None:
    feeds = {"x": np.random.default_rng(7).standard_normal((ROWS, 33), np.float32)}
    model = quantized(layer(33, 5, tied=tied), resolve(scheme), target)
    expected = feeds["x"] @ rounded_weight(linears(model)[1])
    outputs = [Runner(model)(feeds)]
    Fold().run(model, {}, Context(resolve(scheme), target.capability()))
    check(model)
    assert {str(linear.weight.dtype) for linear in linears(model)} == {STORED[scheme]}
    outputs.append(Runner(model)(feeds))
    notes = target.lower(model).notes
    assert {note.node for note in notes} >= {"a0", "b"}
    outputs.append(Runner(model, as_deployed=True)(feeds))
    for got in outputs:
        np.testing.assert_allclose(got["b"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", STORED)
def test_it_is_16_bits_in_the_file_and_float_at_load(scheme: str, tmp_path: Path) -> None:
    compiled = qcompiler.compile(ir.to_proto(layer(64, 40)), scheme=scheme, output=tmp_path / "out", progress=False)
    model = onnx.load(tmp_path / "out" / "model.onnx")
    weights = [t for t in model.graph.initializer if len(t.dims) == 2]
    assert [8 * len(t.raw_data) // (64 * 40) for t in weights] == [16, 16]
    assert sorted(node.op_type for node in optimised_graph(compiled.model).node) == ["Gemm", "MatMul"]
    assert all(row.quantized for row in compiled.report.rows)


@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
def test_a_file_with_weights_of_16_bits_is_a_source_again(scheme: str, tmp_path: Path) -> None:
    """Its Linears are found under their names, and quantized as the rounded weights would be."""
    first = qcompiler.compile(ir.to_proto(layer(64, 40)), scheme=scheme, output=tmp_path / "out", progress=False)
    again = qcompiler.compile(tmp_path / "out" / "model.onnx", scheme="w8a16", progress=False)
    assert [row.name for row in again.report.rows] == [row.name for row in first.report.rows]
    assert all(row.quantized for row in again.report.rows)
    feeds = {"x": np.random.default_rng(3).standard_normal((ROWS, 64), np.float32)}
    want, got = first.run(feeds)["b"], again.run(feeds)["b"]
    assert 0 < np.abs(got - want).max() < 0.02 * np.abs(want).max()


@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 2**16), st.sampled_from([1e-30, 1.0, 1e30]))
def test_int16_is_within_half_a_step(rows: int, columns: int, seed: int, size: float) -> None:
    weight = (np.random.default_rng(seed).standard_normal((rows, columns)) * size).astype(np.float32)
    grid = weight_grid(weight, TensorSpec("int16", granularity="per_channel"))
    assert (grid.low, grid.high) == (-32767, 32767)
    assert (np.abs(grid.rounded(weight).astype(np.float64) - weight) <= 0.51 * grid.scale).all()


@pytest.mark.parametrize(("scheme", "largest", "fits"), [("fp16", 70000, False), ("bf16", 70000, True)])
def test_a_weight_beyond_the_range_stays_in_float(scheme: str, largest: float, fits: bool) -> None:
    weights = {"w1": np.ones((16, 4), np.float32), "w2": np.ones((16, 4), np.float32)}
    weights["w1"][3, 2] = largest
    text = "g (float[B,16] x) => (float[B,4] y, float[B,4] z) { y = MatMul(x, w1)  z = MatMul(x, w2) }"
    compiled = qcompiler.compile(ir.to_proto(tiny(text, weights)), scheme=scheme, progress=False)
    first, second = compiled.report.rows
    assert second.quantized
    assert first.quantized == fits
    if not fits:
        assert first.reason == "its largest weight, 70000, is beyond float16's 65504"
    x = np.eye(16, dtype=np.float32)
    np.testing.assert_allclose(compiled.run({"x": x})["y"], weights["w1"], rtol=0.01)


def test_impossible_spellings_are_refused() -> None:
    with pytest.raises(OptionError, match="has no groups"):
        resolve("fp16{group_size=32}")
    with pytest.raises(OptionError, match="has no scales"):
        TensorSpec("float16", granularity="per_channel")
    with pytest.raises(OptionError, match="no grid of integers"):
        weight_grid(np.ones((4, 4), np.float32), TensorSpec("float16"))
