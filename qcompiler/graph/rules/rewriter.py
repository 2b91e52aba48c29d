"""What every rule of ``normalise`` works with: the graph, its taken names, and edits that keep the names of values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import DOMAIN
from qcompiler.graph.edit import value_names
from qcompiler.graph.functions import ensure_function

PARAMETER = "qcompiler.parameter"
"""Metadata key of an initializer: the name its parameter had in the model that came in."""
MAP = "qcompiler.map"
"""Metadata key of an initializer: what turns the parameter into it, a comma list of ``transpose``, ``one_plus``,
``scale:factor``, ``slice:axis:start:stop`` and ``item:index`` (one of the matrices along the first of three axes)."""
TIED = "qcompiler.tied"
"""Metadata key of a Linear's weight: the name of the embedding initializer it is a copy of."""


class Rewriter:
    """A graph under rewriting.

    Attributes:
        model: the model; functions of ours are registered in it when first called.
        graph: its main graph, the only one that is rewritten.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph
        self._taken = value_names(model.graph)
        self._node_names = {node.name for node in model.graph if node.name}
        self._shared: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def nodes(self, *op_types: str, domain: str = "") -> Iterator[ir.Node]:
        """The nodes of these types that are still in the graph when their turn comes, in graph order."""
        for node in list(self.graph):
            if node.domain == domain and node.op_type in op_types and node.graph is not None:
                yield node

    def fresh(self, name: str) -> str:
        """``name``, with a number behind it if it is taken; it is taken from now on."""
        candidate, number = name, 2
        while candidate in self._taken:
            candidate, number = f"{name}_{number}", number + 1
        self._taken.add(candidate)
        return candidate

    def _fresh_node_name(self, name: str) -> str:
        candidate, number = name, 2
        while candidate in self._node_names:
            candidate, number = f"{name}_{number}", number + 1
        self._node_names.add(candidate)
        return candidate

    def initializer(self, name: str, array: npt.NDArray[Any], like: ir.Value | None = None, map_: str = "") -> ir.Value:
        """A new initializer; with ``like``, one made from that initializer by ``map_``, which is recorded on it."""
        # ascontiguousarray would make a scalar a vector
        return self.tensor(name, ir.tensor(np.asarray(array, order="C")), like, map_)

    def tensor(self, name: str, tensor: ir.TensorProtocol, like: ir.Value | None = None, map_: str = "") -> ir.Value:
        """As :meth:`initializer`, of numbers wherever they lie."""
        tensor.name = name = self.fresh(name)
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        if like is not None:
            value.metadata_props.update(like.metadata_props)
            value.metadata_props.setdefault(PARAMETER, like.name or "")
            maps = [part for part in (like.metadata_props.get(MAP, ""), map_) if part]
            if maps:
                value.metadata_props[MAP] = ",".join(maps)
        self.graph.register_initializer(value)
        return value

    def rename_initializer(self, value: ir.Value, name: str) -> None:
        """Another name for an initializer; the old one is free again."""
        old = value.name
        value.name = self.fresh(name)
        if old is not None:
            self._taken.discard(old)

    def stand_in(self, value: ir.Value, array: npt.NDArray[Any]) -> ir.Value:
        """An initializer in the place of a computed value that turned out constant; it gets the name and all uses."""
        name = value.name or "constant"
        value.name = self.fresh(f"{name}/folded")
        self._taken.discard(name)
        initializer = self.initializer(name, array)
        value.replace_all_uses_with(initializer)
        return initializer

    def constant(self, array: npt.NDArray[Any], name: str = "constant") -> ir.Value:
        """An initializer for a small constant that is nobody's weight; equal ones are shared."""
        array = np.asarray(array)
        key = (array.dtype.str + array.dtype.name, array.shape, array.tobytes())
        if key not in self._shared:
            self._shared[key] = self.initializer(name, array)
        return self._shared[key]

    def insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        name: str | None = None,
        shape: ir.Shape | None = None,
        dtype: ir.DataType | None = None,
        outputs: int = 1,
    ) -> ir.Value:
        """Place a new node before ``before``; returns its first output."""
        attributes = {key: value for key, value in (attributes or {}).items() if value is not None}
        name = name or f"{before.name}/{op_type}"
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, num_outputs=outputs, name=name)
        for output in node.outputs:
            output.name = self.fresh(name)
        node.name = self._fresh_node_name(name)
        node.metadata_props.update(before.metadata_props)
        first = node.outputs[0]
        first.shape = shape
        dtype = dtype or next((v.dtype for v in inputs if v is not None and v.dtype is not None), None)
        if dtype is not None:
            first.type = ir.TensorType(dtype)
        self.graph.insert_before(before, node)
        if domain == DOMAIN:
            ensure_function(self.model, op_type)
        return first

    def replace(
        self,
        old: ir.Value,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
    ) -> ir.Node:
        """Compute ``old`` by a new node in the place of its producer: its name, type, shape and users pass on.

        Other outputs of the old producer must be without use; what fed it dies with the next sweep of dead nodes.
        """
        producer = old.producer()
        assert producer is not None
        name = producer.name
        new = self.insert(producer, op_type, inputs, attributes, domain=domain, name=name)
        self.take_over(old, new)
        node = new.producer()
        assert node is not None
        if producer.graph is None:  # the old node is gone, its name is free
            node.name = name
        return node

    def take_over(self, old: ir.Value, new: ir.Value) -> None:
        """Let ``new`` stand for the computed value ``old``: it gets its name, its users and what is known of it."""
        name = old.name
        producer = old.producer()
        assert producer is not None
        if new.type is None or old.type is not None:
            new.type = old.type
        if old.shape is not None:
            new.shape = old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = self.fresh(f"{name}/old")
        new.name = name
        if not any(output.uses() or output.is_graph_output() for output in producer.outputs):
            self.graph.remove(producer, safe=True)

    def bypass(self, old: ir.Value, source: ir.Value) -> bool:
        """Let the users of ``old`` read ``source``; a graph output keeps its name, and stays where it must."""
        if old.is_graph_output():
            if source.is_graph_input() or source.is_initializer() or source.is_graph_output():
                return False
            self.take_over(old, source)
            return True
        if source.shape is None:
            source.shape = old.shape
        if source.type is None:
            source.type = old.type
        producer = old.producer()
        old.replace_all_uses_with(source)
        if producer is not None and not any(output.uses() or output.is_graph_output() for output in producer.outputs):
            self.graph.remove(producer, safe=True)
        return True
