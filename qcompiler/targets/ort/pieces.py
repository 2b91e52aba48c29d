"""A lowered graph cut into runs of consecutive nodes, so that what is too large for a session can be looked at."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


def pieces(model: ir.Model, limit: int) -> Iterator[ir.Model]:
    """The model itself where its weights have at most ``limit`` bytes, else one piece after the other.

    A piece has the weights that its nodes read, in all at most ``limit`` bytes unless one node alone reads more; values
    that cross a cut are inputs and outputs, so a cut lies only where all their types are known. Tensors are shared. A
    model with subgraphs, which may read any value, is not cut.
    """
    small = sum(_bytes(value) for value in model.graph.initializers.values()) <= limit
    if small or next(iter(model.graph.subgraphs()), None) is not None:
        yield model
        return
    nodes: list[ir.Node] = []
    weights: set[ir.Value] = set()
    for node in model.graph:
        own = {value for value in node.inputs if value is not None and value.is_initializer()}
        if nodes and sum(map(_bytes, weights | own)) > limit and _typed(nodes):
            yield _piece(model, nodes)
            nodes, weights = [], set()
        nodes.append(node)
        weights |= own
    yield _piece(model, nodes)


def _bytes(value: ir.Value) -> int:
    return value.const_value.nbytes if value.const_value is not None else 0


def _crossing(nodes: list[ir.Node]) -> tuple[list[ir.Value], list[ir.Value]]:
    """What these nodes read and do not make, constants aside, and what others read of them."""
    inside = set(nodes)
    made = [output for node in nodes for output in node.outputs]
    inner = set(made)
    read = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and not v.is_initializer())
    left = [v for v in made if v.is_graph_output() or any(user not in inside for user, _ in v.uses())]
    return [value for value in read if value not in inner], left


def _typed(nodes: list[ir.Node]) -> bool:
    return all(value.type is not None for value in _crossing(nodes)[1])


def _piece(model: ir.Model, nodes: list[ir.Node]) -> ir.Model:
    inputs, outputs = _crossing(nodes)
    constants = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and v.is_initializer())
    view = ir.GraphView(
        inputs,
        outputs,
        nodes=nodes,
        initializers=list(constants),
        opset_imports=model.graph.opset_imports,
        name="piece",
    )
    return ir.Model(view.clone(), ir_version=model.ir_version, functions=list(model.functions.values()))
