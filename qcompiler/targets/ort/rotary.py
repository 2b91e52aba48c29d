"""Rotary embeddings to ONNX's RotaryEmbedding (opset 23): 64 µs against 250 µs in plain operators on 512 x 576."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.graph.edit import array_of, replace_value
from qcompiler.graph.functions import is_call
from qcompiler.graph.shapes import Facts
from qcompiler.targets.ort.emit import Emitter


class Rotations:
    """Lowers RotaryEmbedding calls; the tables are prepared once for all layers.

    The operator reads one half of cos and sin, [B, S, D/2], where the function reads both, broadcast to [B, H, S, D]:
    it is used only where the halves are proved equal.
    """

    def __init__(self, emit: Emitter, facts: Facts) -> None:
        self.emit = emit
        self.facts = facts
        self._halves: dict[ir.Value, ir.Value] = {}

    def lowers(self, call: ir.Node) -> bool:
        """Whether the operator can stand for this call."""
        for table in call.inputs[1:]:
            fact = self.facts.get(table.name or "") if table is not None else None
            if fact is None or len(fact.shape) not in (2, 4) or (len(fact.shape) == 4 and fact.shape[1] != 1):
                return False
            if not equal_halves(table, self.facts):
                return False
        return True

    def rotate(self, before: ir.Node, call: ir.Node, value: ir.Value, heads: int | None) -> ir.Value:
        """``value`` rotated as the call says.

        Args:
            before: where the operator goes.
            call: a RotaryEmbedding call that :meth:`lowers`.
            value: [B, S, H·D] with ``heads`` = H, or [B, H, S, D] with ``heads`` None.
        """
        tables = [self._half(before, table, value) for table in call.inputs[1:] if table is not None]
        attributes = {} if heads is None else {"num_heads": heads}
        return self.emit("RotaryEmbedding", before, [value, *tables], **attributes)

    def lower_rest(self, graph: ir.Graph) -> None:
        """Lower the calls that are left, on [B, H, S, D]: those whose result is more than an operand of attention."""
        for call in [node for node in graph if is_call(node, "RotaryEmbedding")]:
            value, old = call.inputs[0], call.outputs[0]
            fact = self.facts.get(value.name or "") if value is not None else None
            if value is None or fact is None or len(fact.shape) != 4 or not old.uses() or not self.lowers(call):
                continue
            new = self.rotate(call, call, value, None)
            new.type, new.shape = old.type, old.shape
            replace_value(old, new)
            graph.remove(call, safe=True)

    def _half(self, before: ir.Node, table: ir.Value, value: ir.Value) -> ir.Value:
        """[B or 1, 1, S, D] or [S, D] to the [B, S, D/2] that the operator reads."""
        if table not in self._halves:
            emit, shape = self.emit, self.facts[table.name or ""].shape
            zero, last = emit.constant("zero", [0]), emit.constant("last_axis", [-1])
            middle = emit.constant(f"half_{shape[-1]}", [shape[-1] // 2])
            half = emit("Slice", before, [table, zero, middle, last])
            if len(shape) == 4:
                half = emit("Squeeze", before, [half, emit.constant("one", [1])])
            else:
                half = emit("Unsqueeze", before, [half, zero])
            batch = emit("Shape", before, [value], start=0, end=1)
            target = emit("Concat", before, [batch, emit.constant("ones_2", [1, 1])], axis=0)
            self._halves[table] = emit("Expand", before, [half, target])
        return self._halves[table]


def equal_halves(value: ir.Value | None, facts: Facts) -> bool:
    """Whether the two halves of the last axis are proved equal, as in Concat(f, f): one half then says it all."""
    if value is None:
        return False
    array = array_of(value)
    if array is not None:
        middle = array.shape[-1] // 2 if array.ndim else 0
        return bool(middle and (array[..., :middle] == array[..., middle:]).all())
    node, fact = value.producer(), facts.get(value.name or "")
    if node is None or fact is None or not fact.shape:
        return False
    if node.op_type == "Concat" and len(node.inputs) == 2:
        axis = node.attributes.get_int("axis")
        return node.inputs[0] is node.inputs[1] and axis in (-1, len(fact.shape) - 1)
    if node.op_type in _LAST_AXIS_KEPT or (node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0):
        data = node.inputs[0]
        before = facts.get(data.name or "") if data is not None else None
        kept = before is not None and len(before.shape) > 0 and before.shape[-1] == fact.shape[-1]
        return kept and equal_halves(data, facts)
    if node.op_type in ("Mul", "Div"):
        scalars = [v for v in node.inputs if v is not None and (a := array_of(v)) is not None and a.size == 1]
        others = [v for v in node.inputs if v not in scalars]
        return len(others) == 1 and equal_halves(others[0], facts)
    return False


_LAST_AXIS_KEPT = frozenset({"Cos", "Sin", "Cast", "Identity", "Unsqueeze", "Squeeze", "Expand"})
