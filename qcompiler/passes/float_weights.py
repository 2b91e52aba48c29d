"""Weights that become no integers on their way through ``insert`` and ``fold``: by table, and in 16-bit floats."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import add_initializer, array_of
from qcompiler.graph.functions import insert_call
from qcompiler.graph.linear import Linear
from qcompiler.graph.weights import codebook_of, stored_float
from qcompiler.numerics.codebooks import block_absmax, codebook, quantize_scales
from qcompiler.scheme import FLOATS, TensorSpec

_STORED: Mapping[str, ir.DataType] = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


def overflow(linear: Linear, spec: TensorSpec) -> str | None:
    """Why the weight cannot be stored in the spec's 16-bit float; None: it can, or the spec is no such float."""
    if spec.dtype not in FLOATS:
        return None
    array = array_of(linear.weight)
    assert array is not None
    largest, limit = float(np.abs(array).max(initial=0.0)), float(ml_dtypes.finfo(_STORED[spec.dtype].numpy()).max)
    return None if largest <= limit else f"its largest weight, {largest:.6g}, is beyond {spec.dtype}'s {limit:.6g}"


def insert_float(model: ir.Model, linear: Linear, spec: TensorSpec) -> ir.Value:
    """Round the weight to a 16-bit float; the new value that the MatMul reads."""
    name, to = f"{linear.weight.name}_fake_quant", int(_STORED[spec.dtype])
    return insert_call(model, linear.matmul, "FakeQuantFloat", [linear.weight], name, to=to)


def insert_codebook(model: ir.Model, linear: Linear, spec: TensorSpec, array: np.ndarray) -> ir.Value:
    """Round the weight to a table in blocks; the new value that the MatMul reads."""
    assert spec.group_size is not None
    graph, name = model.graph, linear.weight.name
    scale = block_absmax(array, spec.group_size)
    values = add_initializer(graph, f"{name}_{spec.dtype}", codebook(spec.dtype))
    if spec.double_quant:
        scales = quantize_scales(scale)
        inputs = [
            add_initializer(graph, f"{name}_scales_quantized", scales.q),
            add_initializer(graph, f"{name}_scales_step", scales.step),
            add_initializer(graph, f"{name}_scales_mean", scales.mean),
        ]
        read = insert_call(model, linear.matmul, "DequantizeScales", inputs, f"{name}_scales", count=scales.count)
        read.type, read.shape = values.type, ir.Shape(scale.shape)
    else:
        read = add_initializer(graph, f"{name}_scales", scale)
    inputs = [linear.weight, values, read]
    size = spec.group_size
    return insert_call(model, linear.matmul, "FakeQuantCodebook", inputs, f"{name}_fake_quant", block_size=size)


def fold_codebook(model: ir.Model, linear: Linear) -> ir.Value:
    """Places in a table, uint4 [in, out], behind DequantizeCodebook."""
    call = linear.weight_quant
    assert call is not None
    places = codebook_of(call).nearest(_weight(linear)).astype(ml_dtypes.uint4)
    q = _store(model.graph, linear, places)
    size = call.attributes["block_size"].as_int()
    inputs = [q, *(value for value in call.inputs[1:] if value is not None)]
    return _dequantized(model, linear, "DequantizeCodebook", inputs, block_size=size)


def fold_float(model: ir.Model, linear: Linear) -> ir.Value:
    """The weight in a 16-bit float behind DequantizeFloat."""
    assert linear.weight_quant is not None
    stored = _store(model.graph, linear, _weight(linear).astype(stored_float(linear.weight_quant)))
    return _dequantized(model, linear, "DequantizeFloat", [stored])


def _weight(linear: Linear) -> np.ndarray:
    array = array_of(linear.weight)
    assert array is not None
    return array


def _store(graph: ir.Graph, linear: Linear, array: np.ndarray) -> ir.Value:
    stored = add_initializer(graph, f"{linear.weight.name or linear.name}_quantized", array)
    stored.metadata_props.update(linear.weight.metadata_props)
    return stored


def _dequantized(model: ir.Model, linear: Linear, function: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
    name = f"{linear.weight.name or linear.name}_dequantized"
    value = insert_call(model, linear.matmul, function, inputs, name, **attributes)
    value.type, value.shape = linear.weight.type, linear.weight.shape
    return value
