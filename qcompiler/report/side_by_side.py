"""The float and the quantized graph merged into one, so that each pair of outputs is compared inside ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import array_of
from qcompiler.graph.experts import choose_alike
from qcompiler.graph.functions import is_call
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.weights import codebook_of, folded_grid

ACCUMULATED, ALONE, OUTPUT = "accumulated", "alone", "output"


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A float value of the merged graph and how far its quantized twin is from it.

    Attributes:
        name: the Linear's name, or the model output's.
        kind: ACCUMULATED (everything upstream is quantized too), ALONE (this Linear only), OUTPUT (a model output).
        reference: the float value.
        error: the quantized value less the float one.
        channels: length of the last axis; 0 where it is not known.
    """

    name: str
    kind: str
    reference: ir.Value
    error: ir.Value
    channels: int


def side_by_side(
    float_model: ir.Model, quantized: ir.Model, only: Collection[str] | None = None, outputs: bool = False
) -> tuple[ir.Model, list[Pair]]:
    """One graph of both, without outputs yet: :func:`row_sums` or :func:`whole` give it some.

    Args:
        only: names of the Linears to compare; None: every quantized one.
        outputs: compare the model's own float outputs too.

    Where Linears are, rows go to the experts of the float graph: another expert's result is no error of rounding.
    """
    merged = float_model.clone()
    other = quantized.clone()
    graph = merged.graph
    ends = list(zip(graph.outputs, other.graph.outputs, strict=True)) if outputs else []
    reference = {linear.name: linear for linear in linears(merged)}
    copies = [
        linear
        for linear in _adopt(merged, other)
        if linear.weight_quant is not None and linear.name in reference and (only is None or linear.name in only)
    ]
    if copies:
        choose_alike(graph, _PREFIX)
    graph.outputs.clear()
    pairs: list[Pair] = []
    fake_quants: dict[tuple[ir.Node, ir.Value], ir.Value] = {}
    for number, copy in enumerate(copies):
        linear = reference[copy.name]
        error = append(graph, "Sub", [copy.output, linear.output], f"error:{number}")
        pairs.append(Pair(copy.name, ACCUMULATED, linear.output, error, linear.out_features))
        if (same := _alone(graph, linear, copy, fake_quants)) is not None:
            error = append(graph, "Sub", [same, linear.matmul.outputs[0]], f"alone_error:{number}")
            pairs.append(Pair(copy.name, ALONE, linear.output, error, linear.out_features))
    for number, (want, have) in enumerate(ends):
        if want.dtype is not None and want.dtype.is_floating_point() and want.shape is not None and len(want.shape):
            error = append(graph, "Sub", [have, want], f"output_error:{number}")
            size = want.shape[-1]
            pairs.append(Pair(want.name or "", OUTPUT, want, error, size if isinstance(size, int) else 0))
    return merged, pairs


def row_sums(merged: ir.Model, pairs: list[Pair], products: bool = False) -> list[tuple[str, ...]]:
    """Let the merged graph return sums of each pair over the last axis: Σ ref², Σ err², with ``products`` Σ ref · err.

    Returns:
        The names of those outputs, for each pair.
    """
    graph = merged.graph
    signals: dict[ir.Value, ir.Value] = {}
    taps = []
    for number, pair in enumerate(pairs):
        if pair.reference not in signals:
            signals[pair.reference] = _reduce(graph, "ReduceSumSquare", pair.reference, f"signal:{number}")
            graph.outputs.append(signals[pair.reference])
        sums = [_reduce(graph, "ReduceSumSquare", pair.error, f"noise:{number}")]
        if products:
            product = append(graph, "Mul", [pair.reference, pair.error], f"product_terms:{number}")
            sums.append(_reduce(graph, "ReduceSum", product, f"product:{number}"))
        graph.outputs.extend(sums)
        taps.append(tuple(value.name or "" for value in (signals[pair.reference], *sums)))
    _interleave(graph)
    return taps


def whole(merged: ir.Model, pairs: list[Pair]) -> list[tuple[str, str]]:
    """Let the merged graph return both values of each pair, whole.

    Returns:
        The names of those outputs, (float, quantized) for each pair.
    """
    graph = merged.graph
    taps = []
    for number, pair in enumerate(pairs):
        got = append(graph, "Add", [pair.reference, pair.error], f"got:{number}")
        graph.outputs.extend(value for value in (pair.reference, got) if value not in graph.outputs)
        taps.append((pair.reference.name or "", got.name or ""))
    _interleave(graph)
    return taps


def _interleave(graph: ir.Graph) -> None:
    """Order the nodes by the first output that needs them, so that each pair of values is compared and let go at once.

    What no output needs is dropped.
    """
    order: dict[ir.Node, None] = {}
    for output in graph.outputs:
        stack = [output.producer()]
        while stack:
            node = stack[-1]
            missing = [] if node is None else [p for p in _producers(node) if p.graph is graph and p not in order]
            if missing:
                stack.append(missing[0])
                continue
            stack.pop()
            if node is not None:
                order[node] = None
    for node in list(graph):
        graph.remove(node)
    graph.extend(order)


