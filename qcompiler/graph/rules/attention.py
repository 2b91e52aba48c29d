"""Attention and MaskedAttention from MatMul → Softmax → MatMul, wherever the exporter put scale, mask and guard."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompiler.core import DOMAIN
from qcompiler.graph.edit import sole_user, users
from qcompiler.graph.rules.patterns import dims, lowest, made_by, number, rank, small_array, with_number
from qcompiler.graph.rules.rewriter import Rewriter

_FLOAT_MIN = float(np.finfo(np.float32).min)
_MASKED = -1e4
"""A fill at or below this is meant to mask."""


def raise_attentions(rewriter: Rewriter) -> None:
    """Read each Softmax up to its two factors and down to its product with v."""
    for node in rewriter.nodes("Softmax"):
        if node.attributes.get_int("axis", -1) not in (-1, (rank(node.inputs[0]) or 0) - 1):
            continue
        product = _product(node)
        scores = _read_scores(node.inputs[0])
        if product is not None and scores is not None:
            _raise(rewriter, product, scores)


@dataclasses.dataclass
class _Scores:
    """scale · q kᵀ, then additive masks and (condition, value where it is False) fills, outermost first."""

    matmul: ir.Node
    scale: float
    masks: list[ir.Value]
    fills: list[tuple[ir.Value, float, bool]]


def _product(softmax: ir.Node) -> ir.Node | None:
    """The MatMul(p, v) that is all the softmax is for, behind Dropout and the guard Where(IsNaN(p), 0, p)."""
    p = softmax.outputs[0]
    readers = users(p)
    if len(readers) == 2 and not p.is_graph_output():
        where = next((n for n in readers if n.op_type == "Where"), None)
        nan = made_by(where.inputs[0], "IsNaN") if where is not None else None
        if where is None or nan is None or nan.inputs[0] is not p or where.inputs[2] is not p:
            return None
        if number(where.inputs[1]) != 0.0 or nan not in readers:
            return None
        p = where.outputs[0]
    node = sole_user(p)
    if node is None or node.op_type != "MatMul" or node.domain != "" or node.inputs[0] is not p or node.inputs[1] is p:
        return None
    return node


def _read_scores(value: ir.Value | None) -> _Scores | None:
    """Walk up from the softmax's input through masks and scales to the MatMul."""
    scale = 1.0
    masks: list[ir.Value] = []
    fills: list[tuple[ir.Value, float, bool]] = []
    while value is not None and not value.is_graph_output():
        node = made_by(value, "MatMul", "Add", "Where", "Mul", "Div", "Max")
        if node is None:
            return None
        if node.op_type == "MatMul":
            return _Scores(node, scale, masks, fills) if rank(value) == 4 else None
        if node.op_type == "Add":
            sides = [_leads_to_product(v) for v in node.inputs]
            if sides.count(True) != 1 or scale != 1.0:
                return None
            mask = node.inputs[sides.index(False)]
            assert mask is not None
            masks.append(mask)
            value = node.inputs[sides.index(True)]
        elif node.op_type == "Where":
            fill = _fill(node)
            if fill is None or scale != 1.0:
                return None
            fills.append(fill)
            value = node.inputs[1] if fill[2] else node.inputs[2]
        elif node.op_type == "Max":  # clamps what the mask brought below float's range
            found = with_number(node)
            if found is None or found[1] > _FLOAT_MIN / 2 or scale != 1.0:
                return None
            value = found[0]
        else:
            found = with_number(node)
            if found is None or (node.op_type == "Div" and found[0] is not node.inputs[0]):
                return None
            scale *= found[1] if node.op_type == "Mul" else 1.0 / found[1]
            value = found[0]
    return None


def _fill(node: ir.Node) -> tuple[ir.Value, float, bool] | None:
    """(condition, number, whether True keeps the score) of Where(condition, scores, number) or its mirror."""
    condition, first, second = node.inputs
    if condition is None:
        return None
    for c, keeps in ((number(second), True), (number(first), False)):
        if c is not None and c <= _MASKED:
            return condition, c, keeps
    return None


def _leads_to_product(value: ir.Value | None, depth: int = 6) -> bool:
    """Whether scores, rather than a mask, arrive here: a MatMul of two computed values behind scales and masks."""
    node = made_by(value, "MatMul", "Add", "Where", "Mul", "Div", "Max")
    if node is None or depth == 0:
        return False
    if node.op_type == "MatMul":
        return rank(value) == 4 and not any(v is None or v.is_initializer() for v in node.inputs)
    inputs = node.inputs[1:] if node.op_type == "Where" else node.inputs
    return any(_leads_to_product(v, depth - 1) for v in inputs)


