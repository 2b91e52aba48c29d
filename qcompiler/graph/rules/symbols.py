"""What integer vectors hold, element by element: numbers where known, names of axis sizes where not.

Exporters compute every Reshape's target from Shape, Gather, Concat and friends. Read symbolically, nearly all of it is
"keep this axis": the caller then writes a constant target and the arithmetic dies.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompiler.graph.rules.patterns import axes_of, dims, rank, small_array

Element = int | str | None
MAX_ELEMENTS = 16


class Symbols:
    """Elements of the rank 0 and rank 1 integer values seen so far; feed it nodes in graph order."""

    def __init__(self) -> None:
        self._known: dict[ir.Value, list[Element] | None] = {}

    def of(self, value: ir.Value | None) -> list[Element] | None:
        """The elements, flattened, or None where the value is no small integer vector of known length."""
        if value is None:
            return None
        if value not in self._known:
            array = small_array(value)
            integral = (
                array is not None and array.dtype.kind in "iub" and array.ndim <= 1 and array.size <= MAX_ELEMENTS
            )
            self._known[value] = (
                [int(e) for e in array]
                if integral and array is not None and array.ndim
                else ([int(array)] if integral and array is not None else None)
            )
        return self._known[value]

    def visit(self, node: ir.Node) -> None:
        """Work out the elements of the node's output from those of its inputs."""
        rule = _RULES.get(node.op_type) if node.domain == "" else None
        if rule is None:
            return
        elements = rule(self, node)
        if elements is not None and len(elements) <= MAX_ELEMENTS:
            self._known[node.outputs[0]] = elements


def _shape(symbols: Symbols, node: ir.Node) -> list[Element] | None:
    sizes = dims(node.inputs[0])
    if sizes is None:
        return None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    return list(sizes[start:end])


def _size(symbols: Symbols, node: ir.Node) -> list[Element] | None:
    sizes = dims(node.inputs[0])
    if sizes is None or not all(isinstance(d, int) for d in sizes):
        return None
    return [int(np.prod([d for d in sizes if isinstance(d, int)], dtype=np.int64))]


def _same(symbols: Symbols, node: ir.Node) -> list[Element] | None:
    return symbols.of(node.inputs[0])


def _cast(symbols: Symbols, node: ir.Node) -> list[Element] | None:
    to = node.attributes.get_int("to", 0)
    whole = {ir.DataType.INT64, ir.DataType.INT32}
    return symbols.of(node.inputs[0]) if ir.DataType(to) in whole else None


def _cast_like(symbols: Symbols, node: ir.Node) -> list[Element] | None:
    like = node.inputs[1]
    whole = {ir.DataType.INT64, ir.DataType.INT32}
    return symbols.of(node.inputs[0]) if like is not None and like.dtype in whole else None


def _gather(symbols: Symbols, node: ir.Node) -> list[Element] | None:
    data, indices = symbols.of(node.inputs[0]), symbols.of(node.inputs[1])
    if data is None or indices is None or rank(node.inputs[0]) == 0:
        return None
    picked: list[Element] = []
    for index in indices:
        if not isinstance(index, int) or not -len(data) <= index < len(data):
            return None
        picked.append(data[index])
    return picked


def _slice(symbols: Symbols, node: ir.Node) -> list[Element] | None:
    data = symbols.of(node.inputs[0])
    bounds = [symbols.of(value) for value in node.inputs[1:]]
    if data is None or any(b is None or len(b) != 1 or not isinstance(b[0], int) for b in bounds):
        return None
    numbers = [b[0] for b in bounds if b is not None and isinstance(b[0], int)]
    step = numbers[3] if len(numbers) > 3 else 1
    return data[numbers[0] : numbers[1] : step] if step > 0 else None


def _concat(symbols: Symbols, node: ir.Node) -> list[Element] | None:
    parts = [symbols.of(value) for value in node.inputs]
    return [e for part in parts if part is not None for e in part] if None not in parts else None


def _elementwise(rule: Callable[..., Element]) -> Callable[[Symbols, ir.Node], list[Element] | None]:
    def apply(symbols: Symbols, node: ir.Node) -> list[Element] | None:
        parts = [symbols.of(value) for value in node.inputs]
        if not parts or any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        length = max(len(part) for part in known)
        if any(len(part) not in (1, length) for part in known):
            return None
        return [rule(*(part[i if len(part) > 1 else 0] for part in known)) for i in range(length)]

    return apply


def _binary(sign: str, exact: Callable[[int, int], int | None], neutral: int) -> Callable[[Element, Element], Element]:
    def combine(a: Element, b: Element) -> Element:
        if isinstance(a, int) and isinstance(b, int):
            return exact(a, b)
        if a is None or b is None:
            return None
        if b == neutral:
            return a
        if a == neutral and sign in "+*":
            return b
        return f"({a}{sign}{b})"

    return combine


def _equal(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return int(a == b)
    numbers = [e for e in (a, b) if isinstance(e, int)]
    return 0 if numbers and numbers[0] < 0 and None not in (a, b) else None  # an axis size is never negative


def _where(condition: Element, a: Element, b: Element) -> Element:
    return (a if condition else b) if isinstance(condition, int) else (a if a == b else None)


_RULES: dict[str, Callable[[Symbols, ir.Node], list[Element] | None]] = {
    "Shape": _shape,
    "Size": _size,
    "Identity": _same,
    "Reshape": _same,
    "Squeeze": _same,
    "Unsqueeze": lambda symbols, node: _same(symbols, node) if rank(node.inputs[0]) == 0 or axes_of(node) else None,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Equal": _elementwise(_equal),
    "Where": _elementwise(_where),
    "Add": _elementwise(_binary("+", lambda a, b: a + b, 0)),
    "Sub": _elementwise(_binary("-", lambda a, b: a - b, 0)),
    "Mul": _elementwise(_binary("*", lambda a, b: a * b, 1)),
    "Div": _elementwise(_binary("/", lambda a, b: int(a / b) if b else None, 1)),
}
