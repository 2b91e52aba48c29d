"""Operators that look elements up: gathers, also in embedding tables that are quantized in groups of their features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from tvm import tirx

from qcompiler.graph.embedding import Rows
from qcompiler.numerics.packing import pack
from qcompiler.targets.tvm.emit.builder import Builder, Tensor
from qcompiler.targets.tvm.emit.movement import Rule
from qcompiler.targets.tvm.emit.numbers import Numbers


def _inside(index: Any, size: Any) -> Any:
    """An index that stays in the tensor: negative ones count from the end, others end at its ends."""
    index = index.astype("int64")
    wrapped = tirx.Select(index < 0, index + size, index)
    return tirx.max(tirx.min(wrapped, size - 1), tirx.IntImm("int64", 0))


def _gather(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    x, places = inputs
    axis = node.attributes.get_int("axis", 0) % len(x.sizes)
    rank = len(places.sizes)

    def body(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
        place = _inside(buffers[1][tuple(index[axis : axis + rank])], builder.expression(x.sizes[axis]))
        return buffers[0][(*index[:axis], place, *index[axis + rank :])]

    sizes = (*x.sizes[:axis], *places.sizes, *x.sizes[axis + 1 :])
    return [builder.compute("gather", sizes, x.dtype, inputs, body)]


def _gather_elements(
    builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]
) -> Any:
    x, places = inputs
    axis = node.attributes.get_int("axis", 0) % len(x.sizes)

    def body(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
        place = _inside(buffers[1][tuple(index)], builder.expression(x.sizes[axis]))
        return buffers[0][(*index[:axis], place, *index[axis + 1 :])]

    return [builder.compute("gather_elements", places.sizes, x.dtype, inputs, body)]


def _gather_nd(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    x, places = inputs
    batch, depth = node.attributes.get_int("batch_dims", 0), places.sizes[-1]
    if not isinstance(depth, int):
        raise ValueError("its indices have an open last axis")
    lead = len(places.sizes) - 1

    def body(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
        chosen = [_inside(buffers[1][(*index[:lead], d)], builder.expression(x.sizes[batch + d])) for d in range(depth)]
        return buffers[0][(*index[:batch], *chosen, *index[lead:])]

    sizes = (*places.sizes[:-1], *x.sizes[batch + depth :])
    return [builder.compute("gather_nd", sizes, x.dtype, inputs, body)]


def gather_rows(builder: Builder, name: str, rows: Rows, ids: Tensor) -> Tensor:
    """Float32 [..., features] of ids [...], unpacked as they are read; ``name`` is the table's."""
    count, features = rows.q.shape
    each, middle = 8 // rows.bits, 1 << (rows.bits - 1)
    inputs = [
        ids,
        builder.constant(f"{name}.packed", pack(rows.q, rows.bits)),
        builder.constant(f"{name}.scale", rows.scale),
    ]
    if not rows.symmetric:
        inputs.append(builder.constant(f"{name}.zero", rows.zero_point))

    def body(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
        place, feature = _inside(buffers[0][tuple(index[:-1])], builder.expression(count)), index[-1]
        group = feature // rows.group_size
        number = buffers[1][place, feature // each].astype("int32")
        if each > 1:
            number = (number >> ((feature % each) * rows.bits).astype("int32")) & ((1 << rows.bits) - 1)
        zero = tirx.const(middle, "int32") if rows.symmetric else buffers[3][place, group].astype("int32")
        return (number - zero).astype("float32") * buffers[2][place, group]

    return builder.compute("embedding", (*ids.sizes, features), "float32", inputs, body)


RULES: dict[str, Rule] = {"Gather": _gather, "GatherElements": _gather_elements, "GatherND": _gather_nd}
