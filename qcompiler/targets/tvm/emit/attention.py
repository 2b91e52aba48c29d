"""softmax(scale · q kᵀ + mask) v in one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompiler.graph.shapes import Facts
from qcompiler.targets.ort.heads import merged_output, trace
from qcompiler.targets.tvm.emit.builder import Builder, Tensor
from qcompiler.targets.tvm.emit.elementwise import broadcast
from qcompiler.targets.tvm.emit.values import Values
from qcompiler.targets.tvm.kernels.attention import Attention


def attention(values: Values, node: ir.Node, facts: Facts) -> tuple[Tensor, set[ir.Node]]:
    """The output of an Attention node, and nodes behind it that the kernel makes unnecessary.

    Heads that are split before it or merged behind it are read and written where they lie.

    Args:
        values: what is known so far; a merged output is added.
        node: Attention or MaskedAttention.
        facts: shapes by value name.
    """
    builder, operands = values.builder, []
    for value in node.inputs[:3]:
        assert value is not None
        traced = trace(value, facts)
        if traced.rotation is not None:
            operands.append((values.tensor(traced.rotation.outputs[0]), False))
        elif traced.rows is not None:
            rows = values.tensor(traced.rows)
            b, s = rows.sizes[:2]
            operands.append((builder.view(rows, (b, s, traced.count, facts[value.name or ""].shape[3])), True))
        else:
            operands.append((values.tensor(traced.value), False))
    key_heads, value_heads = ((t.sizes[2] if rows else t.sizes[1]) for t, rows in operands[1:])
    if key_heads != value_heads:  # a repeat that was found on one side only
        operands[1:] = [(values.tensor(v), False) for v in node.inputs[1:3]]
    mask = values.tensor(node.inputs[3]) if len(node.inputs) > 3 else None
    if mask is not None:
        mask = builder.view(mask, (*([1] * (4 - len(mask.sizes))), *mask.sizes))
    merged = merged_output(node, facts)
    y = _attention(builder, operands, mask, node.attributes.get_float("scale"), merged is not None)
    if merged is None:
        return y, set()
    b, s, h, d = y.sizes
    reshape = merged.producer()
    assert reshape is not None
    transpose = reshape.inputs[0].producer() if reshape.inputs[0] is not None else None
    assert transpose is not None
    values.tensors[merged] = builder.view(y, (b, s, h * d))
    return y, {reshape, transpose}


def _attention(
    builder: Builder,
    operands: Sequence[tuple[Tensor, bool]],
    mask: Tensor | None,
    scale: float,
    merged: bool,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v.

    Args:
        builder: where to.
        operands: q, k, v, each with whether it is [B, S, H, D] instead of [B, H, S, D].
        mask: additive, of rank 4.
        scale: of the scores.
        merged: whether the result is [B, S, H, D].
    """
    shapes = [(t.sizes[0], t.sizes[2], t.sizes[1], t.sizes[3]) if rows else t.sizes for t, rows in operands]
    (b, heads, s, width), (_, key_heads, t, _), (_, _, _, value_width) = shapes
    for number in (heads, key_heads, width, value_width):
        if not isinstance(number, int):
            raise ValueError("its heads hang on open axes")
    full = (b, heads, s, t)
    if mask is not None and (broadcast(mask.sizes, full) != full):
        raise ValueError(f"its mask {list(mask.sizes)} does not fit scores {list(full)}")
    kernel = Attention(
        heads,  # type: ignore[arg-type]
        key_heads,  # type: ignore[arg-type]
        width,  # type: ignore[arg-type]
        value_width,  # type: ignore[arg-type]
        scale,
        (operands[0][1], operands[1][1], operands[2][1], merged),
        None if mask is None else tuple(own != size for own, size in zip(mask.sizes, full, strict=True)),  # type: ignore[arg-type]
    )
    inputs = [tensor for tensor, _ in operands] + ([mask] if mask is not None else [])
    sizes = (b, s, heads, value_width) if merged else (b, heads, s, value_width)
    return builder.call(kernel, inputs, [(sizes, "float32")])[0]
