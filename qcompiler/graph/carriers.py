"""How channel labels travel through one node: the table of carriers (DESIGN.md section 3).

A label array has the shape of its value and holds, for each element, the source channel whose 1/scale (and shift) the
element carries, or -1 for none. A rule of the table turns labels of inputs into labels of outputs; whatever it cannot
carry it blocks, with the reason. An operator without a rule blocks everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import DOMAIN
from qcompiler.graph.edit import array_of
from qcompiler.graph.shapes import Fact, Facts

Labels = npt.NDArray[np.int32]

NONE = np.int32(-1)


@dataclasses.dataclass
class Step:
    """One node met by labels: what comes in, and what had to be blocked.

    Attributes:
        labels: one array an input, None where the input carries none.
        blocked: (labels, why) pairs for which neither scale nor shift may pass.
        shift_blocked: the same for the shift alone.
    """

    node: ir.Node
    labels: list[Labels | None]
    facts: Facts
    blocked: list[tuple[Labels, str]] = dataclasses.field(default_factory=list)
    shift_blocked: list[tuple[Labels, str]] = dataclasses.field(default_factory=list)

    def block_all(self, why: str) -> list[Labels | None]:
        """Block every label that reaches this node; nothing travels on."""
        self.blocked.extend((labels, why) for labels in self.labels if labels is not None)
        return [None] * len(self.node.outputs)

    def block_shift(self, why: str) -> None:
        """The scale passes, the shift of every label here does not."""
        self.shift_blocked.extend((labels, why) for labels in self.labels if labels is not None)

    def fact(self, index: int) -> Fact | None:
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return self.facts.get(value.name or "") if value is not None else None

    def numbers(self, index: int) -> npt.NDArray[np.generic] | None:
        fact = self.fact(index)
        return fact.numbers if fact is not None else None

    def shape(self, output: int = 0) -> tuple[int, ...]:
        return self.facts[self.node.outputs[output].name or ""].shape

    def attribute(self, name: str, default: int) -> int:
        return self.node.attributes[name].as_int() if name in self.node.attributes else default


Rule = Callable[[Step], "list[Labels | None]"]


def carry(step: Step) -> list[Labels | None]:
    """Labels of the node's outputs; what cannot be carried is recorded in ``step``."""
    node = step.node
    rule = _RULES.get((node.domain, node.op_type))
    if rule is None:
        return step.block_all(f"{node.op_type} does not commute with a scale by channel")
    if rule is not _neutral and any(output.uses() and output.name not in step.facts for output in node.outputs):
        return step.block_all(f"the shape that {node.op_type} gives is not known")
    return rule(step)


def constant_along(labels: Labels, axis: int) -> bool:
    """Whether the labels are the same at every position of that axis."""
    first = np.take(labels, [0], axis=axis)
    return bool((labels == first).all())


def _data(step: Step) -> Labels | None:
    """The labels of input 0 where no other input carries any; else None, and all is blocked."""
    if step.labels[0] is None or any(labels is not None for labels in step.labels[1:]):
        step.block_all(f"{step.node.op_type} reads it as something else than data")
        return None
    return step.labels[0]


def _neutral(step: Step) -> list[Labels | None]:
    return [None] * len(step.node.outputs)  # reads the shape, not the numbers


def _reshape(step: Step) -> list[Labels | None]:
    labels = _data(step)
    return [None if labels is None else labels.reshape(step.shape())]


def _cast(step: Step) -> list[Labels | None]:
    if not ir.DataType(step.attribute("to", 1)).is_floating_point():
        return step.block_all("Cast to a type that is not floating point")
    return _reshape(step)


def _transpose(step: Step) -> list[Labels | None]:
    labels = _data(step)
    if labels is None:
        return [None]
    perm = step.node.attributes["perm"].as_ints() if "perm" in step.node.attributes else range(labels.ndim)[::-1]
    return [labels.transpose(tuple(perm))]


def _expand(step: Step) -> list[Labels | None]:
    labels = _data(step)
    return [None if labels is None else np.broadcast_to(labels, step.shape())]


