"""A model run over the data piece by piece, so that the weights of each piece may be chosen when its inputs are known.

Every node runs once for each batch. Between two pieces, what later nodes read is kept: a few values a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.collect import MASK, samples_in, unpadded
from qcompiler.calibration.observers.base import Rows, Samples, not_finite
from qcompiler.core import DataError
from qcompiler.graph.experts import chosen
from qcompiler.graph.run import Feeds, Runner

Arrays = dict[str, npt.NDArray[Any]]


class Walk:
    """Goes through a graph in its order, from value to value.

    Nodes that have not run yet may be given other constants meanwhile; none may be added or removed.

    Args:
        model: any stage of the pipeline.
        batches: feeds of the model; they are kept in memory, as the values between two pieces are.
        threads: intra-op threads; 0 leaves the number to ONNX Runtime.

    Raises:
        DataError: there is no data.
    """

    def __init__(self, model: ir.Model, batches: Iterable[Feeds], threads: int = 0) -> None:
        self._model = model
        self._nodes = list(_constants_late(model.graph))
        self._place = {node: i for i, node in enumerate(self._nodes)}
        self._feeds = [{name: np.asarray(array) for name, array in feeds.items()} for feeds in batches]
        if not self._feeds:
            raise DataError("the calibration data is empty: give at least one batch.")
        self._live: list[Arrays] = [dict(feeds) for feeds in self._feeds]
        self._done = 0
        self._threads = threads

    def place(self, value: ir.Value) -> int:
        """How far in the graph a value is computed; -1 for what it is fed."""
        producer = value.producer()
        return -1 if producer is None else self._place[producer]

    def rows(self, value: ir.Value) -> Iterator[tuple[Rows, Samples]]:
        """A value's rows without padding, float32 [rows, channels], and the sample of each row, batch by batch.

        Everything up to the value is run first. Values are asked for in the graph's order, before their readers run.

        Raises:
            DataError: the value is NaN or infinite somewhere.
            ModelError: the run fails.
        """
        part = chosen(value)
        self._advance(value, () if part is None else (part.rows, part.inverse))
        first = 0
        for index, (feeds, live) in enumerate(zip(self._feeds, self._live, strict=True)):
            count = samples_in(feeds)
            place = None if part is None else (live[part.rows.name or ""], len(live[part.inverse.name or ""]))
            rows, samples = unpadded(live[value.name or ""], feeds.get(MASK), count, place)
            if (fault := not_finite(rows)) is not None:
                raise DataError(f"value {value.name!r} holds {fault} in calibration batch {index}.")
            yield rows, samples + first
            first += count

    def _advance(self, value: ir.Value, beside: Sequence[ir.Value]) -> None:
        """Run everything up to the value; those beside it, on which it depends, are there afterwards too."""
        stop = self.place(value) + 1
        if stop <= self._done:
            return
        wanted = list(dict.fromkeys([*self._read_from(stop), *beside]))
        made = {output for node in self._nodes[self._done : stop] for output in node.outputs}
        given = [v for v in self._read_from(self._done) if v.name in self._live[0]]
        runner = Runner(self._piece(given, [v for v in wanted if v in made]), threads=self._threads)
        kept = {v.name for v in wanted} & set(self._live[0])
        for index, live in enumerate(self._live):
            results = runner({name: live[name] for name in runner.inputs})
            self._live[index] = {**{name: live[name] for name in kept if name is not None}, **results}
        self._done = stop

    def _read_from(self, start: int) -> list[ir.Value]:
        """The values that nodes from there on, or the model's outputs, read and that are computed or fed before."""
        made = {output for node in self._nodes[start:] for output in node.outputs}
        read = dict.fromkeys(v for node in self._nodes[start:] for v in _reads(node))
        read |= dict.fromkeys(self._model.graph.outputs)
        return [v for v in read if v not in made and not (v.is_initializer() and not v.is_graph_input())]

    def _piece(self, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
        graph = ir.convenience.extract(self._model.graph, inputs, outputs)
        for value in graph.inputs:
            array = self._live[0][value.name or ""]
            value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
            value.shape = ir.Shape([None] * array.ndim)
        return ir.Model(graph, ir_version=self._model.ir_version, functions=list(self._model.functions.values()))


def _constants_late(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes, those that compute from constants alone each right before what reads it.

    The fake-quant of a weight may stand long before its MatMul; run at its place, it would show the weight as it was
    before its turn came.
    """
    fed = set(graph.inputs)
    for node in graph:
        if any(value in fed for value in _reads(node)):
            fed.update(node.outputs)
    waiting = {node for node in graph if not fed.intersection(node.outputs)}

    def due(node: ir.Node) -> Iterator[ir.Node]:
        for value in _reads(node):
            producer = value.producer()
            if producer in waiting:
                assert producer is not None
                waiting.remove(producer)
                yield from due(producer)
        yield node

    for node in graph:
        if fed.intersection(node.outputs):
            yield from due(node)
    yield from (node for node in graph if node in waiting)


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, through its subgraphs too."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for child in attribute.as_graph().all_nodes():
                yield from (value for value in child.inputs if value is not None)
