"""Embedding tables in groups: to GatherBlockQuantized, sharing the weight of a tied head."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import Note
from qcompiler.graph.edit import add_initializer, array_of, insert_node
from qcompiler.graph.embedding import Embedding, Rows, embeddings, folded_rows
from qcompiler.numerics.packing import pack
from qcompiler.targets.ort.emit import contrib_instead

Bytes = npt.NDArray[np.uint8]


def lower_embeddings(model: ir.Model) -> list[Note]:
    """Replace every Gather of a folded table, in place, and say of each table what became of it.

    Where a MatMulNBits (so: after ``lower_blocks``) has the very same numbers, scales and zero points, the table is a
    Reshape of its weight, which ONNX Runtime computes when it loads the model: the file has both once.
    """
    made: dict[ir.Node, list[ir.Value | None]] = {}
    notes = []
    for found in embeddings(model):
        table, rows = found.quant, folded_rows(found)
        if table is None or rows is None:
            continue
        if table not in made:
            made[table], shared = _operands(model.graph, found, table, rows)
            why = f"the numbers of {shared}, in the file once" if shared else f"{rows.bits}-bit rows"
            notes.append(Note(found.name, f"GatherBlockQuantized.g{rows.group_size}", why))
        data, scales, zero_points = made[table]
        attributes = {"bits": rows.bits, "block_size": rows.group_size, "gather_axis": 0, "quantize_axis": 1}
        inputs = [data, found.gather.inputs[1], scales, zero_points]
        contrib_instead(model, [found.gather], "GatherBlockQuantized", inputs, attributes, f"{found.gather.name}.rows")
    return notes


def _operands(graph: ir.Graph, found: Embedding, table: ir.Node, rows: Rows) -> tuple[list[ir.Value | None], str]:
    """Data, scales and zero points (None: the middle) of a table, and the node whose weight they share, or ""."""
    data, zeros = pack(rows.q, rows.bits), None if rows.symmetric else pack(rows.zero_point, rows.bits)
    for node, operands in _products(graph, rows.bits, rows.group_size):
        if _equal(operands, [data, rows.scale, zeros]):
            return [_rows(graph, found, operands[0], data.shape), *operands[1:]], node.name or ""
    base = found.name.removesuffix("_quantized")
    return [
        add_initializer(graph, f"{base}_rows", data),
        table.inputs[1],
        None if zeros is None else add_initializer(graph, f"{base}_row_zero_points", zeros),
    ], ""


def _products(graph: ir.Graph, bits: int, size: int) -> Iterator[tuple[ir.Node, list[ir.Value | None]]]:
    """Each MatMulNBits of these blocks, with its weight, scales and zero points (None: the middle)."""
    for node in graph:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if node.op_type == "MatMulNBits" and (attributes["bits"], attributes["block_size"]) == (bits, size):
            yield node, [*node.inputs[1:4], None][:3]


def _equal(operands: list[ir.Value | None], wanted: list[npt.NDArray[np.generic] | None]) -> bool:
    """Whether a product's constants are a table's, but for their shape and what fills up the last block of a row."""
    for value, array in zip(operands, wanted, strict=True):
        held = array_of(value)
        if held is None or array is None:
            if held is not None or array is not None:
                return False
            continue
        if len(held) != len(array) or not np.array_equal(held.reshape(len(array), -1)[:, : array.shape[1]], array):
            return False
    return True


def _rows(graph: ir.Graph, found: Embedding, weight: ir.Value | None, shape: tuple[int, ...]) -> ir.Value:
    """A product's weight [rows, blocks, bytes] as the table [rows, bytes], without what fills up the last block."""

    def constant(suffix: str, *numbers: int) -> ir.Value:
        return add_initializer(graph, f"{found.name}.{suffix}", np.array(numbers, np.int64))

    assert weight is not None
    assert weight.shape is not None
    name = f"{found.name}.rows"
    inputs = [weight, constant("shape", shape[0], -1)]
    flat = insert_node(graph, found.gather, "Reshape", inputs, name=name).outputs[0]
    if math.prod(weight.shape.numpy()) == math.prod(shape):
        return flat
    inputs = [flat, constant("start", 0), constant("bytes", shape[1]), constant("axis", 1)]
    return insert_node(graph, found.gather, "Slice", inputs, name=f"{name}.filled").outputs[0]
