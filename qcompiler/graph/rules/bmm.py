"""Attention written with batched products of rank 3 ([B · H, S, D], torch.bmm and baddbmm) back to rank 4."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import sole_user
from qcompiler.graph.rules.patterns import dims, made_by, number, rank
from qcompiler.graph.rules.rewriter import Rewriter

_POINTWISE = ("Mul", "Div", "Add", "Max")


@dataclasses.dataclass
class _Flat:
    """softmax(f(q kᵀ)) v, where the products are of rank 3 and q, k, v are Reshapes of rank 4 values."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    scores: ir.Node
    pointwise: list[ir.Node]
    view: ir.Node
    result: ir.Node


def unflatten_attentions(rewriter: Rewriter) -> None:
    """Move the Reshapes that merge and split batch and heads out of the way of each Softmax of rank 4."""
    for softmax in rewriter.nodes("Softmax"):
        found = _read(softmax) if rank(softmax.inputs[0]) == 4 else None
        if found is not None:
            _rewrite(rewriter, softmax, found)


def _read(softmax: ir.Node) -> _Flat | None:
    value = softmax.inputs[0]
    while (node := made_by(value, *_POINTWISE)) is not None:  # masks of rank 4 come after the view
        sides = [v for v in node.inputs if v is not None and number(v) is None and _has_view(v)]
        if len(sides) != 1:
            return None
        value = sides[0]
    view = made_by(value, "Reshape")
    if view is None or rank(view.inputs[0]) != 3:
        return None
    pointwise: list[ir.Node] = []
    value = view.inputs[0]
    while (node := made_by(value, *_POINTWISE)) is not None:
        if sole_user(value) is None:
            return None
        pointwise.append(node)
        sides = [v for v in node.inputs if v is not None and number(v) is None and _has_product(v)]
        if len(sides) != 1:
            return None
        value = sides[0]
    scores = made_by(value, "MatMul")
    flat_p = sole_user(softmax.outputs[0])
    product = sole_user(flat_p.outputs[0]) if flat_p is not None and flat_p.op_type == "Reshape" else None
    result = sole_user(product.outputs[0]) if product is not None and product.op_type == "MatMul" else None
    if scores is None or sole_user(value) is None or flat_p is None or product is None or result is None:
        return None
    if result.op_type != "Reshape" or product.inputs[0] is not flat_p.outputs[0]:
        return None
    keys = made_by(scores.inputs[1], "Transpose")
    if keys is None or list(keys.attributes.get_ints("perm", ())) != [0, 2, 1]:
        return None
    parts = [_four(scores.inputs[0]), _four(keys.inputs[0]), _four(product.inputs[1])]
    q, k, v = parts
    if q is None or k is None or v is None or not _same_heads(q, k, v, view.outputs[0], result.outputs[0]):
        return None
    return _Flat(q, k, v, scores, pointwise, view, result)


def _has_view(value: ir.Value, depth: int = 4) -> bool:
    node = made_by(value, "Reshape", *_POINTWISE)
    if node is None or depth == 0:
        return False
    if node.op_type == "Reshape":
        return rank(node.inputs[0]) == 3 and node.inputs[0] is not None and _has_product(node.inputs[0])
    return any(v is not None and _has_view(v, depth - 1) for v in node.inputs)


def _has_product(value: ir.Value, depth: int = 4) -> bool:
    node = made_by(value, "MatMul", *_POINTWISE)
    if node is None or depth == 0:
        return False
    if node.op_type == "MatMul":
        return not any(v is None or v.is_initializer() for v in node.inputs)
    return any(v is not None and _has_product(v, depth - 1) for v in node.inputs)


def _four(value: ir.Value | None) -> ir.Value | None:
    """x [B, H, S, D], where the value is its Reshape to [B · H, S, D]."""
    node = made_by(value, "Reshape")
    x = node.inputs[0] if node is not None else None
    before, after = dims(x), dims(value)
    if before is None or after is None or len(before) != 4 or len(after) != 3 or None in before:
        return None
    return x if before[2:] == after[1:] else None


def _same_heads(q: ir.Value, k: ir.Value, v: ir.Value, scores: ir.Value, result: ir.Value) -> bool:
    """Batch and heads are the same everywhere, so that Reshapes of rank 4 only merge and split those two axes."""
    queries = dims(q)
    if queries is None or not isinstance(queries[1], int):
        return False
    head = queries[:2]
    for value in (k, v, scores, result):
        sizes = dims(value)
        if sizes is None or len(sizes) != 4 or sizes[:2] != head:
            return False
    scored, made, values = dims(scores), dims(result), dims(v)
    assert scored is not None
    assert made is not None
    assert values is not None
    return scored[2] == queries[2] == made[2] and made[3] == values[3]


def _rewrite(rewriter: Rewriter, softmax: ir.Node, found: _Flat) -> None:
    sizes = dims(found.q)
    assert sizes is not None
    heads = sizes[1]
    assert isinstance(heads, int)
    before = found.view
    k_t = rewriter.insert(before, "Transpose", [found.k], {"perm": [0, 1, 3, 2]}, name=f"{before.name}/keys")
    _set_shape(k_t, found.k, (0, 1, 3, 2))
    shape = found.view.outputs[0].shape
    value = rewriter.insert(before, "MatMul", [found.q, k_t], shape=shape, name=found.scores.name)
    flat = found.scores.outputs[0]
    for node in reversed(found.pointwise):
        inputs = [value if v is flat else _unflatten_mask(rewriter, before, v, heads) for v in node.inputs]
        flat = node.outputs[0]
        value = rewriter.insert(before, node.op_type, inputs, shape=shape, name=node.name)
    rewriter.take_over(found.view.outputs[0], value)
    result = rewriter.insert(found.result, "MatMul", [softmax.outputs[0], found.v], name=found.result.name)
    rewriter.take_over(found.result.outputs[0], result)


def _set_shape(value: ir.Value, source: ir.Value, perm: tuple[int, ...]) -> None:
    if source.shape is not None:
        value.shape = ir.Shape([source.shape[i] for i in perm])


def _unflatten_mask(rewriter: Rewriter, before: ir.Node, mask: ir.Value | None, heads: int) -> ir.Value | None:
    """A term [B · H, S or 1, T] as [B, H, S or 1, T]; numbers stay."""
    if mask is None or rank(mask) != 3:
        return mask
    wide = rewriter.insert(before, "Unsqueeze", [mask, rewriter.constant(np.array([0], np.int64), "axes")])
    target = rewriter.constant(np.array([-1, heads, 0, 0], np.int64), "batch_and_heads")
    shape = ir.Shape([None, heads, *mask.shape[1:]]) if mask.shape is not None else None
    return rewriter.insert(before, "Reshape", [wide, target], shape=shape, name=f"{before.name}/mask")
