"""The view of batched experts: a projection of all of them, and the rows that one reads; or all of them on all rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import add_initializer, array_of, insert_node, remove_dead, replace_value, sole_user, users
from qcompiler.graph.functions import FAKE_QUANT, is_call
from qcompiler.graph.linear import Linear, as_linear

_BY_ROW = ("Add", "Sub", "Mul", "Div")


@dataclasses.dataclass(frozen=True)
class Projection:
    """One projection of a mixture of experts (see ``rules.experts``): output[r] = W[ids[r]] x[r].

    Attributes:
        sort: the SortByExpert call on ids [rows].
        x: [rows, in], and output: [rows, out].
        linears: of each expert, in their order; they read Gather(x, rows of the expert).
    """

    sort: ir.Node
    x: ir.Value
    output: ir.Value
    linears: tuple[Linear, ...]

    @property
    def ids(self) -> ir.Value:
        ids = self.sort.inputs[0]
        assert ids is not None
        return ids


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Some rows of a value [rows, channels].

    Attributes:
        source: the whole value.
        rows: int64 [n], which rows of it.
        inverse: of the SortByExpert that chose them; int64, as long as the source.
    """

    source: ir.Value
    rows: ir.Value
    inverse: ir.Value


def chosen(value: ir.Value) -> Chosen | None:
    """Which rows an expert's input holds, gathered or made row by row of what is; None for any other value."""
    gather = _chain(value)[-1]
    if gather is None or gather.op_type != "Gather" or gather.domain != "" or gather.attributes.get_int("axis", 0) != 0:
        return None
    source, rows = gather.inputs
    split = rows.producer() if rows is not None else None
    order = split.inputs[0] if split is not None and split.op_type == "Split" else None
    sort = order.producer() if order is not None else None
    if source is None or rows is None or sort is None or not is_call(sort, "SortByExpert"):
        return None
    return Chosen(source, rows, sort.outputs[1])


def _chain(value: ir.Value) -> list[ir.Node | None]:
    """The nodes that make the value row by row, its producer first; the last is of another kind."""
    nodes = [value.producer()]
    while (node := nodes[-1]) is not None and (read := _read_by_row(node)) is not None:
        nodes.append(read.producer())
    return nodes


def _read_by_row(node: ir.Node) -> ir.Value | None:
    """What a fake-quant reads, or an operator on it and a constant."""
    if is_call(node, *FAKE_QUANT):
        return node.inputs[0]
    computed = [value for value in node.inputs if array_of(value) is None]
    return computed[0] if node.domain == "" and node.op_type in _BY_ROW and len(computed) == 1 else None


def of_all_rows(model: ir.Model, names: Iterable[str]) -> dict[str, str]:
    """Compute of all rows what these values, inputs of experts, are of some: by name, the new values' names."""
    values = {value.name or "": value for node in model.graph for value in node.outputs}
    return {name: _of_all_rows(model.graph, values[name]) for name in names}


def _of_all_rows(graph: ir.Graph, value: ir.Value) -> str:
    part = chosen(value)
    assert part is not None
    made = part.source
    for node in reversed(_chain(value)[:-1]):
        assert node is not None
        read = _read_by_row(node)
        inputs = [made if other is read else other for other in node.inputs]
        copy = insert_node(
            graph,
            node,
            node.op_type,
            inputs,
            domain=node.domain,
            attributes=dict(node.attributes),
            name=f"{node.name}.all",
            like=node.outputs[0],
        )
        made = copy.outputs[0]
    return made.name or ""


def projections(model: ir.Model) -> list[Projection]:
    """Every projection of experts whose Linears are as ``normalise`` left them, but for fake-quants; in graph order."""
    return [found for node in model.graph if node.op_type == "Concat" and (found := _projection(node)) is not None]


def parted(model: ir.Model) -> list[Linear]:
    """Linears whose outputs are put together by expert, but beside others that are none: passes were in between."""
    whole = {linear.matmul for found in projections(model) for linear in found.linears}
    sorts = [node for node in model.graph if is_call(node, "SortByExpert")]
    gathers = [node for sort in sorts for node, index in sort.outputs[1].uses() if index == 1]
    values = [value for node in gathers if (concat := _maker(node)) is not None for value in concat.inputs]
    found = [as_linear(node) for value in values if value is not None and (node := value.producer()) is not None]
    return [linear for linear in found if linear is not None and linear.matmul not in whole]


