"""Operators that move elements: reshapes, transposes, slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import tirx

from qcompiler.targets.tvm.emit.builder import Builder, Tensor
from qcompiler.targets.tvm.emit.dims import Dim, Size, product, quotient
from qcompiler.targets.tvm.emit.elementwise import broadcast, element
from qcompiler.targets.tvm.emit.numbers import Numbers

Rule = Callable[[Builder, ir.Node, Sequence[Tensor], Sequence[Numbers | None]], list[Tensor]]
"""Inputs as tensors (those that are wanted as numbers may be absent there), and as numbers where they are known."""


def _wanted(numbers: Sequence[Numbers | None], place: int, what: str) -> list[Any]:
    array = numbers[place] if len(numbers) > place else None
    if array is None:
        raise ValueError(f"its {what} hangs on data")
    return list(array.reshape(-1))


def reshape(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    wanted = [_size(number) for number in _wanted(numbers, 1, "shape")]
    sizes = [inputs[0].sizes[i] if n == 0 else n for i, n in enumerate(wanted)]
    if -1 in sizes:
        place = sizes.index(-1)
        rest = product([n for i, n in enumerate(sizes) if i != place])
        sizes[place] = quotient(product(inputs[0].sizes), rest)
    return [builder.view(inputs[0], sizes)]


def _size(number: Any) -> Size:
    return number if isinstance(number, Dim) else int(number)


def _unsqueeze(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    axes = [int(axis) for axis in _wanted(numbers, 1, "axes")]
    rank = len(inputs[0].sizes) + len(axes)
    places = {axis % rank for axis in axes}
    rest = iter(inputs[0].sizes)
    return [builder.view(inputs[0], [1 if axis in places else next(rest) for axis in range(rank)])]


def _squeeze(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    sizes = inputs[0].sizes
    if len(numbers) > 1 and numbers[1] is not None:
        places = {int(axis) % len(sizes) for axis in _wanted(numbers, 1, "axes")}
    else:
        places = {axis for axis, size in enumerate(sizes) if size == 1}
    return [builder.view(inputs[0], [size for axis, size in enumerate(sizes) if axis not in places])]


def _flatten(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    axis, sizes = node.attributes.get_int("axis", 1), inputs[0].sizes
    return [builder.view(inputs[0], [product(sizes[:axis]), product(sizes[axis:])])]


def transpose(builder: Builder, x: Tensor, perm: Sequence[int]) -> Tensor:
    """Axes in another order."""
    sizes = [x.sizes[axis] for axis in perm]
    moved = [(old, new) for old, new in enumerate(perm) if x.sizes[new] != 1]
    if [new for _, new in moved] == sorted(new for _, new in moved):  # only axes of size 1 change places
        return builder.view(x, sizes)

    def body(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
        return buffers[0][tuple(index[perm.index(axis)] for axis in range(len(perm)))]

    return builder.compute("transpose", sizes, x.dtype, [x], body)


def _transpose(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    default = tuple(range(len(inputs[0].sizes)))[::-1]
    return [transpose(builder, inputs[0], list(node.attributes.get_ints("perm", default)))]


def expand(builder: Builder, x: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Broadcast to the common shape of x and ``sizes``."""
    common = broadcast(x.sizes, sizes)
    if common == x.sizes:
        return x
    return builder.compute("expand", common, x.dtype, [x], lambda b, index: element(b[0], x.sizes, index))


