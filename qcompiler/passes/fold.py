"""fold: turn fake-quantized weights into integer constants behind a DequantizeLinear or DequantizeCodebook."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.core import unknown
from qcompiler.graph.edit import add_initializer, array_of, insert_node, remove_dead
from qcompiler.graph.functions import is_call
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.weights import BITS, fake_quantized, grid_of
from qcompiler.numerics.affine import quantize
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.float_weights import fold_codebook, fold_float
from qcompiler.passes.tables import container, fold_tables


@dataclasses.dataclass(frozen=True)
class Fold(Pass):
    """Constants become integers: W -> DequantizeLinear(W_int8, scale), with ``block_size`` where scales go by group.

    Weights of 4 bits become int4 or uint4 tensors, those of 2 bits too: opset 21 has nothing smaller. Those of nf4 and
    fp4 become places in their table, uint4; float16 and bfloat16 are stored as such.

    ``bias="int32"`` also turns the bias of a static Linear into int32 with the derived scale s_x · s_w (Jacob et al.
    2018, section 2.4), for runtimes that want it so; "float" leaves it, which is what ort-cpu's fastest kernel takes.
    """

    name: ClassVar[str] = "fold"
    by_weight: ClassVar[bool] = True
    bias: str = "float"

    def __post_init__(self) -> None:
        if self.bias not in ("float", "int32"):
            raise unknown("bias type", self.bias, ("float", "int32"))

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        folded: dict[ir.Node, ir.Value] = {}
        for linear in linears(model):
            if linear.weight_quant is None or not fake_quantized(linear):
                continue
            if linear.weight_quant not in folded:
                folded[linear.weight_quant] = _FOLDS[linear.weight_quant.op_type](model, linear)
            linear.matmul.replace_input_with(1, folded[linear.weight_quant])
            if self.bias == "int32":
                _fold_bias(model.graph, linear)
        tables = fold_tables(model)
        remove_dead(model)
        return PassResult(bool(folded) or tables)


def _integer_weight(model: ir.Model, linear: Linear) -> ir.Value:
    graph = model.graph
    assert linear.weight_quant is not None
    weight, scale, zero_point = (array_of(value) for value in linear.weight_quant.inputs)
    assert weight is not None
    assert scale is not None
    assert zero_point is not None
    old = linear.weight
    name = old.name or linear.name
    integers = add_initializer(graph, f"{name}_quantized", quantize(weight, scale, zero_point))
    integers.metadata_props.update(old.metadata_props)
    dequantize = insert_node(
        graph,
        linear.matmul,
        "DequantizeLinear",
        [integers, *linear.weight_quant.inputs[1:]],
        attributes={"axis": 1},
        name=f"{name}_dequantized",
        like=old,
    )
    return dequantize.outputs[0]


def _integer_blocks(model: ir.Model, linear: Linear) -> ir.Value:
    graph, call, old = model.graph, linear.weight_quant, linear.weight
    weight = array_of(old)
    assert call is not None
    assert weight is not None
    grid = grid_of(call)
    assert grid.scale is not None
    assert grid.zero_point is not None
    dtype = container(grid.low, grid.high)
    name = old.name or linear.name
    whole = len(grid.scale) == 1
    numbers = [grid.nearest(np.asarray(weight, np.float32)), grid.zero_point.astype(np.int32)]
    integers, zero_point = (np.asarray(n).astype(dtype) for n in numbers)
    inputs = [
        add_initializer(graph, f"{name}_quantized", integers),
        add_initializer(graph, f"{name}_scales", grid.scale[0] if whole else grid.scale),
        add_initializer(graph, f"{name}_zero_points", zero_point[0] if whole else zero_point),
    ]
    inputs[0].metadata_props.update(old.metadata_props)
    inputs[0].metadata_props[BITS] = str((grid.high - grid.low).bit_length())
    attributes = {"axis": 1} if whole else {"axis": 0, "block_size": grid.group_size}
    dequantize = insert_node(
        graph, linear.matmul, "DequantizeLinear", inputs, attributes=attributes, name=f"{name}_dequantized", like=old
    )
    return dequantize.outputs[0]


_FOLDS: Mapping[str, Callable[[ir.Model, Linear], ir.Value]] = {
    "FakeQuant": _integer_weight,
    "FakeQuantBlocks": _integer_blocks,
    "FakeQuantCodebook": fold_codebook,
    "FakeQuantFloat": fold_float,
}


def _fold_bias(graph: ir.Graph, linear: Linear) -> None:
    quant = linear.activation_quant
    if linear.bias is None or linear.add is None or not is_call(quant, "FakeQuant"):
        return
    assert quant is not None
    assert linear.weight_quant is not None
    bias, s_x, s_w = (array_of(v) for v in (linear.bias, quant.inputs[1], linear.weight_quant.inputs[1]))
    assert bias is not None
    assert s_x is not None
    assert s_w is not None
    scale = (s_x * s_w).astype(np.float32)
    limits = np.iinfo(np.int32)
    integers = np.clip(np.rint(bias / scale.astype(np.float64)), limits.min, limits.max).astype(np.int32)
    name = linear.bias.name or f"{linear.name}.bias"
    dequantize = insert_node(
        graph,
        linear.add,
        "DequantizeLinear",
        [
            add_initializer(graph, f"{name}_quantized", integers),
            add_initializer(graph, f"{name}_scale", np.broadcast_to(scale, bias.shape)),
        ],
        attributes={"axis": 0},
        name=f"{name}_dequantized",
        like=linear.bias,
    )
    index = next(i for i, value in enumerate(linear.add.inputs) if value is linear.bias)
    linear.add.replace_input_with(index, dequantize.outputs[0])
