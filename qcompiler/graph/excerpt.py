"""Linears taken out of a model, to be worked on alone, and their finished weights put back into it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompiler.core import DOMAIN
from qcompiler.graph.edit import add_tensor, first_of, insert_node, unique_name
from qcompiler.graph.functions import OPSET, ensure_function
from qcompiler.graph.linear import Linear, linears


def excerpt(model: ir.Model, chosen: Sequence[Linear]) -> ir.Model:
    """A canonical model of these Linears alone, each with an input and an output of its own and without its bias.

    Weights are shared with the model, and between Linears of one weight; names, and what passes left on the MatMuls,
    stay.
    """
    weights: dict[ir.Value, ir.Value] = {}
    inputs, nodes = [], []
    for linear in chosen:
        if linear.weight not in weights:
            weights[linear.weight] = _copy(linear.weight)
        x = ir.Value(name=f"{linear.name}/x", type=linear.weight.type, shape=ir.Shape(["rows", linear.in_features]))
        y = ir.Value(name=f"{linear.name}/y", type=linear.weight.type, shape=ir.Shape(["rows", linear.out_features]))
        node = ir.Node("", "MatMul", [x, weights[linear.weight]], outputs=[y], name=linear.name)
        node.metadata_props.update(linear.matmul.metadata_props)
        inputs.append(x)
        nodes.append(node)
    graph = ir.Graph(
        inputs,
        [node.outputs[0] for node in nodes],
        nodes=nodes,
        initializers=list(weights.values()),
        opset_imports={"": OPSET},
        name="excerpt",
    )
    return ir.Model(graph, ir_version=model.ir_version)


def _copy(initializer: ir.Value) -> ir.Value:
    value = ir.Value(
        name=initializer.name,
        type=initializer.type,
        shape=initializer.shape,
        const_value=initializer.const_value,
    )
    value.metadata_props.update(initializer.metadata_props)
    return value


def detached(node: ir.Node) -> ir.Node:
    """The same node outside of any graph, of constants that it shares: what becomes of the graph does not touch it."""
    inputs = [None if value is None else _copy(value) for value in node.inputs]
    return ir.Node(node.domain, node.op_type, inputs, attributes=node.attributes.values())


def put_back(finished: ir.Model, model: ir.Model) -> None:
    """Let the Linears of ``model`` that ``finished``, once an excerpt of it, names read the weights that it has made.

    Whatever computes a weight there is copied, its constants included; what the Linears read stays as it is.
    """
    places = {linear.name: linear for linear in linears(model)}
    readers: dict[ir.Value, list[ir.Node]] = {}
    for linear in linears(finished):
        if linear.weight_quant is None:  # the passes left it in float
            continue
        weight = linear.matmul.inputs[1]
        assert weight is not None
        readers.setdefault(weight, []).append(places[linear.name].matmul)
    for weight, matmuls in readers.items():
        copied = _transplant(weight, model, first_of(model.graph, matmuls), {})
        for matmul in matmuls:
            matmul.replace_input_with(1, copied)


def _transplant(value: ir.Value, model: ir.Model, before: ir.Node, made: dict[ir.Value, ir.Value]) -> ir.Value:
    """The same value computed in another model, its inputs first."""
    if value in made:
        return made[value]
    graph, node = model.graph, value.producer()
    if node is None:
        assert value.const_value is not None
        name = unique_name(graph, value.name or "weight")
        value.const_value.name = name
        made[value] = add_tensor(graph, name, value.const_value)
        made[value].metadata_props.update(value.metadata_props)
        return made[value]
    inputs = [None if v is None else _transplant(v, model, before, made) for v in node.inputs]
    if node.domain == DOMAIN:
        ensure_function(model, node.op_type)
    copy = insert_node(
        graph,
        before,
        node.op_type,
        inputs,
        domain=node.domain,
        attributes=dict(node.attributes),
        outputs=len(node.outputs),
        name=node.name,
        like=value,
    )
    copy.metadata_props.update(node.metadata_props)
    made.update(zip(node.outputs, copy.outputs, strict=True))
    return made[value]
