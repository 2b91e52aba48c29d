"""Bases of channels: all values whose last axis must be ordered alike, and the constants that order it.

An order of channels passes through more than a scale (``flow.py``) or a rotation (``residual.py``) does: through every
operator that works element by element, GELU and a gate's product included, through norms with their weights, through
sums and moves of positions. So the hidden units of an MLP are one basis, from the columns of its first Linear to the
rows of its second, and a residual stream is another, from the embedding tables to the head. No model is known by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import array_of
from qcompiler.graph.functions import is_call
from qcompiler.graph.stream_ends import connected, conv_behind, is_norm, moves, width

_SHAPES = frozenset({"Shape", "Size"})
_REDUCTIONS = frozenset(
    {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare"}
)
_ELEMENTWISE = (
    "Abs Add Cast Clip Div Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Log Max Min Mish Mul Neg PRelu Pow "
    "Reciprocal Relu Selu Sigmoid Softplus Softsign Sqrt Sub Tanh ThresholdedRelu Where"
)


@dataclasses.dataclass(frozen=True)
class End:
    """A constant that a basis orders: input ``slot`` of ``node``, along ``axis``; None: it names channels."""

    node: ir.Node
    slot: int
    axis: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """Values whose last axes are one set of channels, and what orders them.

    Attributes:
        name: the value at which it was found, the input of its first reader.
        channels: its width.
        members: the values.
        ends: the constants: columns of Linears that write it (and biases, norms, tables), rows of those that read it.
        readers: the MatMuls that read it against a constant weight, in graph order.
        outputs: members that are outputs of the model, where the given order must be restored.
        refused: why it cannot be ordered at all, or "".
    """

    name: str
    channels: int
    members: tuple[ir.Value, ...]
    ends: tuple[End, ...]
    readers: tuple[ir.Node, ...]
    outputs: tuple[ir.Value, ...]
    refused: str


def find_bases(model: ir.Model) -> list[Basis]:
    """Every basis that a MatMul reads against a constant weight, in the order of these.

    The model is not changed and no weight is read. Linears that are called again with the same weight belong to one
    basis on either side: one order keeps the weight shared.
    """
    seen: set[ir.Value] = set()
    bases = []
    for node in model.graph:
        x = node.inputs[0] if _is_product(node) else None
        if x is not None and x not in seen and (width(x) or 0) > 1:
            walk = _Walk(model.graph, x)
            seen |= set(walk.members)
            bases.append(walk.basis())
    return bases


class _Walk:
    """All values that must be ordered with one."""

    def __init__(self, graph: ir.Graph, start: ir.Value) -> None:
        self.graph, self.start = graph, start
        self.channels = width(start) or 0
        self.ends: dict[End, None] = {}
        self.readers: set[ir.Node] = set()
        self.refused: dict[str, None] = {}
        self.members = connected(start, lambda value: (*self._behind(value), *self._ahead(value)))

    def basis(self) -> Basis:
        return Basis(
            self.start.name or "",
            self.channels,
            tuple(self.members),
            tuple(self.ends),
            tuple(node for node in self.graph if node in self.readers),
            tuple(value for value in self.members if value.is_graph_output()),
            "; ".join(self.refused),
        )

    def _behind(self, value: ir.Value) -> Iterator[ir.Value]:
        """Members that ``value`` is made of; constants among them are ends."""
        node = value.producer()
        if node is None or node.graph is not self.graph:
            self.refused[f"{value.name!r} comes from outside"] = None
        elif node.op_type == "Expand" and node.domain == "" and width(node.inputs[0]) in (0, 1):
            return  # the same in every channel
        elif _is_product(node):
            yield from self._end(node, 1, -1)
        elif (conv := conv_behind(node)) is not None:
            self.ends[End(conv, 1, 0)] = None
            if len(conv.inputs) > 2 and conv.inputs[2] is not None:
                self.ends[End(conv, 2, 0)] = None
        elif (slots := ordered_inputs(node, self.channels)) is not None:
            for slot in slots:
                operand = node.inputs[slot]
                assert operand is not None
                if array_of(operand) is not None:
                    yield from self._end(node, slot, -1)
                else:
                    yield operand
        else:
            self.refused[f"{node.op_type} {node.name or value.name!r} makes it"] = None

    def _ahead(self, value: ir.Value) -> Iterator[ir.Value]:
        """Members that are made of ``value``; Linears that read it are ends."""
        for node, slot in value.uses():
            if node.graph is not self.graph:
                self.refused[f"{value.name!r} is read inside a subgraph"] = None
            elif slot == 0 and _is_product(node):
                self.readers.add(node)
                yield from self._end(node, 1, -2)
            elif slot in (ordered_inputs(node, self.channels) or ()):
                yield node.outputs[0]
            elif slot == 0 and _picks_channels(node):
                self.ends[End(node, 1, None)] = None
            elif not _takes_any_order(node, slot):
                self.refused[f"{node.op_type} {node.name or node.outputs[0].name!r} reads it"] = None

    def _end(self, node: ir.Node, slot: int, axis: int) -> Iterator[ir.Value]:
        """Note a constant; whoever else uses a matrix the same way is of the same basis, so that it stays shared."""
        end = End(node, slot, axis)
        if end in self.ends:
            return
        self.ends[end] = None
        constant = node.inputs[slot]
        assert constant is not None
        assert constant.shape is not None
        if math.prod(constant.shape.numpy()) == self.channels:
            return  # exporters share vectors between places that have nothing to do with each other
        for other, its in constant.uses():
            if other.graph is not self.graph or (other, its) == (node, slot):
                continue
            if its == 1 and _is_product(other):
                value = other.outputs[0] if axis == -1 else other.inputs[0]
                if width(value) == self.channels:
                    assert value is not None
                    yield value
            elif axis == -1 and its in (ordered_inputs(other, self.channels) or ()):
                yield other.outputs[0]


def ordered_inputs(node: ir.Node, channels: int) -> tuple[int, ...] | None:
    """Which inputs must be ordered as the output is; None where the output's channels are no order of an input's."""
    if not node.outputs or width(node.outputs[0]) != channels:
        return None
    if is_call(node, "RMSNorm") or (node.op_type == "LayerNormalization" and node.domain == ""):
        return tuple(range(len(node.inputs))) if is_norm(node) and None not in node.inputs else None
    if node.domain != "":
        return None
    if node.op_type in _ELEMENTWISE.split():
        sizes = [None if value is None else width(value) for value in node.inputs]
        known = all(
            size in (0, 1, channels) for size, value in zip(sizes, node.inputs, strict=True) if value is not None
        )
        return tuple(slot for slot, size in enumerate(sizes) if size == channels) if known else None
    if node.op_type == "Concat":
        axis, rank = node.attributes["axis"].as_int(), len(node.outputs[0].shape or ())
        return None if axis in (-1, rank - 1) else tuple(range(len(node.inputs)))
    if node.op_type in _REDUCTIONS:
        return (0,) if _reduces_channels(node) is False else None
    return (0,) if moves(node, channels) else None


def _picks_channels(node: ir.Node) -> bool:
    """A Gather of channels that are named by a constant, as ``split`` leaves it."""
    if node.op_type != "Gather" or node.domain != "" or array_of(node.inputs[1]) is None:
        return False
    rank = len(node.inputs[0].shape or ()) if node.inputs[0] is not None else 0
    return node.attributes.get_int("axis", 0) in (-1, rank - 1)


def _takes_any_order(node: ir.Node, slot: int) -> bool:
    """Whether the node's outputs are the same for any order of the channels of its input ``slot``."""
    if node.domain != "" or slot != 0:
        return False
    return node.op_type in _SHAPES or (node.op_type in _REDUCTIONS and _reduces_channels(node) is True)


def _reduces_channels(node: ir.Node) -> bool | None:
    """Whether a reduction is over the last axis, among others; None where that is not known."""
    x, axes = node.inputs[0], array_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if x is None or x.shape is None or axes is None or not axes.size:
        return None
    return bool({-1, len(x.shape) - 1} & set(np.ravel(axes).tolist()))


def _is_product(node: ir.Node) -> bool:
    """A MatMul by a constant weight [..., in, out] in float."""
    if node.op_type != "MatMul" or node.domain != "":
        return False
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer() or weight.is_graph_input() or weight.is_graph_output():
        return False
    return len(weight.shape or ()) > 1 and (weight.dtype is None or weight.dtype.is_floating_point())
