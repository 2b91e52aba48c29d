"""The three ways in which a Linear's input becomes unsigned 8-bit integers, each once for all Linears that read it."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import add_initializer, array_of, insert_node
from qcompiler.graph.functions import is_call, zero_point_of_rows


@dataclasses.dataclass(frozen=True)
class Integers:
    """x ≈ row_scale · scale · (values - zero_point).

    Attributes:
        values: uint8, of x's shape. (ONNX Runtime's s8 x s8 product is 15 times slower than u8 x s8 on x86.)
        scale, zero_point: scalars, float32 and uint8.
        row_scale: [..., 1] for per-token scales, to be multiplied into the product; else None.
    """

    values: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    row_scale: ir.Value | None = None


class Quantizer:
    """Builds the integer form of fake-quantized activations; equal ones are shared.

    Args:
        graph: where the operators go.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._made: dict[ir.Node, Integers] = {}
        self._constants: dict[str, ir.Value] = {}
        self._may_be_empty = any(is_call(node, "SortByExpert") for node in graph)

    def integers(self, fake_quant: ir.Node, in_features: int) -> Integers:
        """The integers that this FakeQuant* call stands for; its operators are placed before it.

        Args:
            fake_quant: a call of FakeQuant (scalar scale), FakeQuantPerTensor or FakeQuantPerToken.
            in_features: length of x's last axis.
        """
        if fake_quant not in self._made:
            if is_call(fake_quant, "FakeQuant"):
                made = self._static(fake_quant)
            elif is_call(fake_quant, "FakeQuantPerTensor"):
                made = self._per_tensor(fake_quant)
            else:
                made = self._per_token(fake_quant, in_features)
            self._made[fake_quant] = made
        return self._made[fake_quant]

    def _static(self, call: ir.Node) -> Integers:
        x, scale, zero_point = _inputs(call)
        number = array_of(zero_point)
        assert number is not None
        if number.dtype == np.int8:  # the same grid, counted from 0 instead of -128
            shifted = (number.astype(np.int16) + 128).astype(np.uint8)
            zero_point = add_initializer(self.graph, f"{zero_point.name}_uint8", shifted)
        values = self._node(call, "QuantizeLinear", [x, scale, zero_point], "quantized")
        return Integers(values, scale, zero_point)

    def _per_tensor(self, call: ir.Node) -> Integers:
        (x,) = _inputs(call)
        node = insert_node(self.graph, call, "DynamicQuantizeLinear", [x], outputs=3, name=f"{x.name}.dynamic")
        values, scale, zero_point = node.outputs
        return Integers(values, scale, zero_point)

    def _per_token(self, call: ir.Node, in_features: int) -> Integers:
        """Blocked QuantizeLinear with one block a row: a scale for each token in one pass over x.

        Multiplying x by 1/scale before a per-tensor QuantizeLinear costs a half to twice as much; Abs costs more than
        ReduceMin.
        """
        (x,) = _inputs(call)
        middle = int(zero_point_of_rows(call))
        axes = self._constant("last_axis", np.array([-1], np.int64))
        highest = self._node(call, "ReduceMax", [x, axes], "row_max", keepdims=1)
        lowest = self._node(call, "ReduceMin", [x, axes], "row_min", keepdims=1)
        room_above = self._constant(f"room_above_{middle}", np.array(255 - middle, np.float32))
        room_below = self._constant(f"room_below_{middle}", np.array(1 - middle, np.float32))
        above = self._node(call, "Div", [highest, room_above], "row_scale_above")
        below = self._node(call, "Div", [lowest, room_below], "row_scale_below")
        tiny = self._constant("tiny", np.array(1e-30, np.float32))
        row_scale = self._one_column(call, self._node(call, "Max", [above, below, tiny], "row_scale"))
        shape = self._node(call, "Shape", [row_scale], "row_scale_shape")
        zero_point = self._constant(f"zero_point_{middle}", np.array(middle, np.uint8))
        zero_points = self._node(call, "Expand", [zero_point, shape], "row_zero_points")
        values = self._node(
            call, "QuantizeLinear", [x, row_scale, zero_points], "quantized", axis=-1, block_size=in_features
        )
        return Integers(values, self._constant("one", np.array(1.0, np.float32)), zero_point, row_scale)

    def _one_column(self, call: ir.Node, row_scale: ir.Value) -> ir.Value:
        """[..., 1] where there are no rows too, of which ONNX Runtime's reductions leave all columns: an expert's."""
        if not self._may_be_empty:
            return row_scale
        bounds = [self._constant(f"slice_{n}", np.array([n], np.int64)) for n in (0, 1, -1)]
        return self._node(call, "Slice", [row_scale, *bounds], "row_scale_column")

    def _node(self, call: ir.Node, op_type: str, inputs: list[ir.Value], suffix: str, **attributes: int) -> ir.Value:
        name = f"{call.inputs[0].name if call.inputs[0] else ''}.{suffix}"
        return insert_node(self.graph, call, op_type, inputs, attributes=attributes, name=name).outputs[0]

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        if name not in self._constants:
            self._constants[name] = add_initializer(self.graph, f"per_token.{name}", array)
        return self._constants[name]


def _inputs(call: ir.Node) -> list[ir.Value]:
    return [value for value in call.inputs if value is not None]
