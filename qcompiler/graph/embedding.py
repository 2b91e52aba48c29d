"""The Embedding view: ``Gather(table[rows, features], ids)``, whose table may be float, fake-quantized or folded."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.edit import array_of, users
from qcompiler.graph.functions import is_call
from qcompiler.graph.weights import BITS

_READERS = frozenset({"Add", "Sum", "LayerNormalization", "RMSNorm", "MatMul"})


@dataclasses.dataclass(frozen=True)
class Embedding:
    """One embedding of a canonical graph.

    Attributes:
        name: of its table.
        gather: the Gather node.
        table: the initializer [rows, features]: float, or integers after ``fold``.
        quant: the FakeQuantRows call (after ``insert``) or DequantizeLinear (after ``fold``) on the table, or None.
    """

    name: str
    gather: ir.Node
    table: ir.Value
    quant: ir.Node | None


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A folded table as unsigned integers with one scale a group of each row's features.

    Attributes:
        q: uint8 [rows, features], below 2^bits.
        scale: float32, and zero_point: uint8; [rows, groups].
        bits: of one number.
        group_size: features that share a scale.
    """

    q: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.uint8]
    bits: int
    group_size: int

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle of the range."""
        return bool((self.zero_point == 1 << (self.bits - 1)).all())


def folded_rows(found: Embedding) -> Rows | None:
    """The table of an embedding after ``fold``; None where it is not quantized."""
    dequantize = found.quant
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or BITS not in found.table.metadata_props:
        return None
    bits, q, scale, zero_point = int(found.table.metadata_props[BITS]), *_arrays(dequantize)
    low = -(1 << (bits - 1)) if str(found.table.dtype).startswith("INT") else 0
    unsigned, zeros = ((a.astype(np.int16) - low).astype(np.uint8) for a in (q, zero_point))
    return Rows(unsigned, scale, zeros, bits, dequantize.attributes["block_size"].as_int())


def _arrays(node: ir.Node) -> list[npt.NDArray[Any]]:
    arrays = [array_of(value) for value in node.inputs]
    assert all(array is not None for array in arrays)
    return [array for array in arrays if array is not None]


def embeddings(model: ir.Model) -> list[Embedding]:
    """Every embedding of the model's main graph, in graph order.

    A gathered float table is one where its rows are added, normalised, multiplied by a weight or scaled by constants;
    tables of sines and cosines, which multiply what was computed, are not. A quantized one was found to be.
    """
    return [found for node in model.graph if (found := as_embedding(node)) is not None]


def as_embedding(node: ir.Node) -> Embedding | None:
    """The embedding whose rows this node gathers, or None."""
    if node.op_type != "Gather" or node.domain != "" or node.attributes.get_int("axis", 0) != 0:
        return None
    table, ids = node.inputs
    quant = table.producer() if table is not None else None
    if quant is not None and (is_call(quant, "FakeQuantRows") or quant.op_type == "DequantizeLinear"):
        table = quant.inputs[0]
    else:
        quant = None
    if table is None or not table.is_initializer() or table.shape is None or len(table.shape) != 2:
        return None
    if quant is None:
        floats = table.dtype is not None and table.dtype.is_floating_point()
        if not floats or array_of(ids) is not None or not _embeds(node.outputs[0]):
            return None
    return Embedding(table.name or "", node, table, quant)


def _embeds(rows: ir.Value) -> bool:
    readers = users(rows)
    return bool(readers) and all(reader.op_type in _READERS or _scales(reader, rows) for reader in readers)


def _scales(reader: ir.Node, rows: ir.Value) -> bool:
    """Whether the node multiplies by a constant."""
    others = [value for value in reader.inputs if value is not rows]
    return reader.op_type == "Mul" and len(others) == 1 and array_of(others[0]) is not None
