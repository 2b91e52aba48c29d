"""Rows of embedding tables that are quantized in groups of their features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from qcompiler.graph.embedding import Rows
from qcompiler.numerics.packing import pack
from qcompiler.targets.tvm.emit.builder import Builder, Tensor
from qcompiler.targets.tvm.emit.movement import inside


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
        place, feature = inside(buffers[0][tuple(index[:-1])], builder.expression(count)), index[-1]
        group = feature // rows.group_size
        number = buffers[1][place, feature // each].astype("int32")
        if each > 1:
            number = (number >> ((feature % each) * rows.bits).astype("int32")) & ((1 << rows.bits) - 1)
        zero = tirx.const(middle, "int32") if rows.symmetric else buffers[3][place, group].astype("int32")
        return (number - zero).astype("float32") * buffers[2][place, group]

    return builder.compute("embedding", (*ids.sizes, features), "float32", inputs, body)