def _slice(step: Step) -> list[Labels | None]:
    labels = _data(step)
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
    labels = _data(step)
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
    labels, indices = _data(step), step.fact(1)
    if labels is None or indices is None:
        return [None]
    axis = step.attribute("axis", 0)
    if indices.numbers is not None:
        return [np.take(labels, indices.numbers.astype(np.int64), axis=axis)]
    if not constant_along(labels, axis):
        return step.block_all("Gather picks among channels by data")
    return [np.take(labels, np.zeros(indices.shape, dtype=np.int64), axis=axis)]


def _gather_nd(step: Step) -> list[Labels | None]:
    labels, indices = _data(step), step.fact(1)
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


def _positive_homogeneous(step: Step) -> list[Labels | None]:
    step.block_shift(f"{step.node.op_type} commutes with a positive scale, not with a shift")
    return _reshape(step)


def _product(step: Step) -> list[Labels | None]:
    a, b = step.labels
    if b is not None and (a is not None or step.node.op_type == "Div"):
        return step.block_all(f"{step.node.op_type} of it with itself or as divisor is not linear in it")
    step.block_shift(f"{step.node.op_type} scales a shift")
    labels = a if a is not None else b
    assert labels is not None
    return [np.broadcast_to(labels, step.shape())]


def _sum(step: Step) -> list[Labels | None]:
    """Sum of two values: allowed where both carry the same label, so that the sum carries it too."""
    shape = step.shape()
    a, b = (np.broadcast_to(NONE if labels is None else labels, shape) for labels in step.labels)
    same = a == b
    if not same.all():
        why = f"{step.node.op_type} with a value that does not carry the same scale"
        step.blocked.extend((side[~same], why) for side in (a, b))
    step.block_shift(f"{step.node.op_type} changes a shift")
    return [np.where(same, a, NONE)]


def _where(step: Step) -> list[Labels | None]:
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


def _reduce(step: Step) -> list[Labels | None]:
    labels, axes = _data(step), step.numbers(1)
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


def _mixture(step: Step) -> list[Labels | None]:
    """P @ V with labels on V: rows of V are mixed, columns are not."""
    left, right = step.labels
    if right is None or left is not None:
        return step.block_all("MatMul with a weight that is not constant")
    softmax = step.node.inputs[0].producer() if step.node.inputs[0] is not None else None
    if softmax is None or softmax.op_type != "Softmax" or step_axis(softmax) not in (-1, _rank(step, 0) - 1):
        step.block_shift("the rows of the matrix that multiplies it are not known to sum to 1")
    return _mix_rows(step, right)


def step_axis(softmax: ir.Node) -> int:
    """The axis that a Softmax node normalises."""
    return softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1


def _rank(step: Step, index: int) -> int:
    fact = step.fact(index)
    return -1 if fact is None else len(fact.shape)


def _mix_rows(step: Step, values: Labels) -> list[Labels | None]:
    if values.ndim < 2 or not constant_along(values, -2):
        return step.block_all(f"{step.node.op_type} sums over its channels")
    return [np.broadcast_to(values[..., :1, :], step.shape())]


def _attention(step: Step) -> list[Labels | None]:
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


_RULES: dict[tuple[str, str], Rule] = {
    **{("", name): _reshape for name in ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")},
    **{("", name): _neutral for name in ("Shape", "Size")},
    **{("", name): _positive_homogeneous for name in ("Relu", "LeakyRelu")},
    **{("", name): _product for name in ("Mul", "Div")},
    **{("", name): _sum for name in ("Add", "Sub")},
    **{("", name): _reduce for name in ("ReduceMean", "ReduceSum")},
    **{(DOMAIN, name): _attention for name in ("Attention", "MaskedAttention")},
    ("", "Cast"): _cast,
    ("", "Transpose"): _transpose,
    ("", "Expand"): _expand,
    ("", "Slice"): _slice,
    ("", "Split"): _split,
    ("", "Concat"): _concat,
    ("", "Gather"): _gather,
    ("", "GatherND"): _gather_nd,
    ("", "Where"): _where,
    ("", "MatMul"): _mixture,
}
