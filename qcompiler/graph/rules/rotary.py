"""RotaryEmbedding from x·cos + rotate_half(x)·sin (Su et al., "RoFormer", 2021, in the half-split form of GPT-NeoX)."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.core import DOMAIN
from qcompiler.graph.edit import users
from qcompiler.graph.rules.patterns import axes_of, dims, last_dim, made_by, other_input, rank, small_array
from qcompiler.graph.rules.rewriter import Rewriter


def raise_rotary(rewriter: Rewriter) -> None:
    """Each Concat(-second half, first half) of x whose product with sin is added to x · cos."""
    for node in rewriter.nodes("Concat"):
        x = rotated_half(node)
        if x is None:
            continue
        for product in users(node.outputs[0]):
            sin = other_input(product, node.outputs[0]) if product.op_type == "Mul" else None
            if sin is not None and product.domain == "":
                _raise(rewriter, x, product, sin)


def _raise(rewriter: Rewriter, x: ir.Value, product: ir.Node, sin: ir.Value) -> None:
    for add in users(product.outputs[0]):
        if add.op_type != "Add" or add.domain != "":
            continue
        straight = made_by(other_input(add, product.outputs[0]), "Mul")
        if straight is None or x not in straight.inputs:
            continue
        cos = other_input(straight, x)
        if cos is not None and _broadcasts(x, cos) and _broadcasts(x, sin):
            rewriter.replace(add.outputs[0], "RotaryEmbedding", [x, cos, sin], domain=DOMAIN)
            return


def _broadcasts(x: ir.Value, table: ir.Value) -> bool:
    """Whether cos or sin is [B or 1, 1, S, D] for x [B, H, S, D]; leading axes may be missing."""
    sizes = dims(table)
    if rank(x) != 4 or sizes is None or not 2 <= len(sizes) <= 4 or last_dim(table) != last_dim(x):
        return False
    return len(sizes) < 3 or sizes[-3] == 1


def rotated_half(node: ir.Node) -> ir.Value | None:
    """x, where the Concat is rotate_half(x) on the last axis; x must have a static, even last axis."""
    if len(node.inputs) != 2:
        return None
    negated = made_by(node.inputs[0], "Neg")
    if negated is None:
        return None
    second, first = negated.inputs[0], node.inputs[1]
    if second is None or first is None:
        return None
    x = _halves_of_split(first, second) or _halves_of_slices(first, second)
    size = last_dim(x)
    axis = node.attributes.get_int("axis", 0)
    if x is None or size is None or size % 2 or axis not in (-1, (rank(x) or 0) - 1):
        return None
    return x


def _halves_of_split(first: ir.Value, second: ir.Value) -> ir.Value | None:
    node = first.producer()
    if node is None or node is not second.producer() or node.op_type != "Split" or len(node.outputs) != 2:
        return None
    x = node.inputs[0]
    sizes = small_array(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if (first.index(), second.index()) != (0, 1) or node.attributes.get_int("axis", 0) not in (-1, (rank(x) or 0) - 1):
        return None
    return x if sizes is None or sizes[0] == sizes[1] else None


def _halves_of_slices(first: ir.Value, second: ir.Value) -> ir.Value | None:
    low, high = made_by(first, "Slice"), made_by(second, "Slice")
    if low is None or high is None or low.inputs[0] is not high.inputs[0]:
        return None
    x = low.inputs[0]
    size = last_dim(x)
    if size is None:
        return None
    return x if _bounds(low) == (0, size // 2) and _bounds(high) == (size // 2, size) else None


def _bounds(node: ir.Node) -> tuple[int, int] | None:
    """(start, end) of a Slice along the last axis with step 1."""
    x = node.inputs[0]
    size, arrays = last_dim(x), [small_array(value) for value in node.inputs[1:]]
    if size is None or len(arrays) < 2 or any(a is None or a.size != 1 for a in arrays):
        return None
    axes = axes_of(node, 3)
    if axes is None or axes[0] not in (-1, (rank(x) or 0) - 1):
        return None
    if len(arrays) > 3 and int(arrays[3].reshape(())) != 1:  # type: ignore[union-attr]
        return None
    start, end = (int(a.reshape(())) for a in arrays[:2] if a is not None)
    start, end = (max(v + size, 0) if v < 0 else min(v, size) for v in (start, end))
    return start, end
