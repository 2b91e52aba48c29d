"""Carriers that compute: labels through products, sums, ReLU, reductions and attention (DESIGN.md section 3)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import array_of
from qcompiler.graph.labels import NONE, Labels, Step, constant_along, data_labels


def positive_homogeneous(step: Step) -> list[Labels | None]:
    step.block_shift(f"{step.node.op_type} commutes with a positive scale, not with a shift")
    labels = data_labels(step)
    return [labels]


def product(step: Step) -> list[Labels | None]:
    a, b = step.labels
    if b is not None and (a is not None or step.node.op_type == "Div"):
        return step.block_all(f"{step.node.op_type} of it with itself or as divisor is not linear in it")
    step.block_shift(f"{step.node.op_type} scales a shift")
    labels = a if a is not None else b
    assert labels is not None
    return [np.broadcast_to(labels, step.shape())]


def sum_of_two(step: Step) -> list[Labels | None]:
    """Sum of two values: allowed where both carry the same label, so that the sum carries it too."""
    shape = step.shape()
    a, b = (np.broadcast_to(NONE if labels is None else labels, shape) for labels in step.labels)
    same = a == b
    if not same.all():
        why = f"{step.node.op_type} with a value that does not carry the same scale"
        step.blocked.extend((side[~same], why) for side in (a, b))
    step.block_shift(f"{step.node.op_type} changes a shift")
    return [np.where(same, a, NONE)]


def where(step: Step) -> list[Labels | None]:
    condition, *sides = step.labels
    if condition is not None:
        return step.block_all("Where reads it as its condition")
    shape = step.shape()
    arrays: list[Labels] = []
    for i, labels in enumerate(sides, start=1):
        constant = array_of(step.node.inputs[i])
        if labels is not None:
            arrays.append(np.broadcast_to(labels, shape))
        elif constant is None or constant.any():
            return step.block_all("Where with a branch that does not carry the same scale")
    if len(arrays) == 1:
        step.block_shift("Where with zero")  # zero stays zero under a scale
        return [arrays[0]]
    same = arrays[0] == arrays[1]
    step.blocked.extend((side[~same], "Where with branches of different scales") for side in arrays)
    return [np.where(same, arrays[0], NONE)]


def reduce(step: Step) -> list[Labels | None]:
    labels, axes = data_labels(step), step.numbers(1)
    if labels is None:
        return [None]
    if axes is None or axes.size == 0 or not all(constant_along(labels, int(axis)) for axis in axes):
        return step.block_all(f"{step.node.op_type} mixes channels")
    if step.node.op_type == "ReduceSum":
        step.block_shift("ReduceSum multiplies a shift")
    first = labels
    for axis in axes:
        first = np.take(first, [0], axis=int(axis))
    return [first.reshape(step.shape())]


def mixture(step: Step) -> list[Labels | None]:
    """P @ V with labels on V: rows of V are mixed, columns are not."""
    left, right = step.labels
    if right is None or left is not None:
        return step.block_all("MatMul with a weight that is not constant")
    softmax = step.node.inputs[0].producer() if step.node.inputs[0] is not None else None
    if softmax is None or softmax.op_type != "Softmax" or _softmax_axis(softmax) not in (-1, _rank(step, 0) - 1):
        step.block_shift("the rows of the matrix that multiplies it are not known to sum to 1")
    return _mix_rows(step, right)


def _softmax_axis(softmax: ir.Node) -> int:
    """The axis that a Softmax node normalises."""
    return softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1


def _rank(step: Step, index: int) -> int:
    fact = step.fact(index)
    return -1 if fact is None else len(fact.shape)


def _mix_rows(step: Step, values: Labels) -> list[Labels | None]:
    if values.ndim < 2 or not constant_along(values, -2):
        return step.block_all(f"{step.node.op_type} sums over its channels")
    return [np.broadcast_to(values[..., :1, :], step.shape())]


def attention(step: Step) -> list[Labels | None]:
    queries_and_keys = [labels for labels in (*step.labels[:2], *step.labels[3:]) if labels is not None]
    step.blocked.extend((labels, "queries, keys and masks go into a Softmax") for labels in queries_and_keys)
    values = step.labels[2]
    if values is None:
        return [None]
    if step.node.op_type == "MaskedAttention" and not finite_mask(step.node.inputs[3]):
        step.block_shift("a row that the mask hides throughout gives 0, not a mean")
    return _mix_rows(step, values)


_MASK_LAYOUT = frozenset({"Identity", "Expand", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Slice"})


def finite_mask(mask: ir.Value | None, depth: int = 16) -> bool:
    """Whether an additive mask provably never holds -inf or NaN: then each row of the softmax sums to 1."""
    array = array_of(mask)
    if array is not None:
        return bool(np.isfinite(array).all())
    node = mask.producer() if mask is not None else None
    if node is None or node.domain != "" or depth == 0:
        return False
    if node.op_type in _MASK_LAYOUT:
        return finite_mask(node.inputs[0], depth - 1)
    return node.op_type == "Where" and all(finite_mask(branch, depth - 1) for branch in node.inputs[1:])
