"""Quantized Linears to ONNX Runtime's integer operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qcompiler.core import Note
from qcompiler.graph.edit import add_initializer, array_of, insert_node
from qcompiler.graph.functions import is_call
from qcompiler.graph.linear import Linear, linears
from qcompiler.targets.ort.emit import CONTRIB, take_over
from qcompiler.targets.ort.integers import Quantizer

Choose = Callable[[str, int, int], str]
"""Kernel name by (granularity of the activation, in_features, out_features)."""


def lower_linears(model: ir.Model, choose: Choose) -> tuple[dict[str, str], list[Note]]:
    """Replace every folded Linear whose activation is fake-quantized, in place.

    Args:
        model: a folded canonical graph.
        choose: which kernel to use, by name (:data:`qcompiler.targets.ort.costs.KERNELS`).

    Returns:
        Name of each lowered Linear -> name of the node that computes it; and a note for each that was not lowered.
    """
    model.graph.opset_imports.setdefault(CONTRIB, 1)
    quantizer = Quantizer(model.graph)
    nodes: dict[str, str] = {}
    notes: list[Note] = []
    for linear in linears(model):
        if linear.weight_quant is None or is_call(linear.weight_quant, "DequantizeFloat"):
            continue
        reason = _refuse(linear)
        if reason is not None:
            notes.append(Note(linear.name, "left in float", reason))
            continue
        granularity = granularity_of(linear)
        kernel = choose(granularity, linear.in_features, linear.out_features)
        build = _block_product if kernel.startswith("MatMulNBits") else _integer_product
        product = build(model.graph, quantizer, linear, kernel)
        nodes[linear.name] = product.name or ""
        notes.append(Note(linear.name, kernel, f"fastest measured for {granularity} activations of this shape"))
    return nodes, notes


def granularity_of(linear: Linear) -> str:
    """How the input of a fake-quantized Linear is quantized: "static", "per_tensor" or "per_token"."""
    assert linear.activation_quant is not None
    return _GRANULARITY[linear.activation_quant.op_type]


_GRANULARITY: Mapping[str, str] = {
    "FakeQuant": "static",
    "FakeQuantPerTensor": "per_tensor",
    "FakeQuantPerToken": "per_token",
}


def _refuse(linear: Linear) -> str | None:
    quant = linear.activation_quant
    if is_call(linear.weight_quant, "DequantizeCodebook"):
        return "its weight is by table: it is made float when the model is loaded"
    if linear.weight_quant is None or linear.weight_quant.op_type != "DequantizeLinear":
        return "its weight is not folded to integers"
    if quant is None:
        return "its weight alone is quantized: what becomes of it is left to ONNX Runtime"
    if is_call(quant, "FakeQuant"):
        scale = array_of(quant.inputs[1])
        if scale is None or scale.size != 1:
            return "a static activation of more than one scale has no integer product in ONNX Runtime"
    return None


def _integer_product(graph: ir.Graph, quantizer: Quantizer, linear: Linear, kernel: str) -> ir.Node:
    """MatMulIntegerToFloat: scale · s_w[n] · Σ (values - zero_point) W[k, n] + bias[n]."""
    assert linear.activation_quant is not None
    assert linear.weight_quant is not None
    x = quantizer.integers(linear.activation_quant, linear.in_features)
    weight, weight_scale, zero_point = linear.weight_quant.inputs
    zeros = array_of(zero_point)
    weight_zero_point = None if zeros is None or not zeros.any() else zero_point
    bias = linear.bias if x.row_scale is None else None
    product = insert_node(
        graph,
        linear.nodes[-1],
        "MatMulIntegerToFloat",
        [x.values, weight, x.scale, weight_scale, x.zero_point, weight_zero_point, bias],
        domain=CONTRIB,
        name=f"{linear.name}.integer",
        like=linear.output,
    )
    output = product.outputs[0]
    if x.row_scale is not None:
        output = _scaled(graph, linear, output, x.row_scale)
        if linear.bias is not None:
            output = _plus_bias(graph, linear, output)
    take_over(linear.nodes, output)
    return product


def _block_product(graph: ir.Graph, quantizer: Quantizer, linear: Linear, kernel: str) -> ir.Node:
    """MatMulNBits of 8 bits at accuracy level 4: x is quantized inside, in blocks of K: finer than per token."""
    assert linear.weight_quant is not None
    weight, scale = (array_of(value) for value in linear.weight_quant.inputs[:2])
    assert weight is not None
    assert scale is not None
    size = int(kernel.rpartition(".g")[2])
    in_features, out_features = weight.shape
    blocks = -(-in_features // size)
    packed = np.full((out_features, blocks * size), 128, np.uint8)
    packed[:, :in_features] = (weight.T.astype(np.int16) + 128).astype(np.uint8)
    name = linear.weight.name or linear.name
    inputs = [
        linear.x,
        add_initializer(graph, f"{name}_blocks", packed.reshape(out_features, blocks, size)),
        add_initializer(graph, f"{name}_block_scales", np.repeat(scale.astype(np.float32), blocks)),
        None,
        None,
        linear.bias,
    ]
    product = insert_node(
        graph,
        linear.nodes[-1],
        "MatMulNBits",
        inputs,
        domain=CONTRIB,
        attributes={"K": in_features, "N": out_features, "bits": 8, "block_size": size, "accuracy_level": 4},
        name=f"{linear.name}.integer",
        like=linear.output,
    )
    take_over(linear.nodes, product.outputs[0])
    return product


def _scaled(graph: ir.Graph, linear: Linear, product: ir.Value, row_scale: ir.Value) -> ir.Value:
    return insert_node(
        graph, linear.nodes[-1], "Mul", [product, row_scale], name=f"{linear.name}.rows", like=linear.output
    ).outputs[0]


def _plus_bias(graph: ir.Graph, linear: Linear, product: ir.Value) -> ir.Value:
    """Sum, not Add: ONNX Runtime fuses Add + Gelu into an operator that is slower than the two."""
    before = linear.nodes[-1]
    return insert_node(
        graph, before, "Sum", [product, linear.bias], name=f"{linear.name}.biased", like=linear.output
    ).outputs[0]
