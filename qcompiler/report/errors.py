"""Layer-wise and output errors: the float and the quantized graph side by side, in constant memory.

Both graphs are merged into one that returns, for each Linear, only two sums of squares a row (a token); the wide
outputs themselves, and the logits of a language model, never leave ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.run import Feeds, Runner
from qcompiler.numerics.metrics import SqnrMeter

MASK = "attention_mask"
SLICE = 512
"""Rows (tokens) of one run: bounds the memory that both graphs take at once."""
TOKENS = 2048
"""Rows (tokens) in all: long samples need not be as many as short ones."""


@dataclasses.dataclass(frozen=True)
class LayerError:
    """SQNR in dB of one Linear's output; ``alone`` None where the float graph has not the same input and weight."""

    accumulated: float
    alone: float | None


def layer_errors(
    float_model: ir.Model, quantized: ir.Model, batches: Iterable[Feeds], samples: int, threads: int = 0
) -> tuple[dict[str, LayerError], int]:
    """Measure the output of every quantized Linear against the float graph.

    Args:
        float_model: the canonical float graph, as it was just before ``insert`` (transforms applied): then every
            Linear's error alone can be told too. With the graph from before the transforms, only accumulated errors.
        quantized: the canonical graph with fake-quant, before lowering; neither graph is changed.
        batches: feeds; rows where ``attention_mask`` is 0 do not count.
        samples: stop after that many samples (entries of the leading axis).
        threads: intra-op threads; 0 leaves the number to ONNX Runtime.

    Returns:
        Errors by Linear name, and the number of samples seen.
    """
    merged, taps = _side_by_side(float_model, quantized)
    if not taps:
        return {}, 0
    runner = Runner(merged, threads=threads, in_order=True)
    meters = {key: SqnrMeter() for key in taps}
    seen = 0
    for feeds in sliced(batches, samples):
        results = runner(feeds)
        seen += sample_count(feeds)
        for key, (signal, noise) in taps.items():
            keep = unmasked(feeds, results[signal].shape)
            meters[key].signal += float(results[signal][keep].sum(dtype=np.float64))
            meters[key].noise += float(results[noise][keep].sum(dtype=np.float64))
    decibels = {key: meter.db for key, meter in meters.items()}
    errors = {
        name: LayerError(db, decibels.get((name, "alone")))
        for (name, kind), db in decibels.items()
        if kind == "accumulated"
    }
    return errors, seen


def output_errors(
    float_model: ir.Model, lowered: ir.Model, batches: Iterable[Feeds], samples: int, threads: int = 0
) -> dict[str, float]:
    """SQNR in dB of each float output of the lowered model, by name; masked rows do not count."""
    reference, candidate = Runner(float_model, threads=threads), Runner(lowered, threads=threads, as_deployed=True)
    meters: dict[str, SqnrMeter] = {}
    for feeds in sliced(batches, samples):
        expected, got = reference(feeds), candidate(feeds)
        for name in reference.outputs:
            want, have = expected[name], got[name]
            if not np.issubdtype(want.dtype, np.floating):
                continue
            keep = unmasked(feeds, want.shape[:-1]) if want.ndim else np.True_
            meters.setdefault(name, SqnrMeter()).update(want[keep], have[keep])
    return {name: meter.db for name, meter in meters.items()}


def unmasked(feeds: Feeds, rows: tuple[int, ...]) -> Any:
    """What indexes the rows that count: the attention mask where its shape is theirs, else all of them."""
    mask = feeds.get(MASK)
    return np.asarray(mask) != 0 if mask is not None and np.shape(mask) == tuple(rows) else np.ones(rows, bool)


def sample_count(feeds: Feeds) -> int:
    """Entries of the leading axis of the first feed that has one."""
    return next((array.shape[0] for array in map(np.asarray, feeds.values()) if array.ndim), 1)


