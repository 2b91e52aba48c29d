"""Constants and index arithmetic: fold what is known, make targets of Reshape and Expand constant, drop no-ops.

One walk in graph order. Float initializers are parameters and never folded: rules that understand them do that and keep
their names.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.reference.ops
import onnx_ir as ir

from qcompiler.graph.functions import OPSET
from qcompiler.graph.rules.patterns import SMALL, SMALL_MASK, rank, small_array
from qcompiler.graph.rules.reshapes import NO_OPS
from qcompiler.graph.rules.rewriter import Rewriter
from qcompiler.graph.rules.symbols import Symbols

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
        if node.domain == "" and (rule := NO_OPS.get(node.op_type)) is not None:
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
    if node.op_type in _GROWING and _grown(node, arrays) > SMALL_MASK:
        return False
    result = _evaluate(node, arrays)
    if not isinstance(result, (np.ndarray, np.generic)):
        return False
    if result.size > (SMALL if result.dtype.kind not in "iub" else SMALL_MASK):
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
    return SMALL_MASK + 1


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
    """Folded values that subgraphs read: an initializer of the outer graph is visible there."""
    for value, array in list(known.items()):
        nested = any(user.graph is not rewriter.graph for user, _ in value.uses())
        if nested and not value.is_initializer() and not value.is_graph_output():
            rewriter.stand_in(value, array)
