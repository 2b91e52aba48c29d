"""What a Linear's epilogue takes over, decided on the canonical graph before anything is emitted."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.edit import array_of, sole_user, users
from qcompiler.graph.functions import is_call
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.shapes import Facts
from qcompiler.targets.tvm.emit.elementwise import gelu_name

RESIDUALS = 2
"""As many as an epilogue takes: a split Linear's float part, and the residual stream."""


@dataclasses.dataclass
class Fused:
    """A Linear and what follows it.

    Attributes:
        linear: the Linear.
        nodes: the nodes that its kernel computes, in graph order; it is emitted where the last one stands.
        activation: "", or a name of :data:`qcompiler.targets.tvm.vecmath.ACTIVATIONS`.
        residuals: values that are added.
        late: whether the activation comes after them.
        requantize: the static fake-quant that alone reads the result, or None.
    """

    linear: Linear
    nodes: list[ir.Node]
    activation: str = ""
    residuals: list[ir.Value] = dataclasses.field(default_factory=list)
    late: bool = False
    requantize: ir.Node | None = None

    @property
    def output(self) -> ir.Value:
        """What the rest of the graph reads, before ``requantize``."""
        return self.nodes[-1].outputs[0]


def plan(model: ir.Model, facts: Facts, group: int) -> list[Fused]:
    """One :class:`Fused` for each Linear.

    Args:
        model: a folded canonical graph.
        facts: its shapes.
        group: the multiple that rows of stored integers are padded to: no epilogue writes padding.
    """
    found, taken = [], set[ir.Node]()
    for linear in linears(model):
        fused = Fused(linear, [linear.matmul, *([linear.add] if linear.add is not None else [])])
        _take_activation(fused)
        while len(fused.residuals) < RESIDUALS and _take_residual(fused, facts, taken):
            pass
        if fused.residuals and not fused.activation:
            _take_activation(fused)
            fused.late = fused.activation != ""
        reader = sole_user(fused.output)
        if is_static(reader) and linear.out_features % group == 0:
            fused.requantize = reader
        taken.update(fused.nodes)
        found.append(fused)
    return found


def is_static(node: ir.Node | None) -> bool:
    """Whether this is a fake-quant of one constant scale."""
    if node is None or not is_call(node, "FakeQuant"):
        return False
    scale = array_of(node.inputs[1])
    return scale is not None and scale.size == 1


def _take_activation(fused: Fused) -> None:
    reader = sole_user(fused.output)
    if reader is not None and reader.domain == "":
        if reader.op_type == "Gelu":
            fused.activation = gelu_name(reader)
        elif reader.op_type in ("Relu", "Tanh", "Sigmoid"):
            fused.activation = reader.op_type.lower()
        if fused.activation:
            fused.nodes.append(reader)
            return
    silu = silu_of(fused.output)
    if silu is not None:
        fused.activation = "silu"
        fused.nodes += silu


def silu_of(x: ir.Value) -> list[ir.Node] | None:
    """The Sigmoid and the Mul where all that is done with x is x · sigmoid(x)."""
    readers = users(x)
    if x.is_graph_output() or len(readers) != 2:
        return None
    sigmoid = next((node for node in readers if node.op_type == "Sigmoid" and node.domain == ""), None)
    product = next((node for node in readers if node.op_type == "Mul" and node.domain == ""), None)
    if sigmoid is None or product is None or sole_user(sigmoid.outputs[0]) is not product:
        return None
    return [sigmoid, product] if {*product.inputs} == {x, sigmoid.outputs[0]} else None


def _take_residual(fused: Fused, facts: Facts, taken: set[ir.Node]) -> bool:
    """The other operand of an Add of the same shape; of two Linears that one Add joins, the first takes it."""
    addition = sole_user(fused.output)
    if addition is None or addition.op_type != "Add" or addition.domain != "" or addition in taken:
        return False
    other = addition.inputs[1] if addition.inputs[0] is fused.output else addition.inputs[0]
    if other is None or other is fused.output or array_of(other) is not None:
        return False
    shapes = [facts.get(value.name or "") for value in (fused.output, other)]
    if shapes[0] is None or shapes[1] is None or shapes[0].shape != shapes[1].shape:
        return False
    fused.residuals.append(other)
    fused.nodes.append(addition)
    return True


def smoothing_of(quant: ir.Node) -> tuple[ir.Node, ir.Value, npt.NDArray[Any]] | None:
    """The Mul, x and the multiplier where a fake-quant alone reads x · vector along the last axis."""
    product = quant.inputs[0].producer() if quant.inputs[0] is not None else None
    if (
        product is None
        or product.op_type != "Mul"
        or product.domain != ""
        or sole_user(product.outputs[0]) is not quant
    ):
        return None
    for place, value in enumerate(product.inputs):
        vector, x = array_of(value), product.inputs[1 - place]
        if vector is not None and x is not None and vector.ndim == 1 and vector.size > 1 and x.shape is not None:
            return (product, x, vector) if x.shape[-1] == vector.size else None
    return None