def _maker(gather: ir.Node) -> ir.Node | None:
    made = gather.inputs[0]
    return made.producer() if made is not None else None


def has_experts(model: ir.Model) -> bool:
    """Whether rows are sorted by expert anywhere."""
    return any(is_call(node, "SortByExpert") for node in model.graph)


def _projection(concat: ir.Node) -> Projection | None:
    gather = sole_user(concat.outputs[0])
    inverse = gather.inputs[1] if gather is not None and gather.op_type == "Gather" else None
    sort = inverse.producer() if inverse is not None else None
    if gather is None or sort is None or not is_call(sort, "SortByExpert") or inverse is not sort.outputs[1]:
        return None
    found = [_expert(value) for value in concat.inputs]
    whole = [pair for pair in found if pair is not None]
    if len(whole) != len(found) or not whole or gather.inputs[0] is not concat.outputs[0]:
        return None
    rows = _pieces(sort)
    sources = {part.source for _, part in whole}
    if [part.rows for _, part in whole] != rows or len(sources) != 1:
        return None
    return Projection(sort, sources.pop(), gather.outputs[0], tuple(linear for linear, _ in whole))


def _expert(value: ir.Value | None) -> tuple[Linear, Chosen] | None:
    matmul = value.producer() if value is not None else None
    linear = as_linear(matmul) if matmul is not None else None
    if linear is None or linear.add is not None or _read_by_row(linear.x.producer() or linear.matmul) is not None:
        return None
    part = chosen(linear.x)
    return None if part is None else (linear, part)


def _pieces(sort: ir.Node) -> list[ir.Value]:
    """The rows of each expert."""
    for node, index in sort.outputs[0].uses():
        if node.op_type == "Split" and index == 0 and node.inputs[1] is sort.outputs[2]:
            return list(node.outputs)
    return []


def choose_alike(graph: ir.Graph, prefix: str) -> None:
    """Let the rows of nodes whose names have the prefix go to the experts that the same nodes without it choose."""
    sorts = {node.name or "": node for node in graph if is_call(node, "SortByExpert")}
    for name, node in sorts.items():
        if (twin := sorts.get(prefix + name)) is not None:
            twin.replace_input_with(0, node.inputs[0])


def on_all_rows(model: ir.Model) -> None:
    """Let every expert compute every row, and pick of each row what its expert makes of it: then no shape depends on
    the data, and the work is that of all experts."""
    for sort in [node for node in model.graph if is_call(node, "SortByExpert")]:
        for rows in _pieces(sort):
            for gather in users(rows):
                source = gather.inputs[0]
                assert source is not None
                ir.convenience.replace_all_uses_with(gather.outputs[0], source)
        for gather in users(sort.outputs[1]):
            _pick(model.graph, sort, gather)
    remove_dead(model)


def _pick(graph: ir.Graph, sort: ir.Node, gather: ir.Node) -> None:
    """In the place of Gather(Concat(y_0, y_1 …), inverse): y_e where a row's expert is e."""
    concat = gather.inputs[0].producer() if gather.inputs[0] is not None else None
    assert concat is not None
    name = gather.name or concat.name or "experts"
    last = add_initializer(graph, f"{name}.last_axis", np.array([-1], np.int64))
    ids = insert_node(graph, gather, "Unsqueeze", [sort.inputs[0], last], name=f"{name}.experts").outputs[0]
    ids.type = ir.TensorType(ir.DataType.INT64)
    picked = concat.inputs[0]
    for expert, made in enumerate(concat.inputs[1:], start=1):
        number = add_initializer(graph, f"{name}.number_{expert}", np.array(expert, np.int64))
        equal = insert_node(graph, gather, "Equal", [ids, number], name=f"{name}.is_{expert}").outputs[0]
        equal.type = ir.TensorType(ir.DataType.BOOL)
        where = insert_node(graph, gather, "Where", [equal, made, picked], name=f"{name}.pick_{expert}", like=made)
        picked = where.outputs[0]
    assert picked is not None
    replace_value(gather.outputs[0], picked)
