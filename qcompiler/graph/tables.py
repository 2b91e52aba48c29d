"""Which of a model's inputs are numbers of rows in a constant table, as token ids are of an embedding's."""

from __future__ import annotations

import onnx_ir as ir


def rows_indexed(name: str, model: ir.Model) -> int:
    """The smallest table that a Gather indexes with this input: ids below it are valid. 1 where there is none."""
    sizes = [
        int(table.shape[0])
        for node in model.graph
        if node.op_type == "Gather"
        and (table := node.inputs[0]) is not None
        and (index := node.inputs[1]) is not None
        and index.name == name
        and table.is_initializer()
        and table.shape is not None
        and node.attributes.get_int("axis", 0) == 0
        and isinstance(table.shape[0], int)
    ]
    return min(sizes, default=1)
