"""Operators that do nothing are dropped, and targets of Reshape and Expand that are known become constants."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompiler.graph.rules.patterns import axes_of, dims, made_by, number, rank
from qcompiler.graph.rules.rewriter import Rewriter
from qcompiler.graph.rules.symbols import Element, Symbols


def _identity(rewriter: Rewriter, node: ir.Node, symbols: Symbols) -> None:
    source = node.inputs[0]
    if source is not None:
        rewriter.bypass(node.outputs[0], source)


def _dropout(rewriter: Rewriter, node: ir.Node, symbols: Symbols) -> None:
    training = number(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0
    if training == 0 and not any(output.uses() for output in node.outputs[1:]):
        _identity(rewriter, node, symbols)


def _cast(rewriter: Rewriter, node: ir.Node, symbols: Symbols) -> None:
    source = node.inputs[0]
    if source is not None and source.dtype is not None and int(source.dtype) == node.attributes.get_int("to", 0):
        rewriter.bypass(node.outputs[0], source)


def _cast_like(rewriter: Rewriter, node: ir.Node, symbols: Symbols) -> None:
    source, like = node.inputs
    if source is None or like is None or source.dtype is None or like.dtype is None:
        return
    if source.dtype == like.dtype:
        rewriter.bypass(node.outputs[0], source)
    else:
        rewriter.replace(node.outputs[0], "Cast", [source], {"to": int(like.dtype)})


def _transpose(rewriter: Rewriter, node: ir.Node, symbols: Symbols) -> None:
    source = node.inputs[0]
    perm = node.attributes.get_ints("perm", None)
    if source is None:
        return
    if perm is not None and list(perm) == list(range(len(perm))):
        rewriter.bypass(node.outputs[0], source)


def _reshape(rewriter: Rewriter, node: ir.Node, symbols: Symbols) -> None:
    source, target = node.inputs[0], symbols.of(node.inputs[1])
    output = node.outputs[0]
    if source is None or target is None:
        return
    before = dims(source)
    allow_zero = node.attributes.get_int("allowzero", 0) == 1
    if allow_zero and 0 in target:
        return
    if not allow_zero:
        if 0 in target and before is None:
            return
        target = [before[i] if e == 0 and before is not None else e for i, e in enumerate(target)]
    target = _known_minus_one(target, dims(output), before)
    if before is not None and target == before and None not in target and -1 not in target:
        rewriter.bypass(output, source)
        return
    if (keys := _swapped(node, target, symbols)) is not None:
        rewriter.replace(
            output, "Transpose", [keys], {"perm": [*range(len(target) - 2), len(target) - 1, len(target) - 2]}
        )
        return
    written = _target(target, before)
    if written is not None:
        node.replace_input_with(1, rewriter.constant(np.array(written, dtype=np.int64), f"{output.name}/shape"))
        node.attributes.pop("allowzero", None)


def _known_minus_one(target: list[Element], after: list[Element] | None, before: list[Element] | None) -> list[Element]:
    """Write the size out where the target leaves it to be computed (-1) and it is known."""
    if target.count(-1) != 1:
        return target
    index = target.index(-1)
    size: Element = after[index] if after is not None and len(after) == len(target) else None
    if not isinstance(size, int) and before is not None and None not in before and None not in target:
        rest = [e for i, e in enumerate(target) if i != index]
        left = list(before)
        for element in rest:
            if element in left and not isinstance(element, int):
                left.remove(element)
            elif not isinstance(element, int):
                return target
        top = int(np.prod([e for e in left if isinstance(e, int)], dtype=np.int64))
        bottom = int(np.prod([e for e in rest if isinstance(e, int)], dtype=np.int64))
        symbols = [e for e in left if isinstance(e, str)]
        if bottom > 0 and top % bottom == 0 and (not symbols or (len(symbols) == 1 and top == bottom)):
            size = symbols[0] if symbols else top // bottom
    if size is None or (isinstance(size, int) and size <= 0):
        return target
    return [size if i == index else e for i, e in enumerate(target)]


def _target(target: list[Element], before: list[Element] | None) -> list[int] | None:
    """The constant to write: a number, 0 where the axis is kept in its place, -1 for at most one other."""
    written: list[int] = []
    for i, element in enumerate(target):
        if isinstance(element, int):
            written.append(element)
        elif element is not None and before is not None and i < len(before) and before[i] == element:
            written.append(0)
        else:
            written.append(-1)
    return written if written.count(-1) <= 1 else None


def _swapped(node: ir.Node, target: list[Element], symbols: Symbols) -> ir.Value | None:
    """x, where this is Reshape(Transpose(Reshape(x, [-1, S, D]), [0, 2, 1]), [..., D, S]): last two axes swapped."""
    transpose = made_by(node.inputs[0], "Transpose")
    flat = made_by(transpose.inputs[0], "Reshape") if transpose is not None else None
    if transpose is None or flat is None or list(transpose.attributes.get_ints("perm", ())) != [0, 2, 1]:
        return None
    x = flat.inputs[0]
    sizes, middle = dims(x), symbols.of(flat.inputs[1])
    if sizes is None or middle is None or len(sizes) != len(target) or len(middle) != 3 or None in sizes:
        return None
    swapped = middle[1:] == sizes[-2:] and target == [*sizes[:-2], sizes[-1], sizes[-2]]
    return x if swapped else None


def _expand(rewriter: Rewriter, node: ir.Node, symbols: Symbols) -> None:
    source, target = node.inputs[0], symbols.of(node.inputs[1])
    before = dims(source)
    if source is None or target is None or before is None:
        return
    offset = len(target) - len(before)
    written: list[int] = []
    for i, element in enumerate(target):
        own = before[i - offset] if i >= offset else None
        if element == 1 or (element is not None and i >= offset and element == own):
            written.append(1)
        elif isinstance(element, int):
            written.append(element)
        else:
            return
    if all(e == 1 for e in written) and len(written) <= len(before):
        rewriter.bypass(node.outputs[0], source)
    else:
        node.replace_input_with(
            1, rewriter.constant(np.array(written, dtype=np.int64), f"{node.outputs[0].name}/shape")
        )


def _slice(rewriter: Rewriter, node: ir.Node, symbols: Symbols) -> None:
    source, sizes = node.inputs[0], dims(node.inputs[0])
    starts, ends = symbols.of(node.inputs[1]), symbols.of(node.inputs[2])
    steps = symbols.of(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
    axes = axes_of(node, 3) if len(node.inputs) > 3 and node.inputs[3] is not None else list(range(len(starts or [])))
    if source is None or starts is None or ends is None or steps is None or axes is None:
        return
    for start, end, axis in zip(starts, ends, axes, strict=True):
        size = sizes[axis] if sizes is not None else None
        whole = (isinstance(end, int) and (end >= 2**31 - 1 or (isinstance(size, int) and end >= size))) or (
            size is not None and end == size
        )
        if start != 0 or not whole:
            return
    if all(step == 1 for step in steps):
        rewriter.bypass(node.outputs[0], source)


def _neutral(neutral: float, right_only: bool) -> Callable[[Rewriter, ir.Node, Symbols], None]:
    def rule(rewriter: Rewriter, node: ir.Node, symbols: Symbols) -> None:
        first, second = node.inputs
        pairs = [(first, second)] if right_only else [(first, second), (second, first)]
        for x, c in pairs:
            if x is None or c is None or number(c) != neutral or x.is_initializer():
                continue
            if (rank(c) or 0) == 0 or (rank(x) is not None and (rank(c) or 0) <= (rank(x) or 0)):
                rewriter.bypass(node.outputs[0], x)
                return

    return rule


def _concat(rewriter: Rewriter, node: ir.Node, symbols: Symbols) -> None:
    if len(node.inputs) == 1:
        _identity(rewriter, node, symbols)


def _shape(rewriter: Rewriter, node: ir.Node, symbols: Symbols) -> None:
    """An axis size that a graph input has too is read there, so that all layers share what depends on it (masks)."""
    elements = symbols.of(node.outputs[0])
    if elements is None or len(elements) != 1 or not isinstance(elements[0], str):
        return
    for value in rewriter.graph.inputs:
        sizes = dims(value) or []
        if elements[0] in sizes:
            axis = sizes.index(elements[0])
            node.replace_input_with(0, value)
            node.attributes["start"] = ir.AttrInt64("start", axis)
            node.attributes["end"] = ir.AttrInt64("end", axis + 1)
            return


NO_OPS: dict[str, Callable[[Rewriter, ir.Node, Symbols], None]] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Shape": _shape,
    "Expand": _expand,
    "Slice": _slice,
    "Concat": _concat,
    "Add": _neutral(0.0, right_only=False),
    "Sub": _neutral(0.0, right_only=True),
    "Mul": _neutral(1.0, right_only=False),
    "Div": _neutral(1.0, right_only=True),
    "And": _neutral(1.0, right_only=False),
    "Or": _neutral(0.0, right_only=False),
}
"""By operator: drop the node if it does nothing; write its target out if it is known."""
