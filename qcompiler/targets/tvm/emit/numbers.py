"""Nodes whose result is known when the model is emitted: constants, shapes, and arithmetic on them.

Numbers are numpy arrays; where they hang on open axes, of dtype object with :class:`Dim` elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Numbers = npt.NDArray[Any]

LIMIT = 4096
"""Elements beyond which nothing is computed here."""


def is_open(array: Numbers) -> bool:
    """Whether it hangs on open axes."""
    return array.dtype == object


def compute(node: ir.Node, inputs: Sequence[Numbers | None]) -> list[Numbers] | None:
    """The outputs as numbers; None where the operator is not one of shape arithmetic, or its result is large."""
    known = [array for array in inputs if array is not None]
    rule = _RULES.get(node.op_type)
    if rule is None or node.domain != "" or any(array.size > LIMIT for array in known):
        return None
    try:
        results = rule(node, inputs)
    except (TypeError, ValueError, IndexError):  # comparisons of open sizes and the like: left to the run time
        return None
    arrays = [tidy(result) for result in (results if isinstance(results, list) else [results])]
    return None if any(array.size > LIMIT for array in arrays) else arrays


def tidy(array: Any) -> Numbers:
    """int64 where an object array holds plain ints only."""
    array = np.asarray(array)
    if array.dtype == object and all(isinstance(item, int | np.integer) for item in array.flat):
        return array.astype(np.int64)
    return array


def _axes(node: ir.Node, inputs: Sequence[Numbers | None]) -> tuple[int, ...]:
    array = inputs[1] if len(inputs) > 1 else None
    assert array is not None
    return tuple(int(axis) for axis in array.reshape(-1))


def _unsqueeze(node: ir.Node, inputs: Sequence[Numbers | None]) -> Any:
    return np.expand_dims(_first(inputs), _axes(node, inputs))


def _squeeze(node: ir.Node, inputs: Sequence[Numbers | None]) -> Any:
    given = len(inputs) > 1 and inputs[1] is not None
    return np.squeeze(_first(inputs), _axes(node, inputs) if given else None)


def _cast(node: ir.Node, inputs: Sequence[Numbers | None]) -> Any:
    array, dtype = _first(inputs), ir.DataType(node.attributes.get_int("to"))
    if is_open(array):
        if dtype not in (ir.DataType.INT64, ir.DataType.INT32):
            raise TypeError
        return array
    return array.astype(dtype.numpy())


def _reshape(node: ir.Node, inputs: Sequence[Numbers | None]) -> Any:
    return _first(inputs).reshape([int(n) for n in _second(inputs)])


def _gather(node: ir.Node, inputs: Sequence[Numbers | None]) -> Any:
    return np.take(_first(inputs), _second(inputs).astype(np.int64), axis=node.attributes.get_int("axis", 0))


def _concat(node: ir.Node, inputs: Sequence[Numbers | None]) -> Any:
    return np.concatenate([a for a in inputs if a is not None], axis=node.attributes.get_int("axis", 0))


def _slice(node: ir.Node, inputs: Sequence[Numbers | None]) -> Any:
    array, starts, ends = _first(inputs), _second(inputs), inputs[2]
    assert ends is not None
    axes = inputs[3] if len(inputs) > 3 and inputs[3] is not None else np.arange(len(starts))
    steps = inputs[4] if len(inputs) > 4 and inputs[4] is not None else np.ones(len(starts), np.int64)
    where = [slice(None)] * array.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        where[int(axis)] = slice(int(start), int(end), int(step))
    return array[tuple(where)]


def _range(node: ir.Node, inputs: Sequence[Numbers | None]) -> Any:
    arrays = [np.asarray(a) for a in inputs]
    if any(a.dtype.kind not in "iu" for a in arrays):  # open, or of other than whole steps
        raise TypeError
    start, limit, step = (int(a.reshape(())) for a in arrays)
    return np.arange(start, limit, step, dtype=arrays[0].dtype)


def _divide(node: ir.Node, inputs: Sequence[Numbers | None]) -> Any:
    a, b = _first(inputs), _second(inputs)
    return a // b if is_open(a) or is_open(b) or a.dtype.kind in "iu" else a / b


def _split(node: ir.Node, inputs: Sequence[Numbers | None]) -> Any:
    axis, sizes = node.attributes.get_int("axis", 0), inputs[1] if len(inputs) > 1 else None
    places: Any = len(node.outputs) if sizes is None else np.cumsum(sizes)[:-1]
    return list(np.split(_first(inputs), places, axis))


def _first(inputs: Sequence[Numbers | None]) -> Numbers:
    assert inputs[0] is not None
    return inputs[0]


def _second(inputs: Sequence[Numbers | None]) -> Numbers:
    assert inputs[1] is not None
    return inputs[1]


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[ir.Node, Sequence[Numbers | None]], Any]:
    return lambda node, inputs: function(_first(inputs), _second(inputs))


def _closed(function: Callable[..., Any]) -> Callable[[ir.Node, Sequence[Numbers | None]], Any]:
    def rule(node: ir.Node, inputs: Sequence[Numbers | None]) -> Any:
        if any(a is not None and is_open(a) for a in inputs):
            raise TypeError
        return function(*inputs)

    return rule


_RULES: dict[str, Callable[[ir.Node, Sequence[Numbers | None]], Any]] = {
    "Identity": lambda node, inputs: _first(inputs),
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Cast": _cast,
    "Reshape": _reshape,
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "Range": _range,
    "Split": _split,
    "Add": _binary(lambda a, b: a + b),
    "Sub": _binary(lambda a, b: a - b),
    "Mul": _binary(lambda a, b: a * b),
    "Div": _divide,
    "Neg": lambda node, inputs: -_first(inputs),
    "Equal": _closed(np.equal),
    "Where": _closed(np.where),
    "Sqrt": _closed(np.sqrt),
    "Max": _closed(np.maximum),
    "Min": _closed(np.minimum),
    "Expand": _closed(lambda a, shape: np.broadcast_to(a, np.broadcast_shapes(a.shape, tuple(shape)))),
    "ReduceProd": _closed(lambda a, *rest: np.asarray(np.prod(a))),
}
