"""Embedding tables on their way through ``insert`` and ``fold``: fake-quant by row and group, then integers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompiler.core import Note
from qcompiler.graph.edit import add_initializer, array_of, insert_node
from qcompiler.graph.embedding import Embedding, embeddings
from qcompiler.graph.functions import insert_call
from qcompiler.graph.weights import BITS, grid_of
from qcompiler.numerics.grids import weight_grid
from qcompiler.scheme import TensorSpec


def insert_on_tables(model: ir.Model, spec: TensorSpec) -> list[Note]:
    """Put a fake-quant on every float embedding table, and tell of each table once."""
    calls: dict[ir.Value, ir.Value] = {}
    notes = []
    for found in embeddings(model):
        if found.quant is not None:
            continue
        why = _refuse(found, spec)
        if found.table not in calls:
            what = f"embedding {spec}" if why is None else "left in float"
            notes.append(Note(found.name, what, why or "as the scheme says"))
        if why is None:
            if found.table not in calls:
                calls[found.table] = _fake_quant(model, found, spec)
            found.gather.replace_input_with(0, calls[found.table])
    return notes


def _refuse(found: Embedding, spec: TensorSpec) -> str | None:
    assert found.table.shape is not None
    if spec.bits < 8 and int(found.table.shape.numpy()[1]) % 2:
        return "a row of an odd number of features does not fill bytes of two 4-bit numbers"
    return None


def _fake_quant(model: ir.Model, found: Embedding, spec: TensorSpec) -> ir.Value:
    array = array_of(found.table)
    assert array is not None
    grid = weight_grid(array.T, spec)
    assert grid.scale is not None
    assert grid.zero_point is not None
    inputs = [
        found.table,
        add_initializer(model.graph, f"{found.name}_scale", grid.scale.T),
        add_initializer(model.graph, f"{found.name}_zero_point", grid.zero_point.T),
    ]
    attributes = {"block_size": grid.group_size or len(array.T), "low": float(grid.low), "high": float(grid.high)}
    return insert_call(model, found.gather, "FakeQuantRows", inputs, f"{found.name}_fake_quant", **attributes)


def fold_tables(model: ir.Model) -> bool:
    """Fake-quantized tables become integers behind a DequantizeLinear with ``block_size``; whether there were any."""
    folded: dict[ir.Node, ir.Value] = {}
    for found in embeddings(model):
        call = found.quant
        if call is None or call.op_type != "FakeQuantRows":
            continue
        if call not in folded:
            folded[call] = _integers(model.graph, found, call)
        found.gather.replace_input_with(0, folded[call])
    return bool(folded)


def _integers(graph: ir.Graph, found: Embedding, call: ir.Node) -> ir.Value:
    array, grid = array_of(found.table), grid_of(call)
    assert array is not None
    assert grid.zero_point is not None
    q = grid.nearest(np.asarray(array, np.float32).T).T
    dtype = container(grid.low, grid.high)
    integers = add_initializer(graph, f"{found.name}_quantized", q.astype(dtype))
    integers.metadata_props.update(found.table.metadata_props)
    integers.metadata_props[BITS] = str((grid.high - grid.low).bit_length())
    zero_point = add_initializer(graph, f"{found.name}_zero_points", grid.zero_point.T.astype(np.int32).astype(dtype))
    dequantize = insert_node(
        graph,
        found.gather,
        "DequantizeLinear",
        [integers, call.inputs[1], zero_point],
        attributes={"axis": 1, "block_size": grid.group_size},
        name=f"{found.name}_dequantized",
        like=found.table,
    )
    return dequantize.outputs[0]


def container(low: int, high: int) -> np.dtype:
    """The smallest integer type of opset 21 that holds a grid."""
    if high - low < 16:
        return np.dtype(ml_dtypes.int4 if low < 0 else ml_dtypes.uint4)
    if high - low >= 256:
        return np.dtype(np.int16)
    return np.dtype(np.int8 if low < 0 else np.uint8)
