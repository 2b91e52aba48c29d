"""New operators and constants of a lowering, equal ones made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import add_initializer, insert_node, replace_value

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


def take_over(nodes: Sequence[ir.Node], new: ir.Value) -> None:
    """Let ``new`` stand for the output of the last of ``nodes``, and remove these.

    It gets the name too: names are what identifies a value from pass to pass.
    """
    old, graph = nodes[-1].outputs[0], nodes[-1].graph
    name = old.name
    assert isinstance(graph, ir.Graph)
    replace_value(old, new)
    graph.remove(nodes, safe=True)
    new.name = name


def contrib_instead(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
    name: str,
) -> ir.Node:
    """One operator of ONNX Runtime's own in the place of ``nodes``; inputs that are None at the end are left out."""
    model.graph.opset_imports.setdefault(CONTRIB, 1)
    given = list(inputs)
    while given[-1] is None:
        given.pop()
    node = insert_node(
        model.graph,
        nodes[-1],
        op_type,
        given,
        domain=CONTRIB,
        attributes=attributes,
        name=name,
        like=nodes[-1].outputs[0],
    )
    take_over(nodes, node.outputs[0])
    return node


class Emitter:
    """Places operators before a node and remembers them; what is asked for again is shared.

    Callers go through the graph from its start, so that what was placed for one node stands before every later one.

    Args:
        graph: where the operators go.
        prefix: of the names of constants.
    """

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph = graph
        self.prefix = prefix
        self._made: dict[tuple[object, ...], ir.Value] = {}

    def __call__(
        self, op_type: str, before: ir.Node, inputs: list[ir.Value], **attributes: int | list[int]
    ) -> ir.Value:
        """The first output of this operator on these inputs, of the type of its first input, or int64 of a Shape."""
        key = (op_type, *inputs, repr(sorted(attributes.items())))
        if key not in self._made:
            name = f"{inputs[0].name}.{op_type.lower()}"
            node = insert_node(self.graph, before, op_type, inputs, attributes=attributes, name=name)
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64) if op_type == "Shape" else inputs[0].type
            self._made[key] = node.outputs[0]
        return self._made[key]

    def constant(self, name: str, numbers: list[int]) -> ir.Value:
        """An int64 vector."""
        key = ("constant", *numbers)
        if key not in self._made:
            self._made[key] = add_initializer(self.graph, f"{self.prefix}.{name}", np.array(numbers, np.int64))
        return self._made[key]
