"""Output heads: the Linears that make a model's outputs, such as a causal LM's final Linear over the vocabulary.

Quantizing a head is a choice of its own (no later layer averages its errors, and it can be most of the weights), so
reports count it apart. A head is found by data flow, not by name.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linears

_LAYOUT = {"Identity", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Expand"}
_PICKS = {"Gather", "GatherND"}
_UNARY = {"Tanh", "Sigmoid", "Softmax", "LogSoftmax", "Clip", "Relu", "Neg"}
_WITH_CONSTANT = {"Add", "Sub", "Mul", "Div"}
_SHAPES = {"Shape", "Size"}


def output_heads(model: ir.Model) -> set[str]:
    """Names of the Linears whose output goes to graph outputs and nowhere else.

    Only layout operators, functions of one value and arithmetic with a constant may lie between: no other Linear, norm,
    or operator on two computed values.

    Keys and values that are both attended to and returned as a cache are no heads.
    """
    return {linear.name for linear in linears(model) if _ends_in_outputs(linear.output)}


def _ends_in_outputs(value: ir.Value) -> bool:
    reached = value.is_graph_output()
    for node, index in value.uses():
        if node.domain == "" and node.op_type in _SHAPES:
            continue
        if not _passes(node, index) or not all(
            _ends_in_outputs(o) for o in node.outputs if o.uses() or o.is_graph_output()
        ):
            return False
        reached = True
    return reached


def _passes(node: ir.Node, index: int) -> bool:
    if node.domain != "":
        return False
    if node.op_type in _WITH_CONSTANT:
        return array_of(node.inputs[1 - index]) is not None
    return index == 0 and node.op_type in _LAYOUT | _PICKS | _UNARY
