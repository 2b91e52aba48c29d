"""The mixture of experts that QMoE computes, found around the projections of its experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from qcompiler.graph.edit import sole_user, users
from qcompiler.graph.experts import Projection
from qcompiler.graph.rules.patterns import axes_of, dims, last_dim, made_by, rank

_ACTIVATION = "QMoE wants silu(gate) * up between the experts' two projections"
_ROWS = "QMoE wants each row as often as experts are chosen for it"
_SUM = "QMoE weighs the experts' results and adds them up"


class Unfit(Exception):
    """Why QMoE cannot compute these experts."""


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """y[t] = Σ_j weights[t, j] · down_e(silu(gate_e(x[t])) · up_e(x[t])), e = ids[t, j].

    Attributes:
        first: gate and up, in two halves of its output; second: down.
        gate: which half is the gate, 0 or 1.
        x: [rows, hidden]; weights: float, and ids: int64 [rows, k].
        last: the node that computes y.
    """

    first: Projection
    second: Projection
    gate: int
    x: ir.Value
    weights: ir.Value
    ids: ir.Value
    last: ir.Node


def mixture_of(group: Sequence[Projection]) -> Mixture:
    """What the projections of the same experts compute together.

    Raises:
        Unfit: it is nothing that QMoE computes.
    """
    if len(group) != 2:
        raise Unfit("QMoE wants two projections an expert, gate and up in one")
    first, second = group
    gate, product = _gated(first.output)
    if product is not second.x:
        raise Unfit(_ACTIVATION)
    x, k = _repeated(first.x)
    weights, last = _weighed(second.output, k)
    return Mixture(first, second, gate, x, weights, _choice(first.ids, k), last)


def _choice(ids: ir.Value, k: int) -> ir.Value:
    """The k experts of each row, int64 [rows, k]."""
    flat = made_by(ids, "Reshape")
    choice = flat.inputs[0] if flat is not None else None
    top = choice.producer() if choice is not None else None
    if choice is None or top is None or top.op_type != "TopK" or choice is not top.outputs[1]:
        raise Unfit("QMoE takes no expert twice for a row, and only a choice by one TopK is sure not to")
    if rank(choice) != 2 or last_dim(choice) != k:
        raise Unfit(_ROWS)
    return choice


def _gated(output: ir.Value) -> tuple[int, ir.Value]:
    """Which half of the output is the gate, and silu(gate) · up."""
    split = sole_user(output)
    halves = split.outputs if split is not None and split.op_type == "Split" and len(split.outputs) == 2 else ()
    for gate, half in enumerate(halves):
        up = halves[1 - gate]
        silu = _times_sigmoid(half)
        product = sole_user(silu) if silu is not None and last_dim(half) == last_dim(up) else None
        if product is not None and product.op_type == "Mul" and set(product.inputs) == {silu, up}:
            return gate, product.outputs[0]
    raise Unfit(_ACTIVATION)


def _times_sigmoid(value: ir.Value) -> ir.Value | None:
    """value · sigmoid(value), where it is computed."""
    for node in users(value):
        product = sole_user(node.outputs[0]) if node.op_type == "Sigmoid" else None
        if product is not None and product.op_type == "Mul" and set(product.inputs) == {value, node.outputs[0]}:
            return product.outputs[0]
    return None


def _repeated(value: ir.Value) -> tuple[ir.Value, int]:
    """(x, k), where the value's rows are those of x [rows, hidden], each k times in a row."""
    flat = made_by(value, "Reshape")
    wide = made_by(flat.inputs[0], "Expand") if flat is not None else None
    lone = made_by(wide.inputs[0], "Unsqueeze") if wide is not None else None
    sizes = dims(wide.outputs[0]) if wide is not None else None
    if lone is None or sizes is None or lone.inputs[0] is None or rank(lone.inputs[0]) != 2 or axes_of(lone) != [1]:
        raise Unfit(_ROWS)
    k = sizes[1]
    if not isinstance(k, int) or len(sizes) != 3 or sizes[2] != last_dim(value) or rank(value) != 2:
        raise Unfit(_ROWS)
    return lone.inputs[0], k


def _weighed(output: ir.Value, k: int) -> tuple[ir.Value, ir.Node]:
    """(weights [rows, k], the node that computes Σ_j weights[·, j] · output[j-th of the row])."""
    product = sole_user(output)
    reshape = sole_user(product.outputs[0]) if product is not None and product.op_type == "Mul" else None
    total = sole_user(reshape.outputs[0]) if reshape is not None and reshape.op_type == "Reshape" else None
    if product is None or reshape is None or total is None or total.op_type != "ReduceSum":
        raise Unfit(_SUM)
    column = made_by(next(value for value in product.inputs if value is not output), "Unsqueeze")
    flat = made_by(column.inputs[0], "Reshape") if column is not None else None
    weights = flat.inputs[0] if flat is not None else None
    if column is None or weights is None or rank(weights) != 2 or last_dim(weights) != k:
        raise Unfit(_SUM)
    summed = axes_of(total) == [1] and total.attributes.get_int("keepdims", 1) == 0
    sizes = dims(reshape.outputs[0])
    if not summed or rank(column.outputs[0]) != 2 or sizes is None or sizes[1:] != [k, last_dim(output)]:
        raise Unfit(_SUM)
    return weights, total
