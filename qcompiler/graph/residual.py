"""Residual streams, found by data flow: sums of many Linears' outputs that only norms read.

A stream is one basis of channels: all values that additions, per-position factors and moves of positions connect with a
norm's input. It may be rotated (QuaRot, Ashkboos et al. 2024, section 4) where everything that writes it can be
multiplied by Q, and everything that reads it is a norm whose own readers are Linears. No model is known by name. Ends
that are no Linears can be bridged by a Linear of channels x channels, at a price that the finder states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.stream_ends import adds_positions, connected, conv_behind, is_norm, is_table, moves, width

_SHAPES = ("Shape", "Size")


@dataclasses.dataclass(frozen=True, eq=False)
class Writer:
    """A constant that makes values of the stream, or a value that is made by something else and must be bridged.

    Attributes:
        kind: "linear" (weight [in, channels] and bias), "table" (Gather's data [rows, channels]), "conv" (weight
            [channels, ...] and bias), "constant" ([..., channels] or [..., 1]) or "bridge".
        node: reads the constant; None for a bridge.
        slot: which input of ``node`` the constant is.
        value: the value of the stream that it makes (a bridge: that is to be rotated at run time).
        linear: of kind "linear".
    """

    kind: str
    node: ir.Node | None
    slot: int
    value: ir.Value
    linear: Linear | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class NormReader:
    """A norm that reads the stream.

    Attributes:
        node: LayerNormalization or RMSNorm over the last axis, with constant weights.
        linears: the Linears that read its output, some through moves of positions.
        bridges: values, the norm's output or moved ones, that others read: they need the unrotated numbers.
    """

    node: ir.Node
    linears: tuple[Linear, ...]
    bridges: tuple[ir.Value, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """One residual stream.

    Attributes:
        name: its first value in graph order.
        channels: its width.
        writers, norms: all that write and read it.
        centred: its norms are LayerNormalizations, which take its mean over channels away: it may be left out before.
        refused: why it cannot be rotated at any price, or "".
    """

    name: str
    channels: int
    writers: tuple[Writer, ...]
    norms: tuple[NormReader, ...]
    centred: bool
    refused: str

    @property
    def linears(self) -> list[Linear]:
        """The Linears whose weights a rotation changes."""
        written = [writer.linear for writer in self.writers if writer.linear is not None]
        return written + [linear for norm in self.norms for linear in norm.linears]

    @property
    def bridges(self) -> list[ir.Value]:
        """Values after which a Linear of channels x channels would have to be put."""
        written = [writer.value for writer in self.writers if writer.kind == "bridge"]
        return written + [value for norm in self.norms for value in norm.bridges]

    @property
    def bridge_cost(self) -> float:
        """Multiplications in bridges against those in the stream's Linears."""
        work = sum(linear.in_features * linear.out_features for linear in self.linears)
        return len(self.bridges) * self.channels**2 / max(work, 1)


def find_streams(model: ir.Model) -> list[Stream]:
    """Every stream with at least one sum and a norm that Linears read.

    The model is not changed and no weight is read.
    """
    made_by = {linear.output: linear for linear in linears(model)}
    seen: set[ir.Value] = set()
    streams = []
    for node in model.graph:
        x = node.inputs[0] if is_norm(node) else None
        if x is not None and x not in seen:
            walk = _Walk(model.graph, made_by, x)
            seen |= set(walk.members)
            if walk.sums and any(norm.linears for norm in walk.norms):
                streams.append(walk.stream())
    return streams


