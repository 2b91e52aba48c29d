"""Sources: nodes whose weights can absorb 1/scale (and a shift) on their output, channel by channel."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import array_of, sole_user
from qcompiler.graph.functions import is_call
from qcompiler.graph.linear import as_linear


@dataclasses.dataclass(frozen=True)
class Source:
    """A candidate source as it stands in the graph now.

    Attributes:
        kind: "norm", "mul" or "linear".
        node: the LayerNormalization, RMSNorm, Mul, or the MatMul of a Linear.
        value: its output, after the constant Add that follows it, if one does.
        channels: length of the last axis of ``value``.
        weight: (node, input index) of the constant whose last axis is divided by scale.
        bias: (node, input index) of the bias, from which shift is taken and which scale divides; None: there is none.
        no_shift: why no shift can be absorbed, "" where it can (a missing bias is then created).
    """

    kind: str
    node: ir.Node
    value: ir.Value
    channels: int
    weight: tuple[ir.Node, int]
    bias: tuple[ir.Node, int] | None
    no_shift: str = ""


def as_source(node: ir.Node) -> Source | None:
    """The source whose main node this is, or None."""
    if not node.outputs or not isinstance(node.graph, ir.Graph):
        return None
    if node.op_type == "LayerNormalization" and node.domain == "":
        return _layer_norm(node)
    if is_call(node, "RMSNorm"):
        return _vector_source("norm", node, 1, "RMSNorm has no bias")
    if node.op_type == "Mul" and node.domain == "":
        constant = [i for i, value in enumerate(node.inputs) if _vector_length(value) is not None]
        return _vector_source("mul", node, constant[0], "Mul has no bias") if len(constant) == 1 else None
    return _linear(node)


def _layer_norm(node: ir.Node) -> Source | None:
    channels = _vector_length(node.inputs[1])
    x = node.inputs[0]
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    last = axis == -1 or (x is not None and x.shape is not None and axis == len(x.shape) - 1)
    if channels is None or not last:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and _vector_length(bias) != channels:
        return None
    return Source("norm", node, node.outputs[0], channels, (node, 1), None if bias is None else (node, 2))


def _vector_source(kind: str, node: ir.Node, index: int, no_shift: str) -> Source | None:
    channels = _vector_length(node.inputs[index])
    if channels is None:
        return None
    value = node.outputs[0]
    add = sole_user(value)
    if add is not None and add.op_type == "Add" and add.domain == "" and add.graph is node.graph:
        other = 1 if add.inputs[0] is value else 0
        if _vector_length(add.inputs[other]) == channels:
            return Source(kind, node, add.outputs[0], channels, (node, index), (add, other))
    return Source(kind, node, value, channels, (node, index), None, no_shift)


def _linear(node: ir.Node) -> Source | None:
    linear = as_linear(node)
    if linear is None or linear.weight_quant is not None or linear.weight.is_graph_input():
        return None
    bias = None
    if linear.add is not None:
        bias = (linear.add, next(i for i, value in enumerate(linear.add.inputs) if value is linear.bias))
    return Source("linear", node, linear.output, linear.out_features, (node, 1), bias)


def _vector_length(value: ir.Value | None) -> int | None:
    """C where the value is a floating-point constant of shape [C] or [1, .., 1, C] with C > 1."""
    if value is None or not (value.is_initializer() or value.producer() is not None):
        return None
    if value.is_graph_input() or (not value.is_initializer() and value.producer().op_type != "Constant"):  # type: ignore[union-attr]
        return None
    if value.is_initializer():
        tensor = value.const_value
        shape, dtype = (None, None) if tensor is None else (tensor.shape.numpy(), tensor.dtype)
    else:
        array = array_of(value)
        shape, dtype = (None, None) if array is None else (array.shape, ir.DataType.from_numpy(array.dtype))
    if shape is None or dtype is None or not dtype.is_floating_point() or not shape:
        return None
    return int(shape[-1]) if shape[-1] > 1 and int(np.prod(shape)) == shape[-1] else None