def sliced(batches: Iterable[Feeds], samples: int, rows: int = SLICE, total: int = TOKENS) -> Iterator[Feeds]:
    """The first ``samples`` samples, cut along the batch axis into feeds of about ``rows`` rows (tokens) each.

    They end early once ``total`` rows, padding included, have been yielded.
    """
    left = samples
    for feeds in batches:
        if left <= 0 or total <= 0:
            return
        count = sample_count(feeds)
        if any(np.ndim(array) == 0 or np.shape(array)[0] != count for array in feeds.values()):
            left -= count
            yield feeds
            continue
        tokens = max(int(np.prod(np.shape(array)[1:2])) for array in feeds.values())
        step = max(1, rows // max(tokens, 1))
        for start in range(0, min(count, left), step):
            if total <= 0:
                return
            stop = min(start + step, count, left)
            total -= (stop - start) * tokens
            yield {name: np.asarray(array)[start:stop] for name, array in feeds.items()}
        left -= count


_Taps = dict[tuple[str, str], tuple[str, str]]


def _side_by_side(
    float_model: ir.Model, quantized: ir.Model
) -> tuple[ir.Model, dict[tuple[str, str], tuple[str, str]]]:
    """One graph of both, returning row sums: ``{(linear, kind): (signal, noise)}`` names its outputs."""
    merged = float_model.clone()
    reference = {linear.name: linear for linear in linears(merged)}
    copies = [
        linear
        for linear in _adopt(merged, quantized.clone())
        if linear.weight_quant is not None and linear.name in reference
    ]
    graph = merged.graph
    graph.outputs.clear()
    taps: _Taps = {}
    fake_quants: dict[tuple[ir.Node, ir.Value], ir.Value] = {}
    for copy in copies:
        linear = reference[copy.name]
        number = len(taps)
        signal = _append(graph, "ReduceSumSquare", [linear.output], f"signal:{number}", keepdims=0)
        noise = _squares(graph, linear.output, copy.output, f"noise:{number}")
        graph.outputs.extend([signal, noise])
        taps[copy.name, "accumulated"] = (signal.name or "", noise.name or "")
        if (same := _alone(graph, linear, copy, fake_quants)) is not None:
            noise = _squares(graph, linear.matmul.outputs[0], same, f"alone:{number}")
            graph.outputs.append(noise)
            taps[copy.name, "alone"] = (signal.name or "", noise.name or "")
    _interleave(graph)
    return merged, taps


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
    return _append(graph, "MatMul", [x, copy.weight_quant.outputs[0]], f"alone_output:{copy.matmul.name}")


def _same_weight(linear: Linear, copy: Linear) -> bool:
    """Whether the quantized weight is the float one but for rounding (a smoothed weight is not the unsmoothed one)."""
    assert copy.weight_quant is not None
    weight, integers, scale = array_of(linear.weight), array_of(copy.weight), array_of(copy.weight_quant.inputs[1])
    if weight is None or integers is None or scale is None or weight.shape != integers.shape or scale.ndim > 1:
        return False
    if np.issubdtype(integers.dtype, np.floating):
        return bool(np.array_equal(weight, integers))
    error = np.abs(weight - integers.astype(np.float32) * scale)
    return bool(np.mean(error <= 3 * scale) > 0.99)  # GPTQ moves a weight by up to three steps


def _squares(graph: ir.Graph, reference: ir.Value, other: ir.Value, name: str) -> ir.Value:
    return _append(
        graph, "ReduceSumSquare", [_append(graph, "Sub", [other, reference], f"{name}:error")], name, keepdims=0
    )


def _append(graph: ir.Graph, op_type: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
    if op_type == "ReduceSumSquare":
        axes = ir.tensor(np.array([-1], np.int64), name=f"{name}:axes")
        constant = ir.Value(name=axes.name, type=ir.TensorType(axes.dtype), shape=ir.Shape([1]), const_value=axes)
        graph.register_initializer(constant)
        inputs = [*inputs, constant]
    node = ir.node(op_type, inputs, attributes=attributes, name=name)
    output = node.outputs[0]
    output.name = name
    output.type = inputs[0].type
    graph.append(node)
    return output
