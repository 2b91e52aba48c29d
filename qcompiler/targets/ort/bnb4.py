"""Linears with weights by table (NF4, FP4) and float inputs: to MatMulBnb4."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import Note
from qcompiler.graph.edit import add_initializer, array_of
from qcompiler.graph.functions import is_call
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.weights import codebook_of
from qcompiler.numerics.codebooks import CODEBOOKS
from qcompiler.targets.ort.emit import contrib_instead

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Block sizes that the operator takes."""
_TYPES: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "fp4": (0, (11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3)),
    "nf4": (1, tuple(range(16))),
}
"""Table -> the operator's ``quant_type``, and its own number for each place in the ascending table."""


def lower_codebooks(model: ir.Model) -> tuple[dict[str, str], list[Note]]:
    """Replace every folded Linear whose weight is quantized by table, in place.

    Scales that are quantized too stay so in the file: they are expanded in the graph, and ONNX Runtime computes that
    once, when it loads the model. Linears of one weight share its packed form.

    Returns:
        Name of each lowered Linear -> name of the node that computes it; and a note for each.
    """
    packed: dict[ir.Node, ir.Value] = {}
    nodes: dict[str, str] = {}
    notes: list[Note] = []
    for linear in linears(model):
        call = linear.weight_quant
        if call is None or not is_call(call, "DequantizeCodebook"):
            continue
        name, size = table_of(call), call.attributes["block_size"].as_int()
        if name is None or size not in BLOCK_SIZES or linear.activation_quant is not None:
            why = f"MatMulBnb4 takes float inputs and nf4 or fp4 in blocks of {BLOCK_SIZES}"
            notes.append(Note(linear.name, "dequantized in float", why))
            continue
        kind, numbers = _TYPES[name]
        if call not in packed:
            packed[call] = _packed(model.graph, linear, np.array(numbers, np.uint8))
        attributes = {"K": linear.in_features, "N": linear.out_features, "block_size": size, "quant_type": kind}
        inputs = [linear.x, packed[call], call.inputs[2]]
        node = contrib_instead(model, [linear.matmul], "MatMulBnb4", inputs, attributes, f"{linear.name}.table")
        nodes[linear.name] = node.name or ""
        notes.append(Note(linear.name, f"MatMulBnb4.g{size}", f"{name} weights, float inputs"))
    return nodes, notes


def table_of(call: ir.Node) -> str | None:
    """The name of the table that a DequantizeCodebook call reads; None for one that is in no list."""
    values = codebook_of(call).values
    return next((name for name, table in CODEBOOKS.items() if np.array_equal(table, values)), None)


def _packed(graph: ir.Graph, linear: Linear, numbers: npt.NDArray[np.uint8]) -> ir.Value:
    """The operator's weight: [out, in] flattened, two numbers a byte, the first in the high bits."""
    q = array_of(linear.weight)
    assert q is not None
    flat = numbers[q.astype(np.uint8).T.reshape(-1)]
    if len(flat) % 2:
        flat = np.append(flat, numbers[:1])
    name = (linear.weight.name or linear.name).removesuffix("_quantized")
    return add_initializer(graph, f"{name}_packed", (flat[0::2] << 4) | flat[1::2])
