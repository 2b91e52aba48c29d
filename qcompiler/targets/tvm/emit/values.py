"""What is known of the graph's values so far: tensors of the function, or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tvm import tirx

from qcompiler.graph.edit import array_of
from qcompiler.numerics.affine import dequantize
from qcompiler.targets.tvm.emit.builder import Builder, Tensor
from qcompiler.targets.tvm.emit.numbers import LIMIT, Numbers, is_open


class Values:
    """Values by what they are in the function that ``builder`` makes.

    Attributes:
        tensors: those that are tensors of it.
        numbers: those that are known while emitting; they become tensors when one is asked for.
    """

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.tensors: dict[ir.Value, Tensor] = {}
        self.numbers: dict[ir.Value, Numbers] = {}

    def tensor(self, value: ir.Value | None) -> Tensor:
        """The value as a tensor; a constant becomes a parameter."""
        assert value is not None
        if value not in self.tensors:
            if value in self.numbers:
                self.tensors[value] = self._open_tensor(self.numbers[value], value.name or "")
            else:
                array = constant_of(value)
                if array is None:
                    raise ValueError(f"its input {value.name!r} is not known")
                self.tensors[value] = self.builder.constant(value.name or f"constant{len(self.tensors)}", array)
        return self.tensors[value]

    def known(self, value: ir.Value | None) -> Numbers | None:
        """The value as numbers, where it is one of few that are known while emitting."""
        if value is None:
            return None
        if value not in self.numbers and value not in self.tensors:
            tensor = ir.convenience.get_const_tensor(value) if not value.is_graph_input() else None
            if tensor is not None and tensor.size <= LIMIT:
                self.numbers[value] = tensor.numpy()
        return self.numbers.get(value)

    def _open_tensor(self, array: Numbers, name: str) -> Tensor:
        if not is_open(array):
            return self.builder.constant(f"{name}.numbers", array)
        sizes = list(array.reshape(-1))

        def body(_: Any, index: Sequence[Any]) -> Any:
            expressions = [self.builder.expression(size) for size in sizes]
            value = expressions[-1]
            for number in reversed(range(len(expressions) - 1)):
                value = tirx.Select(index[0] == number, expressions[number], value)
            return value

        flat = self.builder.compute("sizes", (len(sizes),), "int64", [], body, sizes)
        return self.builder.view(flat, array.shape)


def constant_of(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The numbers of an initializer, or of one that is dequantized; None for what is computed."""
    array = array_of(value)
    producer = value.producer() if value is not None else None
    if array is None and producer is not None and producer.op_type == "DequantizeLinear":
        stored, scale = (array_of(v) for v in producer.inputs[:2])
        if stored is not None and scale is not None:
            zero = array_of(producer.inputs[2]) if len(producer.inputs) > 2 else None
            if zero is None:
                zero = np.zeros(1, np.int8)
            return dequantize(stored, _along(scale, producer, stored.ndim), _along(zero, producer, stored.ndim))
    return array


def _along(array: npt.NDArray[Any], node: ir.Node, rank: int) -> npt.NDArray[Any]:
    """A scale or zero point so that it broadcasts along the node's axis."""
    if array.size == 1:
        return array.reshape(())
    if array.ndim == rank:
        raise ValueError("its weight has scales by group")
    shape = [1] * rank
    shape[node.attributes.get_int("axis", 1) % rank] = array.size
    return array.reshape(shape)
