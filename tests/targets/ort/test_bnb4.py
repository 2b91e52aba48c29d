"""NF4 and FP4 from fake-quant to MatMulBnb4, and to standard operators: each computes what the table says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.core import OptionError, TargetError
from qcompiler.graph.canonical import check
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linears
from qcompiler.graph.run import Runner
from qcompiler.graph.weights import codebook_of, rounded_weight
from qcompiler.passes.base import Context
from qcompiler.passes.fold import Fold
from qcompiler.presets import resolve
from qcompiler.scheme import TensorSpec
from qcompiler.targets.ort import OrtCpu
from qcompiler.targets.ort.optimised import optimised_graph
from qcompiler.targets.portable import Portable
from tests.targets.ort.test_nbits import ROWS, layer, quantized

SPELLINGS = ["nf4", "fp4", "nf4{double_quant=false}", "fp4{group_size=16}"]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("shape", [(64, 6), (33, 3), (172, 5)])  # the last two: blocks over channels, odd counts
@pytest.mark.parametrize("target", [OrtCpu(), Portable()])
def test_every_stage_computes_the_rounded_weight(
    spelling: str, shape: tuple[int, int], target: OrtCpu | Portable
) -> None:
    scheme = resolve(spelling)
    feeds = {"x": np.random.default_rng(7).standard_normal((ROWS, shape[0]), np.float32)}
    model = quantized(layer(*shape), scheme, target)
    expected = {linear.name: feeds["x"] @ rounded_weight(linear) for linear in linears(model)}
    outputs = [Runner(model)(feeds)]
    Fold().run(model, {}, Context(scheme, target.capability()))
    check(model)
    assert {str(linear.weight.dtype) for linear in linears(model)} == {"UINT4"}
    outputs.append(Runner(model)(feeds))
    bias = array_of(linears(model)[0].bias)
    assert set(target.lower(model).nodes) == {"a0", "b"}
    operators = [node.op_type for node in model.graph if node.op_type.startswith("MatMul")]
    assert operators == ["MatMulBnb4" if target.name == "ort-cpu" else "MatMul"] * 2
    outputs.append(Runner(model, as_deployed=True)(feeds))
    for got in outputs:
        np.testing.assert_allclose(got["b"], expected["b"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got["a"], expected["a0"] + bias, rtol=1e-5, atol=1e-5)


def test_scales_are_8_bits_in_the_file_and_expanded_once_at_load() -> None:
    model = quantized(layer(256, 640), resolve("nf4"), OrtCpu())
    Fold().run(model, {}, Context(resolve("nf4"), OrtCpu().capability()))
    scales = codebook_of(linears(model)[0].weight_quant).scale
    OrtCpu().lower(model)
    stored = {str(value.dtype): value.const_value.size for value in model.graph.initializers.values()}
    assert stored["UINT8"] == 256 * 640 // 2
    assert stored["INT8"] == scales.size == 256 * 640 // 64
    optimised = optimised_graph(model)
    # What double quantization costs, ONNX Runtime pays when it loads the model: none of it is left to run.
    assert sorted(node.op_type for node in optimised.node) == ["Add", "MatMulBnb4", "MatMulBnb4"]


def test_tied_linears_share_one_packed_weight() -> None:
    model = quantized(layer(64, 9, tied=True), resolve("nf4"), OrtCpu())
    Fold().run(model, {}, Context(resolve("nf4"), OrtCpu().capability()))
    OrtCpu().lower(model)
    first, second = (node for node in model.graph if node.op_type == "MatMulBnb4")
    assert first.inputs[1] is second.inputs[1]


def test_compiled_and_saved_it_is_a_twelfth_of_a_bit_above_four(tmp_path: Path) -> None:
    qcompiler.compile(ir.to_proto(layer(256, 640)), scheme="nf4", output=tmp_path / "out", progress=False)
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(tmp_path / "out" / "model.onnx")
    weights = [array for array in map(onnx.numpy_helper.to_array, model.graph.initializer) if array.size != 640]
    assert 8 * sum(array.nbytes for array in weights) / (2 * 256 * 640) < 4.13  # 4 + 8 / 64 + 32 / (64 · 256)


def test_gptq_tells_that_it_leaves_them() -> None:
    compiled = qcompiler.compile(
        ir.to_proto(layer(64, 6)),
        scheme="nf4",
        passes="annotate,insert,gptq,fold",
        calibration=[{"x": np.ones((ROWS, 64), np.float32)}],
        progress=False,
    )
    told = {note.node: note.why for note in compiled.report.notes if note.what == "rounded to nearest"}
    assert told == dict.fromkeys(("a.w", "b.w"), "GPTQ solves for integers, and this weight becomes none")


@pytest.mark.parametrize("size", [8, 48, 512])
def test_blocks_that_the_kernel_has_not_are_refused(size: int) -> None:
    with pytest.raises(TargetError, match="none of its kernels"):
        qcompiler.compile(ir.to_proto(layer(64, 6)), scheme=f"nf4{{group_size={size}}}", progress=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nf4{symmetric=false}", "symmetric and in blocks"),
        ("nf4{group_size=none}", "in blocks"),
        ("w4a16{double_quant=true}", "not of int4"),
    ],
)
def test_impossible_spellings_are_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve(text)


def test_activations_are_not_by_table() -> None:
    with pytest.raises(OptionError, match="is for weights"):
        TensorSpec("nf4", granularity="per_token", dynamic=True)
