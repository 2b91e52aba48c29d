"""Batched experts, whose weights are gathered for each row, become one Linear an expert on the rows that chose it.

Exporters can trace a mixture of experts only as ``MatMul(GatherND(W[experts, out, in], ids), x)``: each row multiplies
a copy of its expert's matrix. What is left behind is the same sum over the same numbers:

    order, inverse, counts = SortByExpert(ids)
    rows_0, rows_1 … = Split(order, counts)
    y_e = MatMul(Gather(x, rows_e), W_e)
    y = Gather(Concat(y_0, y_1 …), inverse)
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompiler.core import DOMAIN
from qcompiler.graph.edit import sole_user
from qcompiler.graph.rules.patterns import axes_of, dims, made_by, rank
from qcompiler.graph.rules.rewriter import PARAMETER, Rewriter
from qcompiler.graph.stored import item, on_disk, transposed


@dataclasses.dataclass(frozen=True)
class _Batched:
    """y[r] = W[ids[r]] x[r], with x [rows, in], y [rows, out], ids [rows]."""

    weight: ir.Value
    ids: ir.Value
    x: ir.Value
    y: ir.Value
    turned: bool  # W is [experts, out, in]


def raise_experts(rewriter: Rewriter) -> None:
    """Rewrite each product with gathered matrices; projections that share ``ids`` share their order."""
    orders: dict[ir.Value, tuple[list[ir.Value], ir.Value]] = {}
    for node in rewriter.nodes("MatMul"):
        found = _read(node)
        if found is not None:
            _rewrite(rewriter, node, found, orders)


def _read(node: ir.Node) -> _Batched | None:
    for place in (0, 1):
        gathered = _gathered(node.inputs[place])
        x = _added_axis(node.inputs[1 - place], axis=-1 if place == 0 else 1)
        back = sole_user(node.outputs[0])
        if gathered is None or x is None or back is None or back.op_type != "Squeeze" or back.domain != "":
            continue
        if rank(x) == 2 and axes_of(back) in ([[2], [-1]] if place == 0 else [[1], [-2]]):
            return _Batched(*gathered, x, back.outputs[0], turned=place == 0)
    return None


def _gathered(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """(W [experts, a, b], ids [rows]), where the value is W[ids], of a constant W and computed ids."""
    node = made_by(value, "GatherND", "Gather")
    if node is None:
        return None
    weight, ids = node.inputs
    if weight is None or ids is None or not weight.is_initializer() or weight.is_graph_input() or rank(weight) != 3:
        return None
    if weight.dtype is None or not weight.dtype.is_floating_point():
        return None
    if node.op_type == "GatherND":
        ids = _added_axis(ids, axis=-1) if node.attributes.get_int("batch_dims", 0) == 0 else None
    elif node.attributes.get_int("axis", 0) != 0:
        return None
    if ids is None or rank(ids) != 1 or ids.dtype != ir.DataType.INT64 or ids.is_initializer():
        return None
    return weight, ids


def _added_axis(value: ir.Value | None, axis: int) -> ir.Value | None:
    """What the value was before Unsqueeze put an axis of 1 there (counted in the wider shape)."""
    node = made_by(value, "Unsqueeze")
    axes, wide = (axes_of(node), rank(value)) if node is not None else (None, None)
    if node is None or axes is None or wide is None or [a % wide for a in axes] != [axis % wide]:
        return None
    return node.inputs[0]


def _rewrite(
    rewriter: Rewriter, node: ir.Node, found: _Batched, orders: dict[ir.Value, tuple[list[ir.Value], ir.Value]]
) -> None:
    sizes = dims(found.weight)
    assert sizes is not None
    experts = sizes[0]
    assert isinstance(experts, int)
    if found.ids not in orders:
        orders[found.ids] = _order(rewriter, node, found.ids, experts)
    rows, inverse = orders[found.ids]
    products = []
    for expert, chosen in enumerate(rows):
        weight = _weight(rewriter, found, expert)
        assert weight.shape is not None
        wide, narrow = ir.Shape([None, weight.shape[0]]), ir.Shape([None, weight.shape[1]])
        x = rewriter.insert(node, "Gather", [found.x, chosen], {"axis": 0}, shape=wide)
        products.append(rewriter.insert(node, "MatMul", [x, weight], shape=narrow))
    together = rewriter.insert(node, "Concat", products, {"axis": 0}, shape=found.y.shape)
    rewriter.replace(found.y, "Gather", [together, inverse], {"axis": 0})


def _order(rewriter: Rewriter, node: ir.Node, ids: ir.Value, experts: int) -> tuple[list[ir.Value], ir.Value]:
    """Before ``node``: the rows of each expert, and where each row is to be found once they lie by expert."""
    order = rewriter.insert(
        node, "SortByExpert", [ids], {"experts": experts}, domain=DOMAIN, shape=ids.shape, outputs=3
    )
    call = order.producer()
    assert call is not None
    inverse, counts = call.outputs[1:]
    for value, shape in ((inverse, ids.shape), (counts, ir.Shape([experts]))):
        value.type, value.shape = order.type, shape
    first = rewriter.insert(node, "Split", [order, counts], {"axis": 0}, outputs=experts)
    split = first.producer()
    assert split is not None
    for value in split.outputs:
        value.type, value.shape = order.type, ir.Shape([None])
    return list(split.outputs), inverse


def _weight(rewriter: Rewriter, found: _Batched, expert: int) -> ir.Value:
    """The expert's matrix [in, out] as an initializer of its own; on disk it stays there."""
    source, maps = found.weight, f"item:{expert}"
    tensor = source.const_value
    assert tensor is not None
    part = item(tensor, expert) if on_disk(tensor) else ir.tensor(np.array(tensor.numpy()[expert]))
    if found.turned:
        maps += ",transpose"
        part = transposed(part) if on_disk(part) else ir.tensor(np.ascontiguousarray(part.numpy().T))
    source.metadata_props.setdefault(PARAMETER, source.name or "experts")
    return rewriter.tensor(f"{source.name}.{expert}", part, like=source, map_=maps)
