"""What every rule of ``normalise`` works with: the graph, its taken names, and edits that keep the names of values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import DOMAIN
from qcompiler.graph.edit import array_of, value_names
from qcompiler.graph.functions import ensure_function

PARAMETER = "qcompiler.parameter"
"""Metadata key of an initializer: the name its parameter had in the model that came in."""
MAP = "qcompiler.map"
"""Metadata key of an initializer: what turns the parameter into it, a comma list of ``transpose``, ``one_plus``,
``scale:factor`` and ``slice:axis:start:stop``."""
TIED = "qcompiler.tied"
"""Metadata key of a Linear's weight: the name of the embedding initializer it is a copy of."""

SMALL = 4096
"""Constants up to this many elements are looked at and folded; larger ones are weights and stay where they are."""
SMALL_MASK = 1 << 18
"""The same for booleans and integers: masks of 512 by 512."""


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


def lowest(dtype: ir.DataType) -> float:
    """The lowest finite number of a floating type."""
    return float(ml_dtypes.finfo(dtype.numpy()).min)


# --- reading patterns ---


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The standard operator of one of these types whose first output this is, or None."""
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or node.op_type not in op_types or node.outputs[0] is not value:
        return None
    return node


def other_input(node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    """The input of a binary operator that is not ``value``; for x·x that is x."""
    first, second = node.inputs
    return second if first is value else first


def small_array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The numbers of a constant of at most ``SMALL`` elements; larger ones are not read from disk."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return None
    if tensor.size > (SMALL if tensor.dtype.is_floating_point() else SMALL_MASK):
        return None
    return array_of(value)


def number(value: ir.Value | None) -> float | None:
    """The number behind a constant of one element, or None."""
    array = small_array(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def with_number(node: ir.Node | None) -> tuple[ir.Value, float] | None:
    """A binary operator on x and a number, in either order: (x, number)."""
    if node is None or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    if first is not None and (c := number(second)) is not None:
        return first, c
    if second is not None and (c := number(first)) is not None:
        return second, c
    return None


def rank(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None


def last_dim(value: ir.Value | None) -> int | None:
    """The static size of the last axis, or None."""
    if value is None or value.shape is None or not len(value.shape):
        return None
    dim = value.shape[-1]
    return dim if isinstance(dim, int) else None


def dims(value: ir.Value | None) -> list[int | str | None] | None:
    """Axis sizes as numbers, symbols' names, or None where nothing is known; None for an unknown rank."""
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def is_vector(value: ir.Value | None, size: int | None = None) -> bool:
    """Whether this is an initializer [size] (leading axes of 1 do not count)."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.shape is None:
        return False
    if not len(value.shape) or not value.shape.is_static():
        return False
    shape = [int(d) for d in value.shape.numpy()]
    return math.prod(shape) == shape[-1] and (size is None or shape[-1] == size)


def axes_of(node: ir.Node, index: int = 1) -> list[int] | None:
    """The axes that a node gets as input ``index`` or as attribute; None where they are computed or absent."""
    if "axes" in node.attributes:
        return [int(a) for a in node.attributes["axes"].as_ints()]
    array = small_array(node.inputs[index]) if len(node.inputs) > index else None
    return None if array is None else [int(a) for a in array.reshape(-1)]


def reduces_last(node: ir.Node) -> bool:
    """Whether a reduction runs over the last axis alone and keeps it."""
    axes = axes_of(node)
    keep = node.attributes.get_int("keepdims", 1)
    size = rank(node.inputs[0])
    return (
        keep == 1
        and axes is not None
        and len(axes) == 1
        and (axes[0] == -1 or (size is not None and axes[0] == size - 1))
    )
