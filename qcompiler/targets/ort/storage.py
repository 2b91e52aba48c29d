"""Weights of 16 bits: cast, and multiplied by their scales, to float32 once, when ONNX Runtime loads the model."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.core import Note
from qcompiler.graph.edit import insert_node, replace_value
from qcompiler.graph.functions import is_call
from qcompiler.graph.linear import linears


def lower_storage(model: ir.Model) -> list[Note]:
    """Replace what dequantizes int16 weights by Cast and Mul, in place, and say of each stored Linear how it runs.

    ONNX Runtime computes Cast and Mul of constants when it loads a model, but leaves a DequantizeLinear to be run each
    time. A DequantizeFloat call is a Cast already.
    """
    notes = []
    casts: set[ir.Node] = set()
    for linear in linears(model):
        quant = linear.weight_quant
        stored = linear.weight.dtype
        if quant is None or not (is_call(quant, "DequantizeFloat") or stored == ir.DataType.INT16):
            continue
        notes.append(Note(linear.name, "MatMul", f"{stored} in the file, float32 when the model is loaded"))
        if stored == ir.DataType.INT16 and quant not in casts:
            casts.add(quant)
            _cast(model.graph, quant)
    return notes


def _cast(graph: ir.Graph, dequantize: ir.Node) -> None:
    """q · scale; int16 weights are symmetric, one scale an output channel."""
    q, scale = dequantize.inputs[:2]
    name, output = dequantize.name or "", dequantize.outputs[0]
    to = {"to": int(ir.DataType.FLOAT)}
    cast = insert_node(graph, dequantize, "Cast", [q], attributes=to, name=f"{name}.cast", like=output)
    scaled = insert_node(graph, dequantize, "Mul", [cast.outputs[0], scale], name=f"{name}.scaled", like=output)
    replace_value(output, scaled.outputs[0])
