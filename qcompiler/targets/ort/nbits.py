"""Linears with weights in groups, or of fewer than 8 bits, or with float inputs: to MatMulNBits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import Note
from qcompiler.graph.edit import add_initializer, array_of
from qcompiler.graph.functions import is_call
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.weights import folded_grid
from qcompiler.numerics.packing import pack, pack_weight
from qcompiler.targets.ort.emit import contrib_instead

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Group sizes that the operator takes."""
_PADDING = 1 / 16  # of a weight's inputs that blocks may add where their size is free

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """A folded weight [in, out] as unsigned integers with one scale a group.

    Attributes:
        q: [in, out], 0 <= q < 2^bits.
        scale: float32, and zero_point: unsigned; [groups, out].
        group_size: inputs that share a scale.
    """

    q: Array
    scale: Array
    zero_point: Array
    group_size: int
    bits: int

    def in_blocks_of(self, size: int) -> Blocks:
        """The same numbers in smaller groups; of one group, in any."""
        if size == self.group_size:
            return self
        blocks = -(-len(self.q) // size)
        repeat = blocks if len(self.scale) == 1 else self.group_size // size
        scale, zero_point = (np.repeat(a, repeat, axis=0)[:blocks] for a in (self.scale, self.zero_point))
        return Blocks(self.q, scale, zero_point, size, self.bits)


def lower_blocks(model: ir.Model) -> tuple[dict[str, str], list[Note]]:
    """Replace every folded Linear whose input is float, or fake-quantized by group, in place.

    Accuracy level 0 multiplies in float; level 4 quantizes the input to int8 in the weight's blocks and multiplies
    integers, which is what FakeQuantPerGroup simulates. Linears of one weight share its packed form.

    Returns:
        Name of each lowered Linear -> name of the node that computes it; and a note for each.
    """
    packed: dict[tuple[ir.Node, int], list[ir.Value | None]] = {}
    nodes: dict[str, str] = {}
    notes: list[Note] = []
    for linear in linears(model):
        blocks = None if linear.weight_quant is None else blocks_of(linear.weight_quant)
        quant = linear.activation_quant
        if blocks is None or not (quant is None or is_call(quant, "FakeQuantPerGroup")):
            continue
        wanted = None if quant is None else quant.attributes["block_size"].as_int()
        size = block_size(blocks, wanted)
        if size is None:
            why = f"MatMulNBits has no blocks of {wanted or blocks.group_size}, only of {BLOCK_SIZES}"
            notes.append(Note(linear.name, "left in float", why))
            continue
        assert linear.weight_quant is not None
        key = (linear.weight_quant, size)
        if key not in packed:
            packed[key] = _packed(model.graph, linear.weight.name or linear.name, blocks.in_blocks_of(size))
        node = _product(model, linear, packed[key], blocks.bits, size)
        nodes[linear.name] = node.name or ""
        how = "float inputs" if quant is None else "inputs in int8 by block"
        notes.append(Note(linear.name, f"MatMulNBits.g{size}", f"{blocks.bits}-bit weights, {how}"))
    return nodes, notes


def blocks_of(dequantize: ir.Node) -> Blocks | None:
    """The weight behind a DequantizeLinear by group of inputs, by output channel or of one scale; None for others."""
    grid = folded_grid(dequantize) if dequantize.op_type == "DequantizeLinear" else None
    q = array_of(dequantize.inputs[0])
    bits = 0 if grid is None else (grid.high - grid.low).bit_length()
    if grid is None or q is None or bits not in (2, 4, 8):
        return None
    scale, zero_point = grid.scale, grid.zero_point
    assert scale is not None
    assert zero_point is not None
    if grid.group_size is None:
        scale, zero_point = (np.broadcast_to(a, (1, q.shape[1])) for a in (scale, zero_point))
    unsigned, zeros = (a.astype(np.int16) - grid.low for a in (q, zero_point))
    return Blocks(unsigned, scale.astype(np.float32), zeros, grid.group_size or len(q), bits)


def block_size(blocks: Blocks, wanted: int | None) -> int | None:
    """The blocks to use: those of the activation, else the weight's groups; None where the operator has none such.

    Weights with one scale an output channel take the largest blocks that add little padding.
    """
    if len(blocks.scale) > 1:
        size = wanted or blocks.group_size
        return size if size in BLOCK_SIZES and blocks.group_size % size == 0 else None
    if wanted is not None:
        return wanted if wanted in BLOCK_SIZES else None
    rows = len(blocks.q)
    fitting = [size for size in BLOCK_SIZES if -rows % size <= _PADDING * rows]
    return max(fitting, default=BLOCK_SIZES[0])


def _packed(graph: ir.Graph, name: str, blocks: Blocks) -> list[ir.Value | None]:
    """The operator's constants: weight [out, blocks, bytes], scales [out, blocks], zero points [out, bytes] or None."""
    base = name.removesuffix("_quantized")
    weight = add_initializer(graph, f"{base}_blocks", pack_weight(blocks.q, blocks.bits, blocks.group_size))
    scales = add_initializer(graph, f"{base}_block_scales", np.ascontiguousarray(blocks.scale.T))
    middle = 1 << (blocks.bits - 1)
    if (blocks.zero_point == middle).all():  # what the operator takes where none are given
        return [weight, scales, None]
    zero_points = pack(blocks.zero_point.T.astype(np.uint8), blocks.bits)
    return [weight, scales, add_initializer(graph, f"{base}_block_zero_points", zero_points)]


def _product(model: ir.Model, linear: Linear, constants: list[ir.Value | None], bits: int, size: int) -> ir.Node:
    attributes = {
        "K": linear.in_features,
        "N": linear.out_features,
        "bits": bits,
        "block_size": size,
        "accuracy_level": 0 if linear.activation_quant is None else 4,
    }
    inputs = [linear.x, *constants, None, linear.bias]
    return contrib_instead(model, linear.nodes, "MatMulNBits", inputs, attributes, f"{linear.name}.blocks")