def _raise(rewriter: Rewriter, product: ir.Node, scores: _Scores) -> None:
    output = product.outputs[0]
    v = product.inputs[1]
    q, q_scale = _unscaled(scores.matmul.inputs[0])
    k_t, k_scale = _unscaled(scores.matmul.inputs[1])
    if v is None or q is None or k_t is None or rank(v) != 4:
        return
    if not scores.matmul.outputs[0].uses():
        return
    k, inner = _keys(rewriter, product, k_t)
    if k is None:
        return
    k, v = (_all_heads(rewriter, product, x, q) for x in (k, v))
    scale = scores.scale * q_scale * k_scale * inner
    mask = _mask(rewriter, product, scores, q)
    name = "Attention" if mask is None else "MaskedAttention"
    inputs = [q, k, v] if mask is None else [q, k, v, mask]
    rewriter.replace(output, name, inputs, {"scale": scale}, domain=DOMAIN)


def _all_heads(rewriter: Rewriter, before: ir.Node, x: ir.Value, q: ir.Value) -> ir.Value:
    """Multi-query attention: the one head of k or v, for all heads of q."""
    sizes, wanted = dims(x), dims(q)
    if sizes is None or wanted is None or sizes[1] != 1 or not isinstance(wanted[1], int) or wanted[1] == 1:
        return x
    target = rewriter.constant(np.array([1, wanted[1], 1, 1], np.int64), "heads")
    shape = ir.Shape([x.shape[0], wanted[1], x.shape[2], x.shape[3]]) if x.shape is not None else None
    return rewriter.insert(before, "Expand", [x, target], shape=shape, name=f"{before.name}/all_heads")


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """(x, c), where the value is c · x."""
    scale = 1.0
    while (node := made_by(value, "Mul", "Div")) is not None:
        found = with_number(node)
        if found is None or (node.op_type == "Div" and found[0] is not node.inputs[0]):
            break
        value = found[0]
        scale *= found[1] if node.op_type == "Mul" else 1.0 / found[1]
    return value, scale


def _keys(rewriter: Rewriter, before: ir.Node, k_t: ir.Value) -> tuple[ir.Value | None, float]:
    """k [B, H, T, D] from kᵀ [B, H, D, T]: its Transpose undone, or composed with the one that split the heads."""
    node = made_by(k_t, "Transpose")
    if rank(k_t) != 4:
        return None, 1.0
    shape = None
    if k_t.shape is not None:
        shape = ir.Shape([k_t.shape[0], k_t.shape[1], k_t.shape[3], k_t.shape[2]])
    if node is None:
        return rewriter.insert(before, "Transpose", [k_t], {"perm": [0, 1, 3, 2]}, shape=shape), 1.0
    perm = list(node.attributes.get_ints("perm", [3, 2, 1, 0]))
    perm = [perm[0], perm[1], perm[3], perm[2]]
    source = node.inputs[0]
    if source is None:
        return None, 1.0
    if perm != [0, 1, 2, 3]:
        name = f"{node.name}/keys"
        return rewriter.insert(before, "Transpose", [source], {"perm": perm}, shape=shape, name=name), 1.0
    return _unscaled(source)


def _mask(rewriter: Rewriter, before: ir.Node, scores: _Scores, q: ir.Value) -> ir.Value | None:
    """One additive mask.

    A fill becomes a term 0 or fill: where fill is as low as float goes, adding a score to it changes nothing, not even
    in a row that is masked throughout. A milder fill (-10000) is lowered so far, unless another mask adds to it.
    """
    dtype = q.dtype or ir.DataType.FLOAT
    terms = [mask for mask in scores.masks if not _always_zero(mask)]
    for condition, fill, keeps in scores.fills:
        if _always(condition, keeps):
            continue
        low = fill if terms or len(scores.fills) > 1 else min(fill, _FLOAT_MIN)
        zero = rewriter.constant(np.asarray(0.0, dtype.numpy()), "zero")
        fill_value = rewriter.constant(np.asarray(max(low, lowest(dtype)), dtype.numpy()), "fill")
        inputs = [condition, zero, fill_value] if keeps else [condition, fill_value, zero]
        terms.append(
            rewriter.insert(before, "Where", inputs, shape=condition.shape, dtype=dtype, name=f"{before.name}/mask")
        )
    if not terms:
        return None
    mask = terms[0]
    for term in terms[1:]:
        mask = rewriter.insert(before, "Add", [mask, term], name=f"{before.name}/masks", dtype=dtype)
    return mask


def _always_zero(mask: ir.Value) -> bool:
    """A mask that masks nothing (models without padding have one all the same)."""
    array = small_array(mask)
    if array is not None:
        return not array.any()
    node = made_by(mask, "Where", "Expand")
    if node is None or node.inputs[0] is None:
        return False
    if node.op_type == "Expand":
        return _always_zero(node.inputs[0])
    return (_always(node.inputs[0], True) and number(node.inputs[1]) == 0.0) or (
        _always(node.inputs[0], False) and number(node.inputs[2]) == 0.0
    )


def _always(condition: ir.Value, truth: bool) -> bool:
    while (node := made_by(condition, "Expand")) is not None and node.inputs[0] is not None:
        condition = node.inputs[0]
    array = small_array(condition)
    return array is not None and bool((array == truth).all())