class _Walk:
    """All values connected with one norm's input."""

    def __init__(self, graph: ir.Graph, made_by: Mapping[ir.Value, Linear], start: ir.Value) -> None:
        self.graph, self.made_by = graph, made_by
        self.channels = width(start) or 0
        self.writers: list[Writer] = []
        self.norms: list[NormReader] = []
        self.sums = 0
        self.refused: dict[str, None] = {}
        self.members = connected(start, lambda value: (*self._behind(value), *self._ahead(value)))

    def stream(self) -> Stream:
        order = {value: i for i, value in enumerate(value for node in self.graph for value in node.outputs)}
        kinds = {norm.node.op_type for norm in self.norms}
        reads = {linear.name for norm in self.norms for linear in norm.linears}
        for linear in (w.linear for w in self.writers if w.linear is not None):
            if linear.name in reads:
                self.refused[f"{linear.name!r} both reads and writes it"] = None
            if linear.weight_quant is not None:
                self.refused[f"{linear.name!r} is quantized already"] = None
        if len(kinds) > 1:
            self.refused["some of its norms take the mean away and others do not"] = None
        first = min(self.members, key=lambda value: order.get(value, -1))
        return Stream(
            first.name or "",
            self.channels,
            tuple(self.writers),
            tuple(self.norms),
            kinds == {"LayerNormalization"},
            "; ".join(self.refused),
        )

    def _behind(self, value: ir.Value) -> Iterator[ir.Value]:
        """Values in the same basis that ``value`` is made of; where there are none, its writer is noted."""
        node = value.producer()
        linear = self.made_by.get(value)
        if linear is not None:
            self.writers.append(Writer("linear", linear.matmul, 1, value, linear))
        elif node is not None and is_table(node):
            self.writers.append(Writer("table", node, 0, value))
        elif node is not None and (conv := conv_behind(node)) is not None:
            self.writers.append(Writer("conv", conv, 1, value))
        elif node is not None and (sides := self._sides(node)) is not None:
            self.sums += node.op_type in ("Add", "Sub") and len(sides) == 2
            for slot in sides:
                operand = node.inputs[slot]
                assert operand is not None
                if array_of(operand) is not None:
                    self.writers.append(Writer("constant", node, slot, value))
                else:
                    yield operand
        else:
            self.writers.append(Writer("bridge", None, 0, value))

    def _ahead(self, value: ir.Value) -> Iterator[ir.Value]:
        """Values in the same basis that are made of ``value``; norms are noted, and whatever else reads it."""
        if value.is_graph_output():
            self.refused[f"its value {value.name!r} is an output of the model"] = None
        for node, slot in value.uses():
            if node.graph is not self.graph:
                self.refused[f"{value.name!r} is read inside a subgraph"] = None
            elif node.op_type in _SHAPES and node.domain == "":
                continue
            elif slot == 0 and is_norm(node):
                self.norms.append(self._norm(node))
            elif slot in (self._sides(node) or ()):
                yield node.outputs[0]
            else:
                who = node.name or node.outputs[0].name
                self.refused[f"{node.op_type} {who!r} reads it, which is no norm"] = None

    def _norm(self, node: ir.Node) -> NormReader:
        found: list[Linear] = []
        bridges: dict[ir.Value, None] = {}
        pending = [node.outputs[0]]
        matmuls = {linear.matmul: linear for linear in self.made_by.values()}
        while pending:
            value = pending.pop()
            if value.is_graph_output():
                bridges[value] = None
            for reader, slot in value.uses():
                linear = matmuls.get(reader)
                if reader.op_type in _SHAPES and reader.domain == "":
                    continue
                if linear is not None and slot == 0 and linear.weight_quant is None:
                    found.append(linear)
                elif reader.graph is self.graph and slot == 0 and moves(reader, self.channels):
                    pending.append(reader.outputs[0])
                else:
                    bridges[value] = None
        return NormReader(node, tuple(found), tuple(bridges))

    def _sides(self, node: ir.Node) -> tuple[int, ...] | None:
        """Which inputs of the node are in the basis of its output; None where it does not keep a basis."""
        if node.domain != "" or not node.outputs or width(node.outputs[0]) != self.channels:
            return None
        if node.op_type in ("Add", "Sub"):
            wide = [width(value) == self.channels or array_of(value) is not None for value in node.inputs]
            return (0, 1) if all(wide) else None
        if node.op_type in ("Mul", "Div"):
            factors = [slot for slot, value in enumerate(node.inputs) if width(value) in (0, 1)]
            return (1 - factors[-1],) if factors and (node.op_type == "Mul" or factors[-1] == 1) else None
        if node.op_type == "Concat":
            axis, rank = node.attributes["axis"].as_int(), len(node.outputs[0].shape or ())
            return None if axis in (-1, rank - 1) else tuple(range(len(node.inputs)))
        return (
            (0,)
            if moves(node, self.channels) or (adds_positions(node) and width(node.inputs[0]) == self.channels)
            else None
        )
