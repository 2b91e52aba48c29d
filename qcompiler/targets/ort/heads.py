"""Attention's operands in their two layouts: [B, H, S, D] in the canonical graph, [B, S, H·D] in the fast operators.

ONNX Runtime's Attention takes either, and transposes inside for the second at a third of what four Transpose nodes cost
(8 x 128 tokens, 12 heads of 32: 2.4 ms against 3.5 ms).
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qcompiler.graph.edit import sole_user
from qcompiler.graph.functions import is_call
from qcompiler.graph.shapes import Facts


@dataclasses.dataclass(frozen=True)
class Operand:
    """One of q, k, v, traced back.

    Attributes:
        value: [B, H, S, D] as attention reads it, GQA's repeat and the rotation taken off.
        rows: [B, S, H, D] (or the [B, S, H·D] it is a view of) where value is its transpose; None where it is not.
        count: H, before any repeat.
        rotation: the RotaryEmbedding call that stood between, or None.
    """

    value: ir.Value
    rows: ir.Value | None
    count: int
    rotation: ir.Node | None = None


def trace(value: ir.Value, facts: Facts, rotation: ir.Node | None = None) -> Operand:
    """Follow q, k or v upwards as far as is understood."""
    repeated = _before_repeat(value, facts)
    if repeated is not None:
        return trace(repeated, facts, rotation)
    node = value.producer()
    if rotation is None and node is not None and is_call(node, "RotaryEmbedding") and node.inputs[0] is not None:
        return trace(node.inputs[0], facts, node)
    count = facts[value.name or ""].shape[1]
    if node is None or node.op_type != "Transpose" or _perm(node) != (0, 2, 1, 3):
        return Operand(value, None, count, rotation)
    rows = node.inputs[0]
    assert rows is not None
    return Operand(value, _flat_source(rows, facts) or rows, count, rotation)


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("perm", ()))


def _before_repeat(value: ir.Value, facts: Facts) -> ir.Value | None:
    """x for ``Reshape(Expand(Unsqueeze(x, 2)))``, which repeats each of x's heads next to itself; else None."""
    chain = []
    for op_type in ("Reshape", "Expand", "Unsqueeze"):
        node = value.producer()
        if node is None or node.op_type != op_type or node.inputs[0] is None:
            return None
        chain.append(facts.get(value.name or ""))
        value = node.inputs[0]
    reshaped, expanded, unsqueezed = chain
    x = facts.get(value.name or "")
    if x is None or reshaped is None or expanded is None or unsqueezed is None or len(x.shape) != 4:
        return None
    b, h, s, d = x.shape
    if unsqueezed.shape != (b, h, 1, s, d) or len(expanded.shape) != 5:
        return None
    n = expanded.shape[2]
    return value if expanded.shape == (b, h, n, s, d) and reshaped.shape == (b, h * n, s, d) else None


def _flat_source(rows: ir.Value, facts: Facts) -> ir.Value | None:
    """The [B, S, H·D] value that rows [B, S, H, D] is a view of, if it is one."""
    node, fact = rows.producer(), facts.get(rows.name or "")
    if node is None or node.op_type != "Reshape" or node.inputs[0] is None or fact is None:
        return None
    source = facts.get(node.inputs[0].name or "")
    b, s, h, d = fact.shape
    return node.inputs[0] if source is not None and source.shape == (b, s, h * d) else None


def merged_output(call: ir.Node, facts: Facts) -> ir.Value | None:
    """The [B, S, H·D] value that the graph makes of an attention's output, if that is all it does with it."""
    transpose = sole_user(call.outputs[0])
    if transpose is None or transpose.op_type != "Transpose" or _perm(transpose) != (0, 2, 1, 3):
        return None
    reshape = sole_user(transpose.outputs[0])
    if reshape is None or reshape.op_type != "Reshape":
        return None
    before, after = (facts.get(node.outputs[0].name or "") for node in (transpose, reshape))
    if before is None or after is None:
        return None
    b, s, h, d = before.shape
    return reshape.outputs[0] if after.shape == (b, s, h * d) else None
