"""What a residual stream is made of: connected values, norms that read it, tables and convolutions that write it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from qcompiler.graph.edit import array_of, sole_user
from qcompiler.graph.functions import is_call
from qcompiler.graph.rules.patterns import axes_of

_MOVES = ("Identity", "Slice", "Gather", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Expand")


def connected(start: ir.Value, beside: Callable[[ir.Value], Iterable[ir.Value]]) -> dict[ir.Value, None]:
    """All values that are reached from one, in the order found; ``beside`` tells a value's own, and is asked once."""
    members: dict[ir.Value, None] = {start: None}
    pending = [start]
    while pending:
        for other in beside(pending.pop()):
            if other not in members:
                members[other] = None
                pending.append(other)
    return members


def norm_parts(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None, float]:
    """Weight, bias and epsilon of a norm."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    return node.inputs[1], bias, epsilon


def is_norm(node: ir.Node) -> bool:
    """A norm over the last axis whose weight and bias are constant vectors and whose other outputs nobody reads."""
    if is_call(node, "RMSNorm"):
        return _is_vector(node.inputs[1])
    if node.op_type != "LayerNormalization" or node.domain != "":
        return False
    x, axis = node.inputs[0], node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    last = axis == -1 or (x is not None and x.shape is not None and axis == len(x.shape) - 1)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    spare = any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
    return last and _is_vector(node.inputs[1]) and (bias is None or _is_vector(bias)) and not spare


def _is_vector(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and not value.is_graph_input() and len(value.shape or ()) == 1


def is_table(node: ir.Node) -> bool:
    """Whether a Gather picks rows of a constant matrix."""
    if node.op_type != "Gather" or node.domain != "":
        return False
    data = node.inputs[0]
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    constant = data is not None and data.is_initializer() and not data.is_graph_input()
    return constant and axis == 0 and data is not None and len(data.shape or ()) == 2


def conv_behind(node: ir.Node) -> ir.Node | None:
    """The convolution whose output channels this Transpose puts last, over flattened positions."""
    if node.op_type != "Transpose" or node.domain != "" or "perm" not in node.attributes:
        return None
    value, perm = node.inputs[0], list(node.attributes["perm"].as_ints())
    if perm != [0, *range(2, len(perm)), 1]:
        return None
    before = value.producer() if value is not None else None
    if before is not None and before.op_type in ("Reshape", "Flatten") and before.domain == "":
        inner = before.inputs[0]
        if sole_user(value) is not node or inner is None or not _keeps_second_axis(inner, before.outputs[0]):
            return None
        node, value, before = before, inner, inner.producer()
    if before is None or before.op_type != "Conv" or before.domain != "" or sole_user(value) is not node:
        return None
    grouped = "group" in before.attributes and before.attributes["group"].as_int() != 1
    return None if grouped or any(array_of(v) is None for v in before.inputs[1:]) else before


def _keeps_second_axis(before: ir.Value, after: ir.Value) -> bool:
    if before.shape is None or after.shape is None or len(before.shape) < 2 or len(after.shape) < 2:
        return False
    return before.shape[0] == after.shape[0] and isinstance(after.shape[1], int) and before.shape[1] == after.shape[1]


def width(value: ir.Value | None) -> int | None:
    """Size of the last axis where it is known; 0 for a scalar."""
    if value is None or value.shape is None:
        return None
    if len(value.shape) == 0:
        return 0
    last = value.shape[-1]
    return last if isinstance(last, int) else None


def adds_positions(node: ir.Node) -> bool:
    """Whether the node adds up over axes other than the last, the channels."""
    rank = len(node.inputs[0].shape or ()) if node.op_type == "ReduceSum" and node.inputs[0] is not None else 0
    axes = axes_of(node) if rank else None
    return axes is not None and not {-1, rank - 1} & set(axes)


def moves(node: ir.Node, channels: int) -> bool:
    """Whether the node moves or picks positions and leaves the channels, on the last axis, alone."""
    if node.domain != "" or node.op_type not in _MOVES:
        return False
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or y.shape is None or width(x) != channels or width(y) != channels:
        return False
    rank = len(x.shape)
    if node.op_type == "Transpose":
        perm = node.attributes.get("perm")
        return perm is not None and perm.as_ints()[-1] == rank - 1
    if node.op_type == "Gather":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        return axis not in (-1, rank - 1)
    if node.op_type == "Slice":
        axes = array_of(node.inputs[3]) if len(node.inputs) > 3 else None
        return axes is not None and not {-1, rank - 1} & set(axes.tolist())
    return True  # Reshape too: where the last axis keeps its size, rows stay rows
