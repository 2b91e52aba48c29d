"""New operators and constants of a lowering, equal ones made once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import add_initializer, insert_node


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
        """The first output of this operator on these inputs."""
        key = (op_type, *inputs, repr(sorted(attributes.items())))
        if key not in self._made:
            name = f"{inputs[0].name}.{op_type.lower()}"
            node = insert_node(self.graph, before, op_type, inputs, attributes=attributes, name=name)
            self._made[key] = node.outputs[0]
        return self._made[key]

    def constant(self, name: str, numbers: list[int]) -> ir.Value:
        """An int64 vector."""
        key = ("constant", *numbers)
        if key not in self._made:
            self._made[key] = add_initializer(self.graph, f"{self.prefix}.{name}", np.array(numbers, np.int64))
        return self._made[key]
