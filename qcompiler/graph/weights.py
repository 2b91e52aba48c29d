"""The grid of a fake-quantized weight, read off the graph and written back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.edit import array_of, write_input
from qcompiler.graph.functions import WEIGHT_QUANT, is_call
from qcompiler.graph.linear import Linear, linears
from qcompiler.numerics.codebooks import CodebookGrid, QuantizedScales
from qcompiler.numerics.grids import Grid

_TO_INTEGERS = ("FakeQuant", "FakeQuantBlocks")
BITS = "qcompiler.bits"
"""Metadata of a folded weight: the bits its numbers take, which may be fewer than their type's."""


def fake_quantized(linear: Linear) -> bool:
    """Whether the Linear's weight stands behind a fake-quant (``insert`` has been, ``fold`` has not)."""
    return is_call(linear.weight_quant, *WEIGHT_QUANT)


def on_integers(linear: Linear) -> bool:
    """Whether the fake-quant on its weight rounds to integers, whose grid :func:`grid_of` reads."""
    return is_call(linear.weight_quant, *_TO_INTEGERS)


def to_integers(model: ir.Model) -> dict[ir.Node, list[Linear]]:
    """The fake-quants to integers on weights, and the Linears whose weights stand behind each."""
    groups: dict[ir.Node, list[Linear]] = {}
    for linear in linears(model):
        if linear.weight_quant is not None and on_integers(linear):
            groups.setdefault(linear.weight_quant, []).append(linear)
    return groups


def in_groups(model: ir.Model) -> dict[ir.Node, list[Linear]]:
    """Those of them that round in groups of inputs."""
    return {quant: readers for quant, readers in to_integers(model).items() if is_call(quant, "FakeQuantBlocks")}


def codebook_of(call: ir.Node) -> CodebookGrid:
    """The grid of a FakeQuantCodebook or DequantizeCodebook call, its scales expanded where they are quantized."""
    values, scale = array_of(call.inputs[1]), array_of(call.inputs[2])
    expands = call.inputs[2].producer() if call.inputs[2] is not None else None
    if scale is None and is_call(expands, "DequantizeScales"):
        assert expands is not None
        q, step, mean = (array_of(value) for value in expands.inputs)
        assert q is not None
        assert step is not None
        assert mean is not None
        scale = QuantizedScales(q, step, mean, expands.attributes["count"].as_int()).expanded()
    assert values is not None
    assert scale is not None
    return CodebookGrid(values, call.attributes["block_size"].as_int(), scale)


def stored_float(call: ir.Node) -> npt.DTypeLike:
    """The type that a FakeQuantFloat call rounds to."""
    return ir.DataType(call.attributes["to"].as_int()).numpy()


def grid_of(call: ir.Node) -> Grid:
    """The grid of a fake-quant to integers on a weight [in, out], scale and zero_point as they stand there; that of an
    embedding's table [rows, features] is the grid of its transpose."""
    scale, zero_point = (array_of(value) for value in call.inputs[1:3])
    assert scale is not None
    assert zero_point is not None
    if is_call(call, "FakeQuant"):
        limits = np.iinfo(zero_point.dtype)
        return Grid(int(limits.min), int(limits.max), None, scale, zero_point)
    low, high = (int(call.attributes[name].as_float()) for name in ("low", "high"))
    if is_call(call, "FakeQuantRows"):
        scale, zero_point = scale.T, zero_point.T
    return Grid(low, high, call.attributes["block_size"].as_int(), scale, zero_point)


def folded_grid(dequantize: ir.Node) -> Grid | None:
    """The grid behind a DequantizeLinear on a weight [in, out]: by group of inputs, by output channel, or one scale.

    None where the weight is no constant, or its scales lie otherwise.
    """
    scale = array_of(dequantize.inputs[1])
    zero_point = array_of(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    value = dequantize.inputs[0]
    if array_of(value) is None or scale is None or value is None or value.dtype is None:
        return None
    axis, size = (_integer(dequantize, name, default) for name, default in (("axis", 1), ("block_size", 0)))
    by_group = scale.ndim == 2 and size > 0 and axis in (0, -2)
    if not (by_group or scale.ndim == 0 or (scale.ndim == 1 and axis in (1, -1) and not size)):
        return None
    bits = int(value.metadata_props.get(BITS, 0)) or round(8 * value.dtype.itemsize)
    low = -(1 << (bits - 1)) if value.dtype.is_signed() else 0
    zero = np.zeros(scale.shape, np.int32) if zero_point is None else zero_point.astype(np.int32)
    return Grid(low, low + (1 << bits) - 1, size if by_group else None, scale, zero)


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def write_grid(call: ir.Node, grid: Grid) -> None:
    """Give a fake-quant other scales and zero points; what else read the old ones keeps them."""
    old = grid_of(call)
    for index, (new, before) in enumerate(((grid.scale, old.scale), (grid.zero_point, old.zero_point)), start=1):
        assert before is not None
        if new is not None and not np.array_equal(new, before):
            write_input(call, index, np.asarray(new, before.dtype))


def rounded_weight(linear: Linear) -> npt.NDArray[np.float32]:
    """What the fake-quant makes of the weight, float32 [in, out]."""
    assert linear.weight_quant is not None
    weight = array_of(linear.weight)
    assert weight is not None
    weight = np.asarray(weight, np.float32)
    if is_call(linear.weight_quant, "FakeQuantFloat"):
        return weight.astype(stored_float(linear.weight_quant)).astype(np.float32)
    grid = grid_of(linear.weight_quant) if on_integers(linear) else codebook_of(linear.weight_quant)
    return np.asarray(grid.rounded(weight), np.float32)
