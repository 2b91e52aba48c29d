"""MatMulNBits computes what the fake-quantized graph says: any bits, groups, zero points, odd shapes, tied weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.linear import linears
from qcompiler.graph.run import Runner
from qcompiler.passes.annotate import Annotate
from qcompiler.passes.base import Context
from qcompiler.passes.fold import Fold
from qcompiler.passes.insert import Insert
from qcompiler.presets import resolve
from qcompiler.scheme import Scheme, TensorSpec
from qcompiler.targets.ort import OrtCpu
from qcompiler.targets.ort.nbits import Blocks, block_size
from qcompiler.targets.portable import Portable
from tests.graph.tiny import tiny

ROWS = 6


def layer(in_features: int, out_features: int, tied: bool = False, seed: int = 0) -> ir.Model:
    """Two Linears of one input, the first with a bias; of one weight, or each with its own."""
    rng = np.random.default_rng(seed)
    shape = (in_features, out_features)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name in ("a.w", "b.w")}
    if tied:
        del weights["b.w"]
    text = f"""g (float[{ROWS},{in_features}] x) => (float[{ROWS},{out_features}] a, float[{ROWS},{out_features}] b) {{
        a0 = MatMul(x, "a.w")  a = Add(a0, bias)  b = MatMul(x, "{"a.w" if tied else "b.w"}")
    }}"""
    return tiny(text, {**weights, "bias": rng.standard_normal(out_features).astype(np.float32)})


def quantized(model: ir.Model, scheme: Scheme, target: OrtCpu | Portable) -> ir.Model:
    """Annotated and inserted."""
    ctx = Context(scheme, target.capability())
    for item in (Annotate(), Insert()):
        item.run(model, {}, ctx)
    return model


def compared(model: ir.Model, scheme: Scheme, target: OrtCpu | Portable) -> tuple[ir.Model, float]:
    """The lowered model, and how far its outputs are from the fake-quantized one's, relative to the largest."""
    feeds = {"x": np.random.default_rng(7).standard_normal((ROWS, linears(model)[0].in_features), np.float32)}
    expected = Runner(quantized(model, scheme, target))(feeds)
    Fold().run(model, {}, Context(scheme, target.capability()))
    folded = Runner(model)(feeds)
    assert all(np.allclose(folded[name], expected[name], rtol=1e-5, atol=1e-5) for name in expected)
    lowered = target.lower(model)
    assert set(lowered.nodes) == {"a0", "b"}
    got = Runner(model, as_deployed=True)(feeds)
    return model, max(float(np.abs(got[n] - y).max() / np.abs(y).max()) for n, y in expected.items())


def spelled(bits: int, activation: int, group_size: int | None, symmetric: bool) -> Scheme:
    size = 32 if group_size is None else group_size
    read = None if activation == 16 else TensorSpec("int8", True, "per_group", size, dynamic=True)
    granularity = "per_channel" if group_size is None else "per_group"
    weight = TensorSpec(f"{'' if symmetric else 'u'}int{bits}", symmetric, granularity, group_size)
    return Scheme("test", weight, read)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("activation", [16, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("group_size", "in_features", "out_features"), [(16, 48, 5), (32, 172, 8), (128, 80, 3), (None, 80, 7)]
)
def test_real_runs_agree_with_the_simulation(
    bits: int, activation: int, symmetric: bool, group_size: int | None, in_features: int, out_features: int
) -> None:
    scheme = spelled(bits, activation, group_size, symmetric)
    if (bits, activation, group_size) == (2, 8, 16):
        assert not OrtCpu().capability().runs(scheme.weight, scheme.activation)
        return
    assert OrtCpu().capability().runs(scheme.weight, scheme.activation)
    model, error = compared(layer(in_features, out_features), scheme, OrtCpu())
    assert error < 2e-6
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert len(nodes) == 2
    assert {node.attributes["bits"].as_int() for node in nodes} == {bits}
    assert {node.attributes["accuracy_level"].as_int() for node in nodes} == {0 if activation == 16 else 4}


def test_tied_linears_share_one_packed_weight() -> None:
    model, error = compared(layer(64, 9, tied=True), resolve("w4a16"), OrtCpu())
    assert error < 2e-6
    first, second = (node for node in model.graph if node.op_type == "MatMulNBits")
    assert first.inputs[1] is second.inputs[1]


@pytest.mark.parametrize("spelling", ["w4a16", "w4a16{symmetric=false}", "w2a16", "w8a16", "w4a16{group_size=none}"])
@pytest.mark.parametrize("in_features", [64, 50])
def test_the_portable_form_is_dequantizelinear_in_blocks(spelling: str, in_features: int) -> None:
    scheme = resolve(spelling)
    model = layer(in_features, 6)
    feeds = {"x": np.random.default_rng(7).standard_normal((ROWS, in_features), np.float32)}
    target = Portable()
    expected = Runner(quantized(model, scheme, target))(feeds)
    Fold().run(model, {}, Context(scheme, target.capability()))
    assert set(target.lower(model).nodes) == {"a0", "b"}
    assert {node.domain for node in model.graph} == {""}
    assert not model.functions
    got = Runner(model)(feeds)
    for name, y in expected.items():
        np.testing.assert_allclose(got[name], y, rtol=1e-5, atol=1e-5)
    stored = {value.dtype for value in model.graph.initializers.values() if len(value.shape) == 2} - {ir.DataType.FLOAT}
    bits = scheme.weight.bits
    assert {round(8 * dtype.itemsize) for dtype in stored} == {max(bits, 4)}


def test_groups_that_the_kernel_has_not_are_refused() -> None:
    for size in (48, 8, 512):
        weight = TensorSpec("int4", granularity="per_group", group_size=size)
        assert not OrtCpu().capability().runs(weight, None)
    assert Portable().capability().runs(dataclasses.replace(weight, group_size=48), None)


def test_free_blocks_are_large_but_add_little() -> None:
    def whole(rows: int) -> Blocks:
        return Blocks(np.zeros((rows, 1)), np.ones((1, 1)), np.zeros((1, 1)), rows, 4)

    assert block_size(whole(1024), None) == 256
    assert block_size(whole(576), None) == 64
    assert block_size(whole(172), None) == 16
    assert block_size(whole(172), 128) == 128
    assert block_size(whole(172), 48) is None