def _producers(node: ir.Node) -> list[ir.Node]:
    """The nodes that this one reads, through its subgraphs too."""
    inner = [
        read
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH
        for child in attribute.as_graph().all_nodes()
        for read in child.inputs
    ]
    return [made for value in (*node.inputs, *inner) if value is not None and (made := value.producer()) is not None]


_PREFIX = "quantized:"


def _adopt(merged: ir.Model, other: ir.Model) -> list[Linear]:
    """Move the nodes of ``other`` into ``merged`` under prefixed names; both read the same graph inputs.

    Returns:
        The moved Linears, under their own names.
    """
    graph = merged.graph
    moved = linears(other)
    inputs = {value.name: value for value in graph.inputs}
    for value in list(other.graph.inputs):
        ir.convenience.replace_all_uses_with(value, inputs[value.name])
    for value in list(other.graph.initializers.values()):
        name = value.name or ""
        twin = graph.initializers.get(name)
        if twin is not None and twin.const_value is value.const_value:
            ir.convenience.replace_all_uses_with(value, twin)
            continue
        other.graph.initializers.pop(name)
        value.name = _PREFIX + name
        graph.register_initializer(value)
    other.graph.outputs.clear()
    for node in list(other.graph):
        other.graph.remove(node)
        node.name = _PREFIX + (node.name or "")
        for output in node.outputs:
            output.name = _PREFIX + (output.name or "") if output.name else None
        graph.append(node)
    merged.functions.update({key: function for key, function in other.functions.items() if key not in merged.functions})
    for domain, version in other.graph.opset_imports.items():
        graph.opset_imports.setdefault(domain, version)
    return moved


def _alone(
    graph: ir.Graph, linear: Linear, copy: Linear, fake_quants: dict[tuple[ir.Node, ir.Value], ir.Value]
) -> ir.Value | None:
    """The MatMul's output with this Linear quantized on a float input; None where weight or input differ from float."""
    assert copy.weight_quant is not None
    if copy.x.name not in (linear.x.name, _PREFIX + (linear.x.name or "")):  # graph inputs have no prefix
        return None
    if not _same_weight(linear, copy):
        return None
    x: ir.Value = linear.x
    if copy.activation_quant is not None:
        key = (copy.activation_quant, linear.x)
        if key not in fake_quants:
            call = copy.activation_quant
            node = ir.Node(
                call.domain,
                call.op_type,
                [linear.x, *call.inputs[1:]],
                list(call.attributes.values()),
                name=f"alone:{call.name}",
            )
            node.outputs[0].name = f"alone:{call.outputs[0].name}"
            graph.append(node)
            fake_quants[key] = node.outputs[0]
        x = fake_quants[key]
    return append(graph, "MatMul", [x, copy.weight_quant.outputs[0]], f"alone_output:{copy.matmul.name}")


def _same_weight(linear: Linear, copy: Linear) -> bool:
    """Whether the quantized weight is the float one but for rounding (a smoothed weight is not the unsmoothed one)."""
    assert copy.weight_quant is not None
    weight, stored = array_of(linear.weight), array_of(copy.weight)
    if weight is None or stored is None or weight.shape != stored.shape:
        return False
    if is_call(copy.weight_quant, "DequantizeCodebook"):
        blocks = codebook_of(copy.weight_quant)
        nearest = dataclasses.replace(blocks, values=np.array([0, 0.2], np.float32))  # no two numbers lie further apart
        error = np.abs(weight - blocks.dequantized(stored.astype(np.uint8)))
        return bool(np.mean(error <= nearest.dequantized(np.ones(stored.shape, np.uint8))) > 0.99)
    if is_call(copy.weight_quant) or np.issubdtype(stored.dtype, np.floating):
        return bool(np.array_equal(weight.astype(stored.dtype), stored))
    grid = folded_grid(copy.weight_quant)
    if grid is None:
        return False
    error = np.abs(weight - grid.dequantized(stored.astype(np.float32)))
    steps = np.abs(grid.spread(len(stored))[0])
    return bool(np.mean(error <= 3 * steps) > 0.99)  # GPTQ moves a weight by up to three steps


def _reduce(graph: ir.Graph, op_type: str, value: ir.Value, name: str) -> ir.Value:
    axes = ir.tensor(np.array([-1], np.int64), name=f"{name}:axes")
    constant = ir.Value(name=axes.name, type=ir.TensorType(axes.dtype), shape=ir.Shape([1]), const_value=axes)
    graph.register_initializer(constant)
    return append(graph, op_type, [value, constant], name, keepdims=0)


def append(graph: ir.Graph, op_type: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
    """A new node at the end of the graph; its output has the type of the first input."""
    node = ir.node(op_type, inputs, attributes=attributes, name=name)
    output = node.outputs[0]
    output.name = name
    output.type = inputs[0].type
    graph.append(node)
    return output
