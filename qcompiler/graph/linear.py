"""The Linear view: ``MatMul(x, W[in, out])`` and an optional ``Add(bias)``; float, fake-quantized or folded to int8."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qcompiler.graph.edit import sole_user
from qcompiler.graph.functions import FAKE_QUANT, WEIGHT_FOLDED, WEIGHT_QUANT, is_call


@dataclasses.dataclass(frozen=True)
class Linear:
    """One Linear of a canonical graph.

    Attributes:
        name: the MatMul node's name, unique in the model; normalise sets it from the weight parameter's name.
        matmul: the MatMul node.
        x: the activation it reads, before any fake-quant; [..., in_features].
        weight: the initializer [in_features, out_features]: float, or what is stored of it after ``fold``.
        bias: the value [out_features] that the Add reads, or None: an initializer, or the DequantizeLinear of one after
            ``fold{bias=int32}``.
        output: what the rest of the graph reads: the Add's output, or the MatMul's where there is no bias.
        activation_quant: the FakeQuant* call between x and the MatMul, or None.
        weight_quant: the call of a weight's fake-quant (after ``insert``), or DequantizeLinear or a
            DequantizeCodebook or DequantizeFloat call (after ``fold``), or None.
    """

    name: str
    matmul: ir.Node
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    add: ir.Node | None
    activation_quant: ir.Node | None
    weight_quant: ir.Node | None

    @property
    def nodes(self) -> list[ir.Node]:
        """The MatMul, and the Add where there is a bias."""
        return [self.matmul] if self.add is None else [self.matmul, self.add]

    @property
    def output(self) -> ir.Value:
        return self.nodes[-1].outputs[0]

    @property
    def in_features(self) -> int:
        return self._shape()[0]

    @property
    def out_features(self) -> int:
        return self._shape()[1]

    def _shape(self) -> tuple[int, int]:
        assert self.weight.shape is not None
        rows, columns = self.weight.shape.numpy()
        return int(rows), int(columns)


def as_linear(node: ir.Node) -> Linear | None:
    """The Linear whose MatMul this node is, or None (an attention product, a 3-D weight, another operator)."""
    if node.op_type != "MatMul" or node.domain != "":
        return None
    x, weight = node.inputs
    weight_quant = weight.producer() if weight is not None else None
    if weight_quant is not None and (
        is_call(weight_quant, *WEIGHT_QUANT, *WEIGHT_FOLDED) or weight_quant.op_type == "DequantizeLinear"
    ):
        weight = weight_quant.inputs[0]
    else:
        weight_quant = None
    if x is None or weight is None or not weight.is_initializer() or weight.shape is None or len(weight.shape) != 2:
        return None
    activation_quant = x.producer()
    if activation_quant is not None and is_call(activation_quant, *FAKE_QUANT):
        x = activation_quant.inputs[0]
        assert x is not None
    else:
        activation_quant = None
    bias, add = _bias(node, int(weight.shape.numpy()[1]))
    return Linear(node.name or "", node, x, weight, bias, add, activation_quant, weight_quant)


def _bias(matmul: ir.Node, out_features: int) -> tuple[ir.Value | None, ir.Node | None]:
    add = sole_user(matmul.outputs[0])
    if add is None or add.op_type != "Add" or add.domain != "":
        return None, None
    other = add.inputs[1] if add.inputs[0] is matmul.outputs[0] else add.inputs[0]
    producer = other.producer() if other is not None else None
    stored = producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else other
    if stored is None or not stored.is_initializer() or stored.shape is None:
        return None, None
    return (other, add) if stored.shape.dims == (out_features,) else (None, None)


def linears(model: ir.Model) -> list[Linear]:
    """Every Linear of the model's main graph, in graph order."""
    return [linear for node in model.graph if (linear := as_linear(node)) is not None]


def linear_named(model: ir.Model, name: str) -> Linear:
    """The Linear of that name.

    Raises:
        KeyError: there is none.
    """
    for node in model.graph:
        if node.name == name and (linear := as_linear(node)) is not None:
            return linear
    raise KeyError(name)
