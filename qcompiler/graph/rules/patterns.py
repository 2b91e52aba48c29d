"""How the rules of ``normalise`` read a pattern: who made a value, small constants, and what is known of shapes."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.edit import array_of

SMALL = 4096
"""Constants up to this many elements are looked at and folded; larger ones are weights and stay where they are."""
SMALL_MASK = 1 << 18
"""The same for booleans and integers: masks of 512 by 512."""


def lowest(dtype: ir.DataType) -> float:
    """The lowest finite number of a floating type."""
    return float(ml_dtypes.finfo(dtype.numpy()).min)


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The standard operator of one of these types whose first output this is, or None."""
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or node.op_type not in op_types or node.outputs[0] is not value:
        return None
    return node


def other_input(node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    """The input of a binary operator that is not ``value``; for x·x that is x."""
    first, second = node.inputs
    return second if first is value else first


def small_array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The numbers of a constant of at most ``SMALL`` elements; larger ones are not read from disk."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return None
    if tensor.size > (SMALL if tensor.dtype.is_floating_point() else SMALL_MASK):
        return None
    return array_of(value)


def number(value: ir.Value | None) -> float | None:
    """The number behind a constant of one element, or None."""
    array = small_array(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def with_number(node: ir.Node | None) -> tuple[ir.Value, float] | None:
    """A binary operator on x and a number, in either order: (x, number)."""
    if node is None or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    if first is not None and (c := number(second)) is not None:
        return first, c
    if second is not None and (c := number(first)) is not None:
        return second, c
    return None


def rank(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None


def last_dim(value: ir.Value | None) -> int | None:
    """The static size of the last axis, or None."""
    if value is None or value.shape is None or not len(value.shape):
        return None
    dim = value.shape[-1]
    return dim if isinstance(dim, int) else None


def dims(value: ir.Value | None) -> list[int | str | None] | None:
    """Axis sizes as numbers, symbols' names, or None where nothing is known; None for an unknown rank."""
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def is_vector(value: ir.Value | None, size: int | None = None) -> bool:
    """Whether this is an initializer [size] (leading axes of 1 do not count)."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.shape is None:
        return False
    if not len(value.shape) or not value.shape.is_static():
        return False
    shape = [int(d) for d in value.shape.numpy()]
    return math.prod(shape) == shape[-1] and (size is None or shape[-1] == size)


def axes_of(node: ir.Node, index: int = 1) -> list[int] | None:
    """The axes that a node gets as input ``index`` or as attribute; None where they are computed or absent."""
    if "axes" in node.attributes:
        return [int(a) for a in node.attributes["axes"].as_ints()]
    array = small_array(node.inputs[index]) if len(node.inputs) > index else None
    return None if array is None else [int(a) for a in array.reshape(-1)]


def reduces_last(node: ir.Node) -> bool:
    """Whether a reduction runs over the last axis alone and keeps it."""
    axes = axes_of(node)
    keep = node.attributes.get_int("keepdims", 1)
    size = rank(node.inputs[0])
    return (
        keep == 1
        and axes is not None
        and len(axes) == 1
        and (axes[0] == -1 or (size is not None and axes[0] == size - 1))
    )
