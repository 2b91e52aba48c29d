"""Writes to the weights of one graph that are proved on numbers, and all kept or all undone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import ModelError, QCompilerError
from qcompiler.graph.edit import add_initializer, array_of, insert_node, unique_name, write_input
from qcompiler.graph.verify import relative_error

Write = Callable[[], Any]

_TOLERANCE = 64
"""How many units of rounding of the weights' dtype the proof may be off."""


class FoldError(QCompilerError):
    """A fold that would be wrong, or that cannot be proved; the model is as it was."""


class Transaction:
    """Writes to one graph that are all kept or all undone."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.initializers = dict(graph.initializers)
        self.undo: list[Callable[[], None]] = []
        self.copies: dict[tuple[ir.Value, bytes], ir.Value] = {}
        self.epsilon = 0.0

    def apply(self, writes: Sequence[Write], outputs: Callable[[], dict[str, npt.NDArray[Any]]]) -> float:
        """Do the writes; the relative error of ``outputs`` by them. Where it is too large, undo and raise."""
        try:
            before = outputs()
            for write in writes:
                write()
            proof = relative_error(before, outputs())
        except ModelError as error:
            self.roll_back()
            raise FoldError(f"no proof, no fold: {error}") from error
        if not proof <= _TOLERANCE * self.epsilon:
            self.roll_back()
            raise FoldError(f"the fold changes the outputs of its region by {proof:.1e} of their largest")
        self.inherit_names()
        return proof

    def inherit_names(self) -> None:
        """A weight whose last reader went over to a copy is dropped, and the copy takes its name."""
        for (old, _), new in self.copies.items():
            name = old.name or ""
            if name in self.graph.initializers and self.graph.initializers[name] is old and not old.uses():
                self.graph.initializers.pop(name)
                new.name = name

    def roll_back(self) -> None:
        for step in reversed(self.undo):
            step()
        self.graph.initializers.clear()
        for value in self.initializers.values():
            self.graph.register_initializer(value)

    def weight(
        self, node: ir.Node, index: int, array: npt.NDArray[np.float32], old: npt.NDArray[Any], key: bytes = b""
    ) -> Write:
        """A write of ``array`` in the dtype of ``old``, checked for overflow now and done later.

        Nodes that read one weight and change it alike (a Linear called twice) share the new one: ``key`` tells them.
        """
        value = node.inputs[index]
        assert value is not None
        dtype = ir.DataType.from_numpy(old.dtype)
        cast = checked_cast(array, dtype, repr(value.name))
        self.epsilon = max(self.epsilon, _epsilon(dtype))

        def write() -> None:
            self.set_input(node, index, value)
            shared = self.copies.get((value, key)) if key else None
            new = shared or self.equal_copy(value, cast)
            if new is None:
                new = write_input(node, index, cast)
                new.metadata_props.update(value.metadata_props)
            else:
                node.replace_input_with(index, new)
            self.copies[value, key] = new

        return write

    def equal_copy(self, old: ir.Value, array: npt.NDArray[Any]) -> ir.Value | None:
        """An earlier copy of ``old`` with these numbers: layers that share weights, folded alike, go on sharing."""
        for number in itertools.count(2):
            copy = self.graph.initializers.get(f"{old.name}_{number}")
            if copy is None:
                return None
            found = array_of(copy)
            if found is not None and found.dtype == array.dtype and np.array_equal(found, array):
                return copy
        return None

    def set_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        old = node.inputs[index]
        self.undo.append(lambda: node.replace_input_with(index, old))
        node.replace_input_with(index, value)

    def insert(self, before: ir.Node, op_type: str, inputs: list[ir.Value], name: str, like: ir.Value) -> ir.Value:
        node = insert_node(self.graph, before, op_type, inputs, name=name, like=like)
        self.undo.append(lambda: self.graph.remove(node, safe=True))
        return node.outputs[0]

    def create_bias(self, node: ir.Node, array: npt.NDArray[Any]) -> None:
        """Give a LayerNormalization or a Linear without bias this one; the value that others read keeps its name."""
        bias = add_initializer(self.graph, f"{node.name}.bias", array)
        if node.op_type == "LayerNormalization":
            width = len(node.inputs)
            node.resize_inputs(3)
            self.undo.append(lambda: node.resize_inputs(width))
            node.replace_input_with(2, bias)
            return
        product = node.outputs[0]
        name = product.name or ""
        readers = list(product.uses())
        outputs = [i for i, output in enumerate(self.graph.outputs) if output is product]
        add = ir.node("Add", [product, bias], name=unique_name(self.graph, f"{node.name}.add"))
        add.outputs[0].type, add.outputs[0].shape = product.type, product.shape
        self.graph.insert_after(node, add)

        def read(value: ir.Value) -> None:
            for reader, index in readers:
                reader.replace_input_with(index, value)
            for i in outputs:
                self.graph.outputs[i] = value

        def undo() -> None:
            read(product)
            self.graph.remove(add, safe=True)
            product.name = name

        read(add.outputs[0])
        product.name = unique_name(self.graph, f"{name}.product")
        add.outputs[0].name = name
        self.undo.append(undo)


def checked_cast(array: npt.NDArray[Any], dtype: ir.DataType, what: str) -> npt.NDArray[Any]:
    """``array`` in that dtype; refused where a number becomes infinite."""
    with np.errstate(over="ignore"):
        cast = array.astype(dtype.numpy())
    if not np.isfinite(cast.astype(np.float64)).all():
        raise FoldError(f"{what} would overflow {dtype.name.lower()}")
    return cast


def _epsilon(dtype: ir.DataType) -> float:
    """Spacing of that floating-point type at 1, e.g. 2^-23 of float32."""
    return float(ml_dtypes.finfo(dtype.numpy()).eps)
