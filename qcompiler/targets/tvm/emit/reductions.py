"""Reductions, cumulative sums, TopK and Softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import te, tirx

from qcompiler.targets.tvm.emit.builder import Builder, Tensor
from qcompiler.targets.tvm.emit.dims import Size, product
from qcompiler.targets.tvm.emit.elementwise import apply
from qcompiler.targets.tvm.emit.movement import Rule, transpose
from qcompiler.targets.tvm.emit.numbers import Numbers
from qcompiler.targets.tvm.kernels.softmax import Softmax


def _reduce(combine: Callable[..., Any], mean: bool = False, square: bool = False) -> Rule:
    def rule(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
        x = inputs[0]
        given = numbers[1] if len(numbers) > 1 else None
        rank = len(x.sizes)
        axes = sorted(int(a) % rank for a in given) if given is not None and given.size else list(range(rank))
        keep = node.attributes.get_int("keepdims", 1)

        def body(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
            reduced = {a: te.reduce_axis((0, builder.expression(x.sizes[a])), name=f"r{a}") for a in axes}
            rest = iter(index if not keep else [index[a] for a in range(rank) if a not in reduced])
            value = buffers[0][tuple(reduced[a] if a in reduced else next(rest) for a in range(rank))]
            return combine(value * value if square else value, axis=list(reduced.values()))

        sizes: list[Size] = [1 if a in axes else x.sizes[a] for a in range(rank) if keep or a not in axes]
        result = builder.compute("reduce", sizes, x.dtype, [x], body)
        if not mean:
            return [result]
        count = product([x.sizes[a] for a in axes])

        def divided(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
            return buffers[0][tuple(index)] / builder.expression(count).astype(x.dtype)

        return [builder.compute("mean", sizes, x.dtype, [result], divided, [count])]

    return rule


def _l2(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    (squares,) = _reduce(te.sum, square=True)(builder, node, inputs, numbers)
    return [apply(builder, "sqrt", [squares], squares.dtype, te.sqrt)]


def _cumsum(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    """Each element sums all before it: quadratic, which for a sequence of token positions is nothing."""
    x, axes = inputs[0], numbers[1]
    if axes is None or _flag(node, "exclusive") or _flag(node, "reverse"):
        raise ValueError("only a plain CumSum along a known axis is understood")
    axis = int(axes.reshape(-1)[0]) % len(x.sizes)

    def body(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
        k = te.reduce_axis((0, builder.expression(x.sizes[axis])), name="k")
        value = buffers[0][(*index[:axis], k, *index[axis + 1 :])]
        return te.sum(tirx.Select(k <= index[axis], value, tirx.const(0, x.dtype)), axis=k)

    return [builder.compute("cumsum", x.sizes, x.dtype, [x], body)]


def _flag(node: ir.Node, name: str) -> bool:
    return node.attributes.get_int(name, 0) != 0


def _top_k(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    """By counting for each element how many come before it: for a few experts, not for vocabularies."""
    x, count = inputs[0], numbers[1]
    rank = len(x.sizes)
    largest = node.attributes.get_int("largest", 1)
    if count is None or node.attributes.get_int("axis", -1) % rank != rank - 1 or not isinstance(x.sizes[-1], int):
        raise ValueError("only a TopK of a known number along a last axis of known size is understood")

    def before(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
        j = te.reduce_axis((0, x.sizes[-1]), name="j")
        own, other = buffers[0][tuple(index)], buffers[0][(*index[:-1], j)]
        better = other > own if largest else other < own
        first = tirx.any(better, tirx.all(tirx.EQ(other, own), j < index[-1]))
        return te.sum(tirx.Select(first, tirx.const(1, "int64"), tirx.const(0, "int64")), axis=j)

    place = builder.compute("rank", x.sizes, "int64", [x], before)
    sizes = (*x.sizes[:-1], int(count.reshape(-1)[0]))

    def chosen(value: Callable[[Any, Any], Any], dtype: str) -> Callable[..., Any]:
        def body(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
            j = te.reduce_axis((0, x.sizes[-1]), name="j")
            here = tirx.EQ(buffers[1][(*index[:-1], j)], index[-1])
            return te.sum(tirx.Select(here, value(buffers[0][(*index[:-1], j)], j), tirx.const(0, dtype)), axis=j)

        return body

    values = builder.compute("top", sizes, x.dtype, [x, place], chosen(lambda v, j: v, x.dtype))
    which = chosen(lambda v, j: j.astype("int64"), "int64")
    return [values, builder.compute("top_index", sizes, "int64", [x, place], which)]


def _softmax(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    x = inputs[0]
    rank = len(x.sizes)
    axis = node.attributes.get_int("axis", -1) % rank
    perm = [*(a for a in range(rank) if a != axis), axis]
    moved = transpose(builder, x, perm)
    rows = builder.rows(moved)
    (y,) = builder.call(Softmax(), [rows], [(rows.sizes, "float32")])
    return [transpose(builder, builder.view(y, moved.sizes), [perm.index(a) for a in range(rank)])]


RULES: dict[str, Rule] = {
    "ReduceSum": _reduce(te.sum),
    "ReduceMax": _reduce(te.max),
    "ReduceMin": _reduce(te.min),
    "ReduceMean": _reduce(te.sum, mean=True),
    "ReduceSumSquare": _reduce(te.sum, square=True),
    "ReduceL2": _l2,
    "CumSum": _cumsum,
    "TopK": _top_k,
    "Softmax": _softmax,
}
