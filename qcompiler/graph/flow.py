"""Which weights may absorb a scale or a shift: found by pushing channel labels through the graph (DESIGN.md section 3).

No model is known by name. Every source (a norm, a Mul by a constant vector, a Linear) is tried: its output's channels
are labelled 0 .. C-1, the labels travel through carriers (``carriers.py``) on concrete small shapes, and end at sinks
(Linears whose input channels carry them) or at blockers. A blocked label keeps scale 1, the others stay usable.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import Note
from qcompiler.graph.carriers import carry
from qcompiler.graph.fold_site import FoldSite, Sink
from qcompiler.graph.labels import NONE, Labels, Step
from qcompiler.graph.linear import as_linear
from qcompiler.graph.shapes import OTHER_SIZES, SIZES, Fact, Facts, Sizes, concrete_shapes
from qcompiler.graph.sources import Source, as_source


def analyse(model: ir.Model) -> list[FoldSite]:
    """Every source of the main graph that reaches at least one sink, in graph order.

    A site whose channels are all blocked is listed as well: its ``blockers`` say why, and its scale may still be
    inserted (``absorb.insert_scale``). The model is not changed and no weight is read.
    """
    others = _sites(model, OTHER_SIZES)
    return [_agreed(site, others.get(node)) for node, site in _sites(model, SIZES).items()]


def _sites(model: ir.Model, sizes: Sizes) -> dict[ir.Node, FoldSite]:
    facts = concrete_shapes(model, sizes)
    order = {node: i for i, node in enumerate(model.graph)}
    sites = {}
    for node in model.graph:
        source = as_source(node)
        if source is not None and _floating(source.value, facts):
            site = _Flow(model.graph, facts, order, source).run()
            if site is not None:
                sites[node] = site
    return sites


def _agreed(site: FoldSite, other: FoldSite | None) -> FoldSite:
    """The site with everything blocked that another batch and sequence size would block; all, where sinks differ."""
    columns = [] if other is None else [(sink.linear, sink.columns.tolist()) for sink in other.sinks]
    if other is not None and columns == [(sink.linear, sink.columns.tolist()) for sink in site.sinks]:
        scale, shift, notes = other.scale_blocked, other.shift_blocked, other.blockers
    else:
        scale = shift = np.ones(site.channels, dtype=bool)
        notes = (Note(_name(site.source), "scale and shift blocked", "what reads it depends on the input's size"),)
    return dataclasses.replace(
        site,
        scale_blocked=site.scale_blocked | scale,
        shift_blocked=site.shift_blocked | shift,
        blockers=tuple(dict.fromkeys((*site.blockers, *notes))),
    )


def _floating(value: ir.Value, facts: Facts) -> bool:
    fact = facts.get(value.name or "")
    return fact is not None and fact.dtype.is_floating_point() and len(fact.shape) > 0


class _Flow:
    """The labels of one source on their way through the graph."""

    def __init__(self, graph: ir.Graph, facts: Facts, order: Mapping[ir.Node, int], source: Source) -> None:
        self.graph, self.facts, self.order, self.source = graph, facts, order, source
        self.labels: dict[ir.Value, Labels] = {}
        self.sinks: list[Sink] = []
        self.scale_blocked = np.zeros(source.channels, dtype=bool)
        self.shift_blocked = np.zeros(source.channels, dtype=bool)
        self.notes: dict[Note, None] = {}
        self.weights = [source.weight[0].inputs[source.weight[1]]]
        self.boundary: dict[str, Fact] = {}
        self.queue: list[tuple[int, ir.Node]] = []
        self.queued: set[ir.Node] = set()

    def run(self) -> FoldSite | None:
        value = self.source.value
        shape = self.facts[value.name or ""].shape
        if shape[-1] != self.source.channels:
            return None
        for outside in self.source.node.inputs:
            self._outside(outside)
        self._arrive(value, np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape))
        while self.queue:
            self._visit(heapq.heappop(self.queue)[1])
        if not self.sinks:
            return None
        if self.source.no_shift:
            self._block_shift(np.arange(self.source.channels), self.source.node, self.source.no_shift)
        return FoldSite(
            value,
            self.source.node,
            self.source.kind,
            self.source.channels,
            tuple(self.sinks),
            self.scale_blocked,
            self.shift_blocked,
            tuple(self.notes),
            tuple(value.name or "" for value in self.weights if value is not None),
            self.boundary,
        )

    def _arrive(self, value: ir.Value, labels: Labels) -> None:
        """A value carries labels: queue whoever reads it, in graph order, so that a node sees all labels it reads."""
        self.labels[value] = labels
        if value.is_graph_output():
            self._block(labels, self.source.node, f"{value.name!r} is an output of the model")
        for node, _ in value.uses():
            if node.graph is not self.graph:
                self._block(labels, node, f"{value.name!r} is read inside a subgraph")
            elif node not in self.queued:
                self.queued.add(node)
                heapq.heappush(self.queue, (self.order[node], node))

    def _visit(self, node: ir.Node) -> None:
        labels = [self.labels.get(value) if value is not None else None for value in node.inputs]
        if self._is_sink(node, labels):
            self._sink(node, labels[0])
            return
        step = Step(node, [self._still_free(array) for array in labels], self.facts)
        if all(array is None for array in step.labels):
            return
        outputs = carry(step)
        for blocked, why in step.blocked:
            self._block(blocked, node, why)
        for blocked, why in step.shift_blocked:
            self._block_shift(blocked, node, why)
        for output, carried in zip(node.outputs, outputs, strict=True):
            if carried is not None and (carried >= 0).any():
                self._arrive(output, carried)
                self._remember_outside(node)

    def _still_free(self, labels: Labels | None) -> Labels | None:
        """The labels without those blocked so far: their scale is 1, so they are as good as unlabelled."""
        if labels is None or not self.scale_blocked.any():
            return labels
        table = np.append(np.where(self.scale_blocked, NONE, np.arange(self.source.channels)), NONE).astype(np.int32)
        free = table[labels]
        return free if (free >= 0).any() else None

    def _is_sink(self, node: ir.Node, labels: list[Labels | None]) -> bool:
        if node.op_type != "MatMul" or node.domain != "" or labels[0] is None or labels[1] is not None:
            return False
        weight = node.inputs[1]
        if weight is None or weight.is_graph_input() or not node.name:
            return False
        linear = as_linear(node)
        if linear is not None:
            return linear.weight_quant is None and linear.activation_quant is None
        return weight.is_initializer() and _rank(weight) > 2

    def _sink(self, node: ir.Node, labels: Labels | None) -> None:
        assert labels is not None
        rows = labels.reshape(-1, labels.shape[-1])
        mixed = (rows != rows[0]).any(axis=0)
        if mixed.any():
            self._block(rows[:, mixed], node, "its channels differ between positions")
        columns = np.where(mixed, np.int32(-1), rows[0]).astype(np.int32)
        weight = node.inputs[1]
        assert weight is not None
        if _rank(weight) > 2:
            self._block_shift(columns, node, "its weight has more than two axes")
        self.sinks.append(Sink(node.name or "", columns))
        self.weights.append(weight)

    def _remember_outside(self, node: ir.Node) -> None:
        for i, value in enumerate(node.inputs):
            if value is not None and value not in self.labels:
                computed = ir.convenience.get_const_tensor(value) is None  # a constant [-1, n] may serve many sizes
                if node.op_type in ("Reshape", "Expand") and i == 1 and computed:
                    shape = np.array(self.facts[node.outputs[0].name or ""].shape, dtype=np.int64)
                    self.boundary[value.name or ""] = Fact(shape.shape, ir.DataType.INT64, shape)
                elif (producer := value.producer()) is not None and producer.op_type == "Softmax":
                    self._outside(producer.inputs[0])  # a shift counts on its rows summing to 1: it stays in the region
                else:
                    self._outside(value)

    def _outside(self, value: ir.Value | None) -> None:
        if value is not None and ir.convenience.get_const_tensor(value) is None:
            fact = self.facts.get(value.name or "")
            if fact is not None:
                self.boundary[value.name or ""] = fact

    def _block(self, labels: npt.NDArray[np.integer], node: ir.Node, why: str) -> None:
        channels = np.unique(labels[labels >= 0])
        if not self.scale_blocked[channels].all():
            self.scale_blocked[channels] = True
            self.shift_blocked[channels] = True
            self.notes[Note(_name(node), "scale and shift blocked", why)] = None

    def _block_shift(self, labels: npt.NDArray[np.integer], node: ir.Node, why: str) -> None:
        channels = np.unique(labels[labels >= 0])
        if not self.shift_blocked[channels].all():
            self.shift_blocked[channels] = True
            self.notes[Note(_name(node), "shift blocked", why)] = None


def _name(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or node.op_type


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 0
