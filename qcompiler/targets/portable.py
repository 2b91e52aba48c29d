"""target="onnx": plain standard ONNX at opset 21, for any runtime that follows the standard; no contrib domain."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.capability import Capability, Kernel
from qcompiler.core import Note, unknown
from qcompiler.graph.edit import add_initializer, array_of, insert_node, remove_dead, replace_value, sole_user
from qcompiler.graph.functions import inline_functions, is_call, zero_point_of_rows
from qcompiler.graph.linear import Linear, linears
from qcompiler.targets.base import Target, block_kernels, storage_kernels, table_kernels
from qcompiler.targets.lowered import Coverage, Lowered
from qcompiler.targets.ort.readback import integer_coverage

FORMS = ("qdq", "qoperator")
_FLOATS: Mapping[str, tuple[str, str]] = {
    "DequantizeCodebook": ("Gather + MatMul", "the standard has no product of weights by table"),
    "DequantizeFloat": ("Cast + MatMul", "16 bits in the file only"),
}
"""What becomes of weights that are no integers, and why."""


@dataclasses.dataclass(frozen=True)
class Portable(Target):
    """Standard operators only.

    ``form="qdq"``: a static Linear stays ``MatMul`` between QuantizeLinear / DequantizeLinear on its input and
    DequantizeLinear on its int8 weight: what runtimes with their own integer fusion want to see.

    ``form="qoperator"``: a static Linear becomes an integer operator. QLinearMatMul also quantizes its *output*, which
    costs accuracy and needs an output range; it is taken only where the graph quantizes that very value anyway (no
    bias, its one reader is a static fake-quant), so that nothing is lost. Elsewhere MatMulInteger gives the exact int32
    sums, which Cast and Mul(s_x · s_w) turn into the same float numbers as the fake-quantized graph.

    Weight-only Linears are MatMul behind a DequantizeLinear, in int4 or uint4 with ``block_size`` where the scheme says
    so; weights of 2 bits take 4 there, for opset 21 has no smaller type. Those of nf4 and fp4 are gathered from their
    table, a uint4 place each.

    In both forms dynamic Linears are MatMulInteger: behind DynamicQuantizeLinear (per tensor), or behind row maximum,
    Div and QuantizeLinear with scale 1 and a fixed zero point (per token), for which ONNX has no one operator.

    ``reduce_range`` keeps 7 bits of each weight: x86 machines without VNNI add two u8 x s8 products in 16 bits, where
    ONNX Runtime's MatMulInteger saturates with 8.
    """

    name: ClassVar[str] = "onnx"
    form: str = "qdq"
    reduce_range: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown("form of target 'onnx'", self.form, FORMS)

    def capability(self) -> Capability:
        """What the standard can express. ``speed`` is 1 throughout: how fast it is depends on the runtime."""
        static = "MatMul between QuantizeLinear / DequantizeLinear" if self.form == "qdq" else "MatMulInteger"
        kernels = []
        for weight in ("per_channel", "per_tensor"):
            kernels += [
                Kernel(static, "int8", weight, "uint8", "per_tensor", False, 1.0),
                Kernel(static, "int8", weight, "int8", "per_tensor", False, 1.0),
                Kernel("MatMulInteger", "int8", weight, "uint8", "per_token", True, 1.0),
                Kernel("MatMulInteger", "int8", weight, "uint8", "per_tensor", True, 1.0),
            ]
        kernels += block_kernels(
            "DequantizeLinear + MatMul", ("float", "", False), dict.fromkeys((2, 4, 8), range(16, 257)), 1.0
        )
        kernels += [*table_kernels("Gather + MatMul", range(16, 257), 1.0), *storage_kernels(1.0)]
        return Capability(self.name, tuple(kernels), self.reduce_range)

    def lower(self, model: ir.Model) -> Lowered:
        """Rewrite in place; afterwards the model has no function and no domain but the standard one."""
        nodes: dict[str, str] = {}
        notes: list[Note] = []
        inputs: dict[ir.Node, _Integers] = {}
        for linear in linears(model):
            quant = linear.weight_quant
            if quant is None or not (quant.op_type == "DequantizeLinear" or is_call(quant, *_FLOATS)):
                continue
            nodes[linear.name] = linear.name
            if is_call(quant):
                notes.append(Note(linear.name, *_FLOATS[quant.op_type]))
            elif linear.activation_quant is None:
                notes.append(Note(linear.name, "DequantizeLinear + MatMul", "its input is float: weight-only"))
            elif self.form == "qdq" and is_call(linear.activation_quant, "FakeQuant"):
                notes.append(Note(linear.name, "QuantizeLinear / DequantizeLinear + MatMul", "form=qdq"))
            else:
                notes.append(_to_integers(model.graph, linear, inputs))
        remove_dead(model)
        inline_functions(model)
        remove_dead(model)
        return Lowered(nodes, tuple(notes))

    def coverage(self, model: ir.Model, lowered: Lowered, canonical: ir.Model) -> Coverage:
        """Of the graph that ONNX Runtime makes of it; another runtime may do better."""
        return integer_coverage(model, lowered, canonical)


@dataclasses.dataclass(frozen=True)
class _Integers:
    """A quantized activation: the integers, their zero point, and their scale (scalar, or [..., 1] by row)."""

    values: ir.Value
    zero_point: ir.Value
    scale: ir.Value
    by_row: bool


def _to_integers(graph: ir.Graph, linear: Linear, inputs: dict[ir.Node, _Integers]) -> Note:
    """Replace the MatMul by an integer one of the same name whose output keeps the old one's name."""
    quant, dequantize = linear.activation_quant, linear.weight_quant
    assert quant is not None
    assert dequantize is not None
    if quant not in inputs:
        inputs[quant] = _quantize_input(graph, quant)
    x = inputs[quant]
    name, old = linear.name, linear.matmul
    output_name = old.outputs[0].name
    after = _requantized_anyway(linear)
    if after is not None and not x.by_row and is_call(quant, "FakeQuant"):
        _to_qlinear(graph, linear, x, after, inputs)
        return Note(name, "QLinearMatMul", "its one reader quantizes the output by the same scale")
    columns = array_of(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    operands: list[ir.Value | None] = [x.values, linear.weight, x.zero_point]
    if columns is not None and columns.any():
        operands.append(dequantize.inputs[2])
    old.name = f"{name}.float"
    product = insert_node(graph, old, "MatMulInteger", operands, name=name)
    product.outputs[0].name = f"{name}.int32"
    kind = old.outputs[0].dtype or ir.DataType.FLOAT
    cast = insert_node(graph, old, "Cast", product.outputs, attributes={"to": int(kind)}, name=f"{name}.cast")
    result = _rescale(graph, old, cast.outputs[0], x, dequantize.inputs[1])
    result.type, result.shape = old.outputs[0].type, old.outputs[0].shape
    replace_value(old.outputs[0], result)
    graph.remove(old, safe=True)
    result.name = output_name
    return Note(name, "MatMulInteger", "exact int32 sums, rescaled in float: no output range is needed")


def _rescale(graph: ir.Graph, before: ir.Node, sums: ir.Value, x: _Integers, w_scale: ir.Value | None) -> ir.Value:
    """sums · s_x · s_w, in as few passes over the output as the scales allow."""
    name = before.name or ""
    constant, s_w = array_of(x.scale), array_of(w_scale)
    assert s_w is not None
    if x.by_row:
        columns = insert_node(graph, before, "Mul", [sums, w_scale], name=f"{name}.columns")
        return insert_node(graph, before, "Mul", [columns.outputs[0], x.scale], name=f"{name}.rows").outputs[0]
    if constant is not None:
        factor: ir.Value = add_initializer(graph, f"{name}.scale", (constant * s_w).astype(s_w.dtype))
    else:
        factor = insert_node(graph, before, "Mul", [x.scale, w_scale], name=f"{name}.scale").outputs[0]
    return insert_node(graph, before, "Mul", [sums, factor], name=f"{name}.scaled").outputs[0]


def _quantize_input(graph: ir.Graph, quant: ir.Node) -> _Integers:
    """The integers behind a FakeQuant* call, made where the call stands."""
    x = quant.inputs[0]
    assert x is not None
    name = f"{x.name}.quantized"
    if is_call(quant, "FakeQuant"):
        node = insert_node(graph, quant, "QuantizeLinear", quant.inputs, name=name)
        scale, zero_point = quant.inputs[1:3]
        assert scale is not None
        assert zero_point is not None
        return _Integers(node.outputs[0], zero_point, scale, False)
    if is_call(quant, "FakeQuantPerTensor"):
        node = insert_node(graph, quant, "DynamicQuantizeLinear", [x], outputs=3, name=name)
        values, scale, zero_point = node.outputs
        return _Integers(values, zero_point, scale, False)
    return _quantize_rows(graph, quant, x, name)


def _quantize_rows(graph: ir.Graph, quant: ir.Node, x: ir.Value, name: str) -> _Integers:
    """Per token: the same operations as FakeQuantPerToken, the integers kept as uint8 about its zero point."""

    def step(op_type: str, inputs: Sequence[ir.Value | None], suffix: str, **attributes: int) -> ir.Value:
        return insert_node(graph, quant, op_type, inputs, attributes=attributes, name=f"{name}.{suffix}").outputs[0]

    def constant(suffix: str, number: np.ndarray | np.generic) -> ir.Value:
        return add_initializer(graph, f"{name}.{suffix}", np.asarray(number))

    dtype = x.dtype.numpy() if x.dtype is not None else np.dtype(np.float32)
    middle = zero_point_of_rows(quant)
    axes = constant("axes", np.array([-1], np.int64))
    highest = step("ReduceMax", [x, axes], "highest", keepdims=1)
    lowest = step("ReduceMin", [x, axes], "lowest", keepdims=1)
    above = step("Div", [highest, constant("room_above", dtype.type(255 - middle))], "above")
    below = step("Div", [lowest, constant("room_below", dtype.type(1 - middle))], "below")
    scale = step("Max", [above, below, constant("tiny", dtype.type(1e-30))], "scale")
    if any(is_call(node, "SortByExpert") for node in graph):  # of no rows, ONNX Runtime's reductions leave all columns
        bounds = [constant(f"slice_{n}", np.array([n], np.int64)) for n in (0, 1, -1)]
        scale = step("Slice", [scale, *bounds], "scale_column")
    grid = step("Div", [x, scale], "grid")
    zero_point = constant("zero_point", np.uint8(middle))
    return _Integers(
        step("QuantizeLinear", [grid, constant("one", dtype.type(1)), zero_point], "rows"), zero_point, scale, True
    )


def _requantized_anyway(linear: Linear) -> ir.Node | None:
    """The static per-tensor fake-quant that alone reads this Linear's output, where there is no bias between."""
    reader = sole_user(linear.output)
    if linear.add is not None or reader is None or not is_call(reader, "FakeQuant"):
        return None
    scale = array_of(reader.inputs[1])
    return reader if scale is not None and scale.ndim == 0 else None


def _to_qlinear(
    graph: ir.Graph, linear: Linear, x: _Integers, after: ir.Node, inputs: dict[ir.Node, _Integers]
) -> None:
    assert linear.weight_quant is not None
    s_w, z_w = linear.weight_quant.inputs[1:3]
    s_y, z_y = after.inputs[1:3]
    assert s_y is not None
    assert z_y is not None
    old = linear.matmul
    old.name = f"{linear.name}.float"
    operands = [x.values, x.scale, x.zero_point, linear.weight, s_w, z_w, s_y, z_y]
    product = insert_node(graph, old, "QLinearMatMul", operands, name=linear.name)
    product.outputs[0].name = f"{linear.name}.uint8"
    back = insert_node(graph, after, "DequantizeLinear", [product.outputs[0], s_y, z_y], name=f"{linear.name}.back")
    inputs[after] = _Integers(product.outputs[0], z_y, s_y, False)
    replace_value(after.outputs[0], back.outputs[0])
