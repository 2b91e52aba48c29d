"""How channel labels travel through one node: the table of carriers (DESIGN.md section 3).

A label array has the shape of its value and holds, for each element, the source channel whose 1/scale (and shift) the
element carries, or -1 for none. A rule of the table turns labels of inputs into labels of outputs; whatever it cannot
carry it blocks, with the reason. An operator without a rule blocks everything.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompiler.core import DOMAIN
from qcompiler.graph import arithmetic
from qcompiler.graph.labels import NONE, Labels, Step, constant_along, data_labels

Rule = Callable[[Step], "list[Labels | None]"]


def carry(step: Step) -> list[Labels | None]:
    """Labels of the node's outputs; what cannot be carried is recorded in ``step``."""
    node = step.node
    rule = _RULES.get((node.domain, node.op_type))
    if rule is None:
        return step.block_all(f"{node.op_type} does not commute with a scale by channel")
    if rule is not _neutral and any(output.name not in step.facts for output in node.outputs):
        return step.block_all(f"the shape that {node.op_type} gives is not known")
    return rule(step)


def _neutral(step: Step) -> list[Labels | None]:
    return [None] * len(step.node.outputs)  # reads the shape, not the numbers


def _reshape(step: Step) -> list[Labels | None]:
    labels = data_labels(step)
    return [None if labels is None else labels.reshape(step.shape())]


def _cast(step: Step) -> list[Labels | None]:
    if not ir.DataType(step.attribute("to", 1)).is_floating_point():
        return step.block_all("Cast to a type that is not floating point")
    return _reshape(step)


def _transpose(step: Step) -> list[Labels | None]:
    labels = data_labels(step)
    if labels is None:
        return [None]
    perm = step.node.attributes["perm"].as_ints() if "perm" in step.node.attributes else range(labels.ndim)[::-1]
    return [labels.transpose(tuple(perm))]


def _expand(step: Step) -> list[Labels | None]:
    labels = data_labels(step)
    return [None if labels is None else np.broadcast_to(labels, step.shape())]


def _slice(step: Step) -> list[Labels | None]:
    labels = data_labels(step)
    if labels is None:
        return [None]
    operands = [step.numbers(i) for i in range(1, 5)]
    starts, ends = operands[:2]
    if starts is None or ends is None:
        return step.block_all("Slice with bounds that depend on data")
    axes = range(len(starts)) if operands[2] is None else [int(a) for a in operands[2]]
    steps = [1] * len(starts) if operands[3] is None else [int(s) for s in operands[3]]
    index: list[slice] = [slice(None)] * labels.ndim
    for start, end, axis, stride in zip(starts, ends, axes, steps, strict=True):
        stop = None if stride < 0 and int(end) < -labels.shape[axis] else int(end)
        index[axis] = slice(int(start), stop, stride)
    return [labels[tuple(index)]]


def _split(step: Step) -> list[Labels | None]:
    labels = data_labels(step)
    if labels is None:
        return [None] * len(step.node.outputs)
    axis = step.attribute("axis", 0)
    sizes = [step.shape(i)[axis] for i in range(len(step.node.outputs))]
    return list(np.split(labels, np.cumsum(sizes)[:-1], axis=axis))


def _concat(step: Step) -> list[Labels | None]:
    parts = []
    for i, labels in enumerate(step.labels):
        fact = step.fact(i)
        assert fact is not None
        parts.append(np.broadcast_to(NONE, fact.shape) if labels is None else labels)
    return [np.concatenate(parts, axis=step.attribute("axis", 0))]


def _gather(step: Step) -> list[Labels | None]:
    labels, indices = data_labels(step), step.fact(1)
    if labels is None or indices is None:
        return [None]
    axis = step.attribute("axis", 0)
    if indices.numbers is not None:
        return [np.take(labels, indices.numbers.astype(np.int64), axis=axis)]
    if not constant_along(labels, axis):
        return step.block_all("Gather picks among channels by data")
    return [np.take(labels, np.zeros(indices.shape, dtype=np.int64), axis=axis)]


def _gather_nd(step: Step) -> list[Labels | None]:
    labels, indices = data_labels(step), step.fact(1)
    if labels is None or indices is None:
        return [None]
    batch, depth = step.attribute("batch_dims", 0), indices.shape[-1]
    if indices.numbers is not None and batch == 0:
        return [labels[tuple(np.moveaxis(indices.numbers.astype(np.int64), -1, 0))]]
    for axis in range(batch, batch + depth):
        if not constant_along(labels, axis):
            return step.block_all("GatherND picks among channels by data")
    rest = labels[(slice(None),) * batch + (0,) * depth]
    middle = (1,) * (len(indices.shape) - 1 - batch)
    spread = rest.reshape(rest.shape[:batch] + middle + rest.shape[batch:])
    return [np.broadcast_to(spread, step.shape())]


_RULES: dict[tuple[str, str], Rule] = {
    **{("", name): _reshape for name in ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")},
    **{("", name): _neutral for name in ("Shape", "Size")},
    **{("", name): arithmetic.positive_homogeneous for name in ("Relu", "LeakyRelu")},
    **{("", name): arithmetic.product for name in ("Mul", "Div")},
    **{("", name): arithmetic.sum_of_two for name in ("Add", "Sub")},
    **{("", name): arithmetic.reduce for name in ("ReduceMean", "ReduceSum")},
    **{(DOMAIN, name): arithmetic.attention for name in ("Attention", "MaskedAttention")},
    ("", "Cast"): _cast,
    ("", "Transpose"): _transpose,
    ("", "Expand"): _expand,
    ("", "Slice"): _slice,
    ("", "Split"): _split,
    ("", "Concat"): _concat,
    ("", "Gather"): _gather,
    ("", "GatherND"): _gather_nd,
    ("", "Where"): arithmetic.where,
    ("", "MatMul"): arithmetic.mixture,
}
