"""Weights that are stored in 16 bits and widened where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linears
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.stored import Stored
from tests.graph.rules.spelling import counts, normal, raised, spelled

KINDS = [np.float16, ml_dtypes.bfloat16]


def stored(body: str, kind: Any, **shapes: tuple[int, ...]) -> ir.Model:
    model = spelled(body, shapes)
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(array_of(value).astype(kind), name=value.name)
        value.dtype = value.const_value.dtype
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gemm", [True, False])
def test_a_linear_of_16_bits_is_a_linear_with_its_name(kind: Any, gemm: bool) -> None:
    call = "y = Gemm<transB = 1>(x, w, b)" if gemm else "t = Transpose<perm = [1, 0]>(w) m = MatMul(x, t) y = Add(m, b)"
    body = f"g (float[B, 8] x) => (float[B, 4] y) {{ w = Cast<to = 1>(fc__weight) b = Cast<to = 1>(fc__bias) {call} }}"
    model = stored(body, kind, fc__weight=(4, 8), fc__bias=(4,))
    weight = array_of(model.graph.initializers["fc.weight"]).astype(np.float32)
    after = raised(model, {"x": normal(3, 8)})
    (linear,) = linears(after)
    assert linear.name == "fc"
    assert set(after.graph.initializers) == {"fc.weight", "fc.bias"}
    np.testing.assert_array_equal(array_of(linear.weight), weight.T)
    assert counts(after) == {"MatMul": 1, "Add": 1}


def test_a_tied_table_is_widened_for_the_head_and_stays_as_it_is_where_it_is_only_gathered_from() -> None:
    for head in (True, False):
        second = "m" if head else "other"
        body = f"""g (int64[B, S] i) => (float[B, S, 8] y) {{ e = Cast<to = 1>(table) x = Gather(e, i)
            m = Transpose<perm = [1, 0]>(e) other = Transpose<perm = [1, 0]>(w) y = MatMul(x, {second}) }}"""
        model = stored(body, np.float16, table=(8, 8), w=(8, 8))
        model.graph.initializers["w"].const_value = ir.tensor(normal(8, 8), name="w")
        model.graph.initializers["w"].dtype = ir.DataType.FLOAT
        if not head:
            model.graph.remove([node for node in model.graph if node.outputs[0].name == "m"], safe=True)
        after = raised(model, {"i": np.array([[0, 3, 7]])})
        table = next(node.inputs[0] for node in after.graph if node.op_type in ("Cast", "Gather"))
        assert table.dtype == (ir.DataType.FLOAT if head else ir.DataType.FLOAT16)


def test_narrowing_integers_and_computed_values_stay() -> None:
    body = """g (float[B, 8] x) => (float[B, 8] y, float16[8, 8] n) { n = Cast<to = 10>(w)
        h = Cast<to = 10>(x) f = Cast<to = 1>(h) y = MatMul(f, w) }"""
    after = raised(spelled(body, {"w": (8, 8)}), {"x": normal(3, 8)})
    assert counts(after) == {"Cast": 3, "MatMul": 1}


def test_what_is_on_disk_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    body = "g (float[B, 8] x) => (float[B, 8] y) { t = Cast<to = 1>(w) y = MatMul(x, t) }"
    model = stored(body, ml_dtypes.bfloat16, w=(8, 8))
    weight = array_of(model.graph.initializers["w"]).astype(np.float32)
    ir.save(model, tmp_path / "model.onnx", external_data="data", size_threshold_bytes=0)
    opened = ir.load(tmp_path / "model.onnx")
    canonicalise(opened)
    (linear,) = linears(opened)
    assert isinstance(linear.weight.const_value, Stored)
    np.testing.assert_array_equal(array_of(linear.weight), weight)
