"""com.microsoft Attention and MultiHeadAttention: the Linear that one hides, and our attention functions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.graph.rules.heads import additive, attend, causal_condition, merge_heads, split_heads
from qcompiler.graph.rules.patterns import dims, last_dim, made_by, rank
from qcompiler.graph.rules.rewriter import Rewriter


def expand_attention(rewriter: Rewriter, node: ir.Node) -> None:
    """One Linear for q, k and v, a Split, and attention; with a cache, rotary or unequal heads it stays as it is."""
    inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
    x, weight, bias, mask, past, extra_bias = inputs[:6]
    heads = node.attributes.get_int("num_heads", 0)
    width = last_dim(weight)
    known = x is not None and weight is not None and width is not None and heads > 0
    odd = node.attributes.get_int("do_rotary", 0) or (len(node.outputs) > 1 and _used(node.outputs[1]))
    if not known or odd or past is not None or weight is None or width is None or not _readable(mask, x):
        return
    sizes = list(node.attributes.get_ints("qkv_hidden_sizes", ()) or [width // 3] * 3)
    if sum(sizes) != width or sizes[0] % heads or sizes[2] % heads:
        return
    product = rewriter.insert(node, "MatMul", [x, weight], name=f"{node.name}/qkv/MatMul", shape=_wide(x, width))
    if bias is not None:
        product = rewriter.insert(node, "Add", [product, bias], name=f"{node.name}/qkv/Add", shape=product.shape)
    lengths = rewriter.constant(np.array(sizes, np.int64), f"{node.name}/sizes")
    first = rewriter.insert(node, "Split", [product, lengths], {"axis": -1}, outputs=3, shape=_wide(x, sizes[0]))
    split = first.producer()
    assert split is not None
    parts = []
    for size, part in zip(sizes, split.outputs, strict=True):
        part.type, part.shape = first.type, _wide(x, size)
        parts.append(split_heads(rewriter, node, part, heads))
    _attend(rewriter, node, (parts[0], parts[1], parts[2]), sizes[0] // heads, mask, extra_bias)


def expand_multi_head_attention(rewriter: Rewriter, node: ir.Node) -> None:
    """q, k, v [B, S, H · D] or k, v [B, H, T, D]; packed inputs and caches stay as they are."""
    inputs = [*node.inputs, *[None] * (10 - len(node.inputs))]
    q, k, v, bias, mask, extra_bias = inputs[:6]
    heads, width = node.attributes.get_int("num_heads", 0), last_dim(q)
    extra = any(value is not None for value in inputs[6:]) or any(_used(output) for output in node.outputs[1:])
    if q is None or k is None or v is None or rank(q) != 3 or width is None or extra or not _readable(mask, q):
        return
    if rank(k) not in (3, 4) or rank(v) != rank(k):
        return
    if bias is not None:
        if rank(k) != 3:
            return
        q, k, v = _add_biases(rewriter, node, bias, (q, k, v))
    q4 = split_heads(rewriter, node, q, heads)
    k4, v4 = (split_heads(rewriter, node, x, heads) if rank(x) == 3 else x for x in (k, v))
    _attend(rewriter, node, (q4, k4, v4), width // heads, mask, extra_bias)


def _attend(
    rewriter: Rewriter,
    node: ir.Node,
    qkv: tuple[ir.Value, ir.Value, ir.Value],
    head: int,
    mask: ir.Value | None,
    extra_bias: ir.Value | None,
) -> None:
    """The masks of all kinds added up, then attention in the place of ``node``."""
    q, k, v = qkv
    dtype = q.dtype or ir.DataType.FLOAT
    fill = node.attributes.get_float("mask_filter_value", -10000.0)
    terms = [extra_bias] if extra_bias is not None else []
    if mask is not None:
        terms.append(additive(rewriter, node, _keep(rewriter, node, mask, k), dtype, fill))
    if node.attributes.get_int("unidirectional", 0):
        terms.append(additive(rewriter, node, causal_condition(rewriter, node, q, k, from_end=True), dtype))
    total = terms[0] if terms else None
    for term in terms[1:]:
        total = rewriter.insert(node, "Add", [total, term], dtype=dtype)
    scale = node.attributes.get_float("scale", 0.0) or 1.0 / head**0.5
    y = attend(rewriter, node, q, k, v, total, scale)
    merged = merge_heads(rewriter, node, y)
    rewriter.take_over(node.outputs[0], merged)


def _used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _wide(x: ir.Value | None, width: int) -> ir.Shape | None:
    return ir.Shape([*x.shape[:-1], width]) if x is not None and x.shape is not None else None


def _readable(mask: ir.Value | None, x: ir.Value | None) -> bool:
    """A mask of integers: [B] lengths, [B, T], or [B, S, T]."""
    if mask is None:
        return True
    sizes = dims(mask)
    if sizes is None or len(sizes) != 1:
        return sizes is not None and len(sizes) in (2, 3)
    batch = dims(x)  # a vector may also hold ends and starts, [2 · B]
    same = batch is not None and batch[0] is not None and batch[0] == sizes[0]
    return same or made_by(mask, "ReduceSum") is not None


def _keep(rewriter: Rewriter, node: ir.Node, mask: ir.Value, k: ir.Value) -> ir.Value:
    """Boolean, broadcast to [B, H, S, T]: which keys are seen."""
    size = rank(mask)
    if size == 1:  # number of tokens of each row, padding on the right
        end = rewriter.insert(node, "Shape", [k], {"start": 2, "end": 3}, dtype=ir.DataType.INT64)
        scalar = rewriter.constant(np.array([], np.int64), "scalar")
        length = rewriter.insert(node, "Reshape", [end, scalar], shape=ir.Shape([]), dtype=ir.DataType.INT64)
        zero, one = (rewriter.constant(np.asarray(i, np.int64), "position") for i in (0, 1))
        columns = rewriter.insert(node, "Range", [zero, length, one], dtype=ir.DataType.INT64)
        counts = rewriter.insert(node, "Cast", [mask], {"to": int(ir.DataType.INT64)}, dtype=ir.DataType.INT64)
        axes = rewriter.constant(np.array([1, 2, 3], np.int64), "axes")
        counts = rewriter.insert(node, "Unsqueeze", [counts, axes])
        return rewriter.insert(node, "Less", [columns, counts], dtype=ir.DataType.BOOL)
    keep = rewriter.insert(
        node, "Cast", [mask], {"to": int(ir.DataType.BOOL)}, dtype=ir.DataType.BOOL, shape=mask.shape
    )
    axes = rewriter.constant(np.array([1, 2] if size == 2 else [1], np.int64), "axes")
    return rewriter.insert(node, "Unsqueeze", [keep, axes])


def _add_biases(
    rewriter: Rewriter, node: ir.Node, bias: ir.Value, qkv: tuple[ir.Value, ir.Value, ir.Value]
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The bias [q | k | v] that fusion took from three Linears, given back to each."""
    from qcompiler.graph.edit import array_of

    array = array_of(bias)
    widths = [last_dim(x) for x in qkv]
    if array is None or None in widths:
        sizes = [w or 0 for w in widths]
        lengths = rewriter.constant(np.array(sizes, np.int64), f"{node.name}/sizes")
        first = rewriter.insert(node, "Split", [bias, lengths], {"axis": 0}, outputs=3)
        split = first.producer()
        assert split is not None
        parts = list(split.outputs)
    else:
        start, parts = 0, []
        for letter, width in zip("qkv", widths, strict=True):
            assert width is not None
            part = array[start : start + width]
            map_ = f"slice:0:{start}:{start + width}"
            parts.append(rewriter.initializer(f"{bias.name}.{letter}", part, like=bias, map_=map_))
            start += width
    q, k, v = (
        rewriter.insert(node, "Add", [x, part], shape=x.shape, name=f"{node.name}/{letter}/Add")
        for letter, x, part in zip("qkv", qkv, parts, strict=True)
    )
    return q, k, v