def _expand(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    return [expand(builder, inputs[0], [_size(n) for n in _wanted(numbers, 1, "shape")])]


def concat(builder: Builder, parts: Sequence[Tensor], axis: int) -> Tensor:
    """One after another."""
    axis %= len(parts[0].sizes)
    starts: list[Size] = [0]
    for part in parts:
        starts.append(starts[-1] + part.sizes[axis])
    sizes = (*parts[0].sizes[:axis], starts[-1], *parts[0].sizes[axis + 1 :])

    def body(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
        value = None
        for number in reversed(range(len(parts))):
            start = builder.expression(starts[number])
            here = buffers[number][(*index[:axis], index[axis] - start, *index[axis + 1 :])]
            end = builder.expression(starts[number + 1])
            value = here if value is None else tirx.if_then_else(index[axis] < end, here, value)
        return value

    return builder.compute("concat", sizes, parts[0].dtype, parts, body)


def _concat(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    return [concat(builder, inputs, node.attributes.get_int("axis"))]


def cut(builder: Builder, x: Tensor, axis: int, start: Size, length: Size, step: int = 1) -> Tensor:
    """x[..., start : start + length · step : step, ...]."""
    if length == x.sizes[axis] and step == 1:
        return x
    sizes = (*x.sizes[:axis], length, *x.sizes[axis + 1 :])

    def body(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
        place = builder.expression(start) + index[axis] * step
        return buffers[0][(*index[:axis], place, *index[axis + 1 :])]

    return builder.compute("slice", sizes, x.dtype, [x], body, [start])


def _slice(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    x = inputs[0]
    starts, ends = _wanted(numbers, 1, "starts"), _wanted(numbers, 2, "ends")
    axes = _wanted(numbers, 3, "axes") if len(numbers) > 3 and numbers[3] is not None else range(len(starts))
    steps = _wanted(numbers, 4, "steps") if len(numbers) > 4 and numbers[4] is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = int(axis) % len(x.sizes)
        if step < 1:
            raise ValueError(f"its step is {step}")
        size = x.sizes[axis]
        first, last = _clamped(start, size), _clamped(end, size)
        if isinstance(last, Dim) and isinstance(size, int):
            builder.limit(last, size)
        length: Size = last - first
        if step != 1:
            if not isinstance(length, int):
                raise ValueError("it has steps along an open axis")
            length = -(-length // int(step))
        x = cut(builder, x, axis, first, length, int(step))
    return [x]


def _clamped(place: Any, size: Size) -> Size:
    """A start or end as ONNX means it: counted from the end where negative, and no further than the end."""
    if isinstance(place, Dim):
        return place
    number = int(place)
    if number < 0:
        return max(0, size + number) if isinstance(size, int) else (size + number if number > -(2**31) else 0)
    if isinstance(size, int):
        return min(number, size)
    return size if number >= 2**31 - 1 else number


def _split(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    x = inputs[0]
    axis = node.attributes.get_int("axis", 0) % len(x.sizes)
    if len(numbers) > 1 and numbers[1] is not None:
        lengths: list[Size] = [_size(n) for n in numbers[1]]
    elif isinstance(x.sizes[axis], int):
        each = -(-int(x.sizes[axis]) // len(node.outputs))  # type: ignore[arg-type]
        lengths = [each] * (len(node.outputs) - 1)
        lengths.append(x.sizes[axis] - sum(lengths))
    else:
        lengths = [quotient(x.sizes[axis], len(node.outputs))] * len(node.outputs)
    parts: list[Tensor] = []
    start: Size = 0
    for length in lengths:
        parts.append(cut(builder, x, axis, start, length))
        start = start + length
    return parts


def _range(builder: Builder, node: ir.Node, inputs: Sequence[Tensor], numbers: Sequence[Numbers | None]) -> Any:
    start, limit, step = (_wanted(numbers, i, "limits")[0] for i in range(3))
    if any(not isinstance(number, int | np.integer | Dim) for number in (start, limit, step)) or isinstance(step, Dim):
        raise ValueError("it is a Range of other than whole steps")
    stride: int = int(step)
    length: Size = _size(limit) - _size(start)
    if stride != 1:
        length = -(-length // stride) if isinstance(length, int) else quotient(length, stride)

    def body(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
        return builder.expression(_size(start)) + index[0] * stride

    return [builder.compute("range", (length,), "int64", [], body, [_size(start)])]


RULES: dict[str, Rule] = {
    "Reshape": reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Expand": _expand,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Range": _range,
}
