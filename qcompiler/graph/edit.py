"""Small edits of an onnx_ir graph that every rewrite needs: constants, copy-on-write initializers, new nodes."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.stored import kept


def array_of(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The numbers behind an initializer or the output of a Constant node; None for anything computed or fed."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def scalar_of(value: ir.Value | None) -> float | None:
    """The number behind a constant of one element, or None."""
    array = array_of(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def unique_name(graph: ir.Graph, name: str) -> str:
    """``name``, or ``name_2``, ``name_3`` … where initializers or values of that name exist already."""
    return _numbered(name, value_names(graph))


def _numbered(name: str, taken: Container[str | None]) -> str:
    if name not in taken:
        return name
    return next(candidate for i in itertools.count(2) if (candidate := f"{name}_{i}") not in taken)


def value_names(graph: ir.Graph) -> set[str]:
    """Names of all values of the graph, its inputs and initializers included."""
    names = {v.name for v in graph.inputs} | set(graph.initializers)
    names.update(output.name for node in graph for output in node.outputs)
    return {name for name in names if name}


def add_initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Register a new initializer; a taken name gets a number behind it."""
    name = unique_name(graph, name)
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)  # ascontiguousarray would make a scalar a vector
    return add_tensor(graph, name, kept(graph, tensor))


def add_tensor(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a tensor, wherever it lies, as a new initializer; the name is free."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def write_input(node: ir.Node, index: int, array: npt.NDArray[Any], name: str | None = None) -> ir.Value:
    """Give ``node`` its own constant as input ``index``; every other use of the old constant keeps the old numbers.

    Copy-on-write is not optional: exporters share equal initializers between layers, so that writing in place would
    change layers that nobody looked at. Where this node was the only user, the name is kept.
    """
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    old = node.inputs[index]
    sole = old is not None and old.is_initializer() and len(old.uses()) == 1 and not old.is_graph_output()
    if sole and old is not None and name in (None, old.name):
        name = old.name
        assert name is not None
        metadata = dict(old.metadata_props)
        node.replace_input_with(index, None)
        graph.initializers.pop(name)
        new = add_initializer(graph, name, array)
        new.metadata_props.update(metadata)
    else:
        inherited = old.name if old is not None and old.name else f"{node.name}.{index}"
        new = add_initializer(graph, name or inherited, array)
    node.replace_input_with(index, new)
    return new


def insert_node(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    domain: str = "",
    attributes: Mapping[str, Any] | None = None,
    outputs: int = 1,
    name: str | None = None,
    like: ir.Value | None = None,
) -> ir.Node:
    """Make a node, place it before ``before`` and return it; ``like`` lends the first output its type and shape.

    Output values are named after the node; a taken name, of a node or of a value, gets a number behind it: ONNX Runtime
    refuses two nodes of one name.
    """
    if name is not None:
        name = _numbered(name, {other.name for other in graph})
    node = ir.node(op_type, inputs, attributes=attributes, domain=domain, num_outputs=outputs, name=name)
    base = name or op_type
    for i, output in enumerate(node.outputs):
        output.name = unique_name(graph, base if outputs == 1 else f"{base}.{i}")
    if like is not None:
        node.outputs[0].type = like.type
        node.outputs[0].shape = like.shape
    graph.insert_before(before, node)
    return node


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let every use of ``old``, graph outputs included, read ``new``; a graph output keeps its name.

    ``new`` is computed by a node, and is no graph output yet.
    """
    graph, name, was_output = old.graph, old.name, old.is_graph_output()
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if was_output and graph is not None and name is not None:
        old.name = unique_name(graph, f"{name}.replaced")  # old may stand in the graph a while longer
        new.name = name


def remove_dead(model: ir.Model) -> bool:
    """Drop nodes, initializers, functions and opset imports that nothing reads. Graph inputs stay."""
    from onnx_ir.passes import common

    removed = common.RemoveUnusedNodesPass()(model).modified
    common.RemoveUnusedFunctionsPass()(model)
    return removed


def sole_user(value: ir.Value | None) -> ir.Node | None:
    """The one node that reads this value once, or None (several readers, a graph output, none)."""
    if value is None or value.is_graph_output():
        return None
    uses = value.uses()
    return next(iter(uses))[0] if len(uses) == 1 else None


def first_of(graph: ir.Graph, nodes: Container[ir.Node]) -> ir.Node:
    """The first of these nodes in graph order: what is inserted before it stands before them all."""
    return next(node for node in graph if node in nodes)


def users(value: ir.Value) -> list[ir.Node]:
    """The nodes that read this value, each once, in no promised order."""
    return list(dict.fromkeys(node for node, _ in value.uses()))


def names(values: Iterable[ir.Value | None]) -> list[str]:
    """Names of values, "" for an absent one."""
    return [value.name or "" if value is not None else "" for value in values]
