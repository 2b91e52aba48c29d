"""Constants and index arithmetic: fold what is known, make targets of Reshape and Expand constant, drop no-ops.

One walk in graph order. Float initializers are parameters and never folded: rules that understand them do that and keep
their names.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.reference.ops
import onnx_ir as ir

from qcompiler.graph.functions import OPSET
from qcompiler.graph.rules.rewriter import SMALL, Rewriter, axes_of, dims, made_by, number, rank, small_array
from qcompiler.graph.rules.symbols import Element, Symbols

_NEVER_FOLDED = {"Constant", "QuantizeLinear", "DequantizeLinear", "If", "Loop", "Scan", "SequenceMap"}
_GROWING = {"Expand", "Tile", "ConstantOfShape", "Range", "OneHot", "Pad", "Resize"}


def simplify(rewriter: Rewriter) -> None:
    """Fold constants, resolve shapes and remove operators that do nothing, in one walk."""
    symbols = Symbols()
    known: dict[ir.Value, npt.NDArray[Any]] = {}
    for node in list(rewriter.graph):
        if node.graph is None:
            continue
        if node.op_type == "Constant" and node.domain == "":
            _lift(rewriter, node, known)
            continue
        if _fold(node, known):
            continue
        _use_known(rewriter, node, known)
        if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()):
            continue
        symbols.visit(node)
        elements = symbols.of(node.outputs[0]) if len(node.outputs) == 1 and _is_index(node.outputs[0]) else None
        if elements is not None and all(isinstance(e, int) for e in elements):
            size = rank(node.outputs[0])
            if size is not None and size <= 1 and node.outputs[0].dtype is not None:
                array = np.array(elements, dtype=node.outputs[0].dtype.numpy())
                known[node.outputs[0]] = array.reshape(()) if size == 0 else array
                continue
        if node.domain == "" and (rule := _RULES.get(node.op_type)) is not None:
            rule(rewriter, node, symbols)
    _use_known_elsewhere(rewriter, known)


def _is_index(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.INT64, ir.DataType.INT32)


# --- folding ---


def _lift(rewriter: Rewriter, node: ir.Node, known: dict[ir.Value, npt.NDArray[Any]]) -> None:
    """A Constant: a small one is known, a large one (somebody's weight) becomes an initializer of its value's name."""
    value = node.outputs[0]
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING or value.is_graph_output():
        return
    if tensor.size <= SMALL:
        known[value] = tensor.numpy()
        return
    rewriter.stand_in(value, tensor.numpy())


def _fold(node: ir.Node, known: dict[ir.Value, npt.NDArray[Any]]) -> bool:
    """Evaluate a node whose inputs are all known; its output is then known, and the node dies for want of users."""
    if (
        node.domain != ""
        or len(node.outputs) != 1
        or node.op_type in _NEVER_FOLDED
        or node.op_type.startswith("Random")
    ):
        return False
    arrays = [_index_constant(value, known) for value in node.inputs]
    if not arrays or any(a is None and v is not None for a, v in zip(arrays, node.inputs, strict=True)):
        if node.op_type != "CastLike" or arrays[0] is None or node.inputs[1] is None or node.inputs[1].dtype is None:
            return False
        known[node.outputs[0]] = arrays[0].astype(node.inputs[1].dtype.numpy())
        return True
    if node.outputs[0].is_graph_output():
        return False
    if node.op_type in _GROWING and _grown(node, arrays) > SMALL:
        return False
    result = _evaluate(node, arrays)
    if not isinstance(result, (np.ndarray, np.generic)) or result.size > SMALL:
        return False
    known[node.outputs[0]] = np.asarray(result)
    return True


def _index_constant(value: ir.Value | None, known: dict[ir.Value, npt.NDArray[Any]]) -> npt.NDArray[Any] | None:
    """Known numbers; an initializer counts if it holds integers, or is one number."""
    if value is None:
        return None
    if value not in known and value.is_initializer():
        array = small_array(value)
        if array is None or not (array.dtype.kind in "iub" or array.ndim == 0):
            return None
        known[value] = array
    return known.get(value)


def _grown(node: ir.Node, arrays: Sequence[npt.NDArray[Any] | None]) -> int:
    numbers = [a.astype(np.float64) for a in arrays if a is not None]
    if node.op_type == "Range":
        start, limit, step = (float(a.reshape(())) for a in numbers[:3])
        return int(abs(limit - start) / max(abs(step), 1e-30)) + 1
    if node.op_type == "ConstantOfShape":
        return int(np.prod(numbers[0]))
    if node.op_type in ("Expand", "Tile"):
        return int(max(numbers[0].size, 1) * np.prod(np.maximum(numbers[1], 1)))
    return SMALL + 1


@functools.cache
def _operator(op_type: str) -> Any:
    return onnx.reference.ops.load_op("", op_type, OPSET)


def _evaluate(node: ir.Node, arrays: Sequence[npt.NDArray[Any] | None]) -> Any:
    attributes = {}
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            return None
        tensor = attribute.type == ir.AttributeType.TENSOR
        attributes[name] = ir.to_proto(attribute.as_tensor()) if tensor else attribute.value
    with contextlib.suppress(Exception), np.errstate(all="ignore"):  # what cannot be evaluated is simply not folded
        return _operator(node.op_type).eval(*arrays, **attributes)
    return None


def _use_known(rewriter: Rewriter, node: ir.Node, known: dict[ir.Value, npt.NDArray[Any]]) -> None:
    for index, value in enumerate(node.inputs):
        if value is None or value not in known or value.is_initializer():
            continue
        array = known[value]
        if array.dtype.kind in "iub" or array.size == 1:
            node.replace_input_with(index, rewriter.constant(array, value.name or "constant"))
        elif not value.is_graph_output():
            known[rewriter.stand_in(value, array)] = array  # a float vector may be a bias: one initializer for each


def _use_known_elsewhere(rewriter: Rewriter, known: dict[ir.Value, npt.NDArray[Any]]) -> None:
    """Folded values that subgraphs read, or nodes visited before: give them an initializer as well."""
    for value, array in known.items():
        if value.is_initializer() or not value.uses() or value.is_graph_output():
            continue
        producer = value.producer()
        if producer is None or all(user.graph is rewriter.graph for user, _ in value.uses()):
            readers = [user for user, _ in value.uses() if user.outputs[0] not in known]
            if not readers:
                continue
        value.replace_all_uses_with(rewriter.constant(array, value.name or "constant"))


# --- operators that do nothing, and targets that are known ---


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
    """x, where this is Reshape(Transpose(Reshape(x, [-1, S, D]), [0, 2, 1]), [..., D, S]): the last two axes swapped."""
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


_RULES: dict[str, Callable[[Rewriter, ir.Node, Symbols], None]] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Transpose": _transpose,
    "Reshape": _reshape,
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
