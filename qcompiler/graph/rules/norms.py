"""LayerNormalization and RMSNorm from the arithmetic that exporters write them in."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.core import DOMAIN
from qcompiler.graph.edit import array_of, users
from qcompiler.graph.rules.patterns import (
    is_vector,
    last_dim,
    made_by,
    number,
    other_input,
    rank,
    reduces_last,
    with_number,
)
from qcompiler.graph.rules.rewriter import PARAMETER, Rewriter


def raise_norms(rewriter: Rewriter) -> None:
    """Each mean over the last axis of a square is the heart of a norm: of x itself, or of x - mean(x)."""
    for node in rewriter.nodes("ReduceMean"):
        x = squared(node.inputs[0])
        if x is None or not reduces_last(node):
            continue
        normed = _normed(node, x)
        if normed is None:
            continue
        y, epsilon = normed
        centred = _centred(x)
        if centred is not None:
            _layer_norm(rewriter, y, centred, epsilon)
        else:
            _rms_norm(rewriter, y, x, epsilon)


def squared(value: ir.Value | None) -> ir.Value | None:
    """x, where the value is x² (Pow or Mul), or None."""
    node = made_by(value, "Pow", "Mul")
    if node is None:
        return None
    if node.op_type == "Pow":
        return node.inputs[0] if number(node.inputs[1]) == 2.0 else None
    return node.inputs[0] if node.inputs[0] is node.inputs[1] else None


def _normed(mean: ir.Node, x: ir.Value) -> tuple[ir.Value, float] | None:
    """(x / sqrt(mean + epsilon), epsilon), found downstream of the mean, or None."""
    for add in users(mean.outputs[0]):
        found = with_number(add) if add.op_type == "Add" else None
        if found is None:
            continue
        for root in users(add.outputs[0]):
            quotient = _quotient(root, x)
            if quotient is not None:
                return quotient, found[1]
    return None


def _quotient(root: ir.Node, x: ir.Value) -> ir.Value | None:
    inverse = root.op_type == "Pow" and number(root.inputs[1]) == -0.5
    if root.op_type != "Sqrt" and not inverse:
        return None
    for node in users(root.outputs[0]):
        if node.op_type == "Div" and not inverse:
            if node.inputs[0] is not None and _same(node.inputs[0], x):
                return node.outputs[0]
            if number(node.inputs[0]) == 1.0 and (y := _times(node.outputs[0], x)) is not None:
                return y
        if node.op_type == "Reciprocal" and not inverse and (y := _times(node.outputs[0], x)) is not None:
            return y
    return _times(root.outputs[0], x) if inverse else None


def _times(factor: ir.Value, x: ir.Value) -> ir.Value | None:
    """factor · x, where some node computes it."""
    for node in users(factor):
        if node.op_type == "Mul" and (other := other_input(node, factor)) is not None and _same(other, x):
            return node.outputs[0]
    return None


def _same(a: ir.Value, b: ir.Value) -> bool:
    """The same value, or twice the same subtraction (torch writes x - mean(x) out again for the quotient)."""
    if a is b:
        return True
    first, second = made_by(a, "Sub"), made_by(b, "Sub")
    return first is not None and second is not None and list(first.inputs) == list(second.inputs)


def _centred(value: ir.Value) -> ir.Value | None:
    """x, where the value is x - mean(x) over the last axis."""
    node = made_by(value, "Sub")
    mean = made_by(node.inputs[1], "ReduceMean") if node is not None else None
    if node is None or mean is None or mean.inputs[0] is not node.inputs[0] or not reduces_last(mean):
        return None
    return node.inputs[0]


# --- LayerNormalization ---


def _layer_norm(rewriter: Rewriter, y: ir.Value, x: ir.Value, epsilon: float) -> None:
    size = last_dim(x) or last_dim(y)
    scaled, weight = _affine(y, "Mul", size)
    shifted, bias = (_affine(scaled, "Add", size)) if weight is not None else (scaled, None)
    if weight is None:
        if size is None or y.dtype is None:
            return
        weight = rewriter.constant(np.ones(size, y.dtype.numpy()), f"{y.name}/ones")
    inputs = [x, _flat(rewriter, weight)]
    if bias is not None:
        inputs.append(_flat(rewriter, bias))
    rewriter.replace(shifted, "LayerNormalization", inputs, {"axis": -1, "epsilon": float(np.float32(epsilon))})


def _affine(y: ir.Value, op_type: str, size: int | None) -> tuple[ir.Value, ir.Value | None]:
    """(output, vector) of the one Mul or Add by a vector that reads y; (y, None) where there is none."""
    if y.is_graph_output():
        return y, None
    readers = users(y)
    if len(readers) != 1 or readers[0].op_type != op_type or readers[0].domain != "":
        return y, None
    other = other_input(readers[0], y)
    if other is None or not is_vector(other, size) or (rank(other) or 0) > (rank(y) or 99):
        return y, None
    if size is None and (rank(other) or 0) != 1:
        return y, None
    return readers[0].outputs[0], other


def _flat(rewriter: Rewriter, vector: ir.Value) -> ir.Value:
    if rank(vector) == 1:
        return vector
    array = array_of(vector)
    assert array is not None
    return rewriter.initializer(vector.name or "weight", array.reshape(-1), like=vector)


# --- RMSNorm ---


def _rms_norm(rewriter: Rewriter, y: ir.Value, x: ir.Value, epsilon: float) -> None:
    """A norm without a weight, or with one that is no vector, stays as it is."""
    readers = users(y)
    if y.is_graph_output() or len(readers) != 1 or readers[0].op_type != "Mul" or readers[0].domain != "":
        return
    weight = other_input(readers[0], y)
    size = last_dim(x) or last_dim(y)
    if weight is None:
        return
    vector = weight if is_vector(weight, size) else _one_plus(rewriter, weight, size)
    if vector is None or last_dim(vector) in (None, 1):
        return
    output = readers[0].outputs[0]
    attributes = {"epsilon": float(np.float32(epsilon))}
    rewriter.replace(output, "RMSNorm", [x, _flat(rewriter, vector)], attributes, domain=DOMAIN)


def _one_plus(rewriter: Rewriter, value: ir.Value, size: int | None) -> ir.Value | None:
    """Gemma multiplies by 1 + weight: one vector that holds the sum, with the parameter's name."""
    node = made_by(value, "Add")
    found = with_number(node)
    if found is None or found[1] != 1.0 or not is_vector(found[0], size):
        return None
    source = found[0]
    array = array_of(source)
    assert array is not None
    name = source.name or "weight"
    source.metadata_props.setdefault(PARAMETER, name)
    rewriter.rename_initializer(source, f"{name}/source")
    vector = rewriter.initializer(name, np.asarray(1, array.dtype) + array.reshape(-1), like=source, map_="one_plus")
    rewriter.bypass(value, vector)
    return vector
