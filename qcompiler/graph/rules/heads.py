"""Attention spelled with our function, from operators that hide it: heads split and merged, masks made additive."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.core import DOMAIN, ModelError
from qcompiler.graph.rules.patterns import dims, lowest
from qcompiler.graph.rules.rewriter import Rewriter


def split_heads(rewriter: Rewriter, before: ir.Node, x: ir.Value, heads: int) -> ir.Value:
    """[B, S, H · D] to [B, H, S, D]."""
    target = rewriter.constant(np.array([0, 0, heads, -1], np.int64), "split_heads")
    split = rewriter.insert(before, "Reshape", [x, target], shape=_head_shape(x, heads))
    shape = split.shape
    swapped = ir.Shape([shape[0], shape[2], shape[1], shape[3]]) if shape is not None else None
    return rewriter.insert(before, "Transpose", [split], {"perm": [0, 2, 1, 3]}, shape=swapped)


def _head_shape(x: ir.Value, heads: int) -> ir.Shape | None:
    if x.shape is None or len(x.shape) != 3:
        return ir.Shape([None, None, heads, None])
    last = x.shape[2]
    return ir.Shape([x.shape[0], x.shape[1], heads, last // heads if isinstance(last, int) else None])


def merge_heads(rewriter: Rewriter, before: ir.Node, y: ir.Value) -> ir.Value:
    """[B, H, S, D] to [B, S, H · D]."""
    swapped = rewriter.insert(before, "Transpose", [y], {"perm": [0, 2, 1, 3]})
    return rewriter.insert(
        before, "Reshape", [swapped, rewriter.constant(np.array([0, 0, -1], np.int64), "merge_heads")]
    )


def attend(
    rewriter: Rewriter,
    before: ir.Node,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: ir.Value | None,
    scale: float | None,
    *,
    causal: bool = False,
) -> ir.Value:
    """The call of Attention or MaskedAttention; k and v with fewer heads are repeated, a boolean mask becomes additive.

    Args:
        scale: None for 1 / sqrt(D), which must then be known.
        causal: mask keys behind their query.
    """
    dtype = q.dtype or ir.DataType.FLOAT
    sizes, key_sizes = dims(q), dims(k)
    if scale is None:
        size = sizes[3] if sizes is not None else None
        if not isinstance(size, int):
            raise ModelError(
                f"the size of the heads of attention {before.name!r} is not known: export with static hidden sizes."
            )
        scale = 1.0 / size**0.5
    if sizes is not None and key_sizes is not None and isinstance(sizes[1], int) and isinstance(key_sizes[1], int):
        repeats = sizes[1] // key_sizes[1]
        if repeats > 1:
            k, v = _repeat(rewriter, before, k, repeats), _repeat(rewriter, before, v, repeats)
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        mask = additive(rewriter, before, mask, dtype)
    if causal:
        triangle = additive(rewriter, before, causal_condition(rewriter, before, q, k, from_end=False), dtype)
        mask = triangle if mask is None else rewriter.insert(before, "Add", [mask, triangle], dtype=dtype)
    inputs = [q, k, v] if mask is None else [q, k, v, mask]
    name = "Attention" if mask is None else "MaskedAttention"
    return rewriter.insert(before, name, inputs, {"scale": float(scale)}, domain=DOMAIN, shape=q.shape, dtype=dtype)


def _repeat(rewriter: Rewriter, before: ir.Node, x: ir.Value, repeats: int) -> ir.Value:
    """[B, G, T, D] to [B, G · repeats, T, D], each head repeated in place (grouped-query attention)."""
    sizes = dims(x)
    if sizes is None or not isinstance(sizes[1], int) or not isinstance(sizes[3], int):
        raise ModelError(
            f"the size of the heads of attention {before.name!r} is not known: export with static hidden sizes."
        )
    wide = rewriter.insert(before, "Unsqueeze", [x, rewriter.constant(np.array([2], np.int64), "axes")])
    wide = rewriter.insert(
        before, "Expand", [wide, rewriter.constant(np.array([1, 1, repeats, 1, 1], np.int64), "repeat")]
    )
    heads = sizes[1] * repeats
    target = rewriter.constant(np.array([0, heads, -1, sizes[3]], np.int64), "merge_groups")
    return rewriter.insert(before, "Reshape", [wide, target], shape=_with_heads(x, heads))


def _with_heads(x: ir.Value, heads: int) -> ir.Shape | None:
    return ir.Shape([x.shape[0], heads, x.shape[2], x.shape[3]]) if x.shape is not None else None


def additive(
    rewriter: Rewriter, before: ir.Node, keep: ir.Value, dtype: ir.DataType, fill: float | None = None
) -> ir.Value:
    """0 where ``keep`` is true, ``fill`` (the lowest number of the type) elsewhere."""
    zero = rewriter.constant(np.asarray(0.0, dtype.numpy()), "zero")
    low = rewriter.constant(np.asarray(lowest(dtype) if fill is None else fill, dtype.numpy()), "lowest")
    return rewriter.insert(before, "Where", [keep, zero, low], shape=keep.shape, dtype=dtype)


def causal_condition(rewriter: Rewriter, before: ir.Node, q: ir.Value, k: ir.Value, from_end: bool) -> ir.Value:
    """Boolean [S, T]: key t at or before query s; the first query is the first key, or the last one the last."""

    def length(x: ir.Value) -> ir.Value:
        size = rewriter.insert(before, "Shape", [x], {"start": 2, "end": 3}, dtype=ir.DataType.INT64)
        scalar = rewriter.constant(np.array([], np.int64), "scalar")
        return rewriter.insert(before, "Reshape", [size, scalar], shape=ir.Shape([]), dtype=ir.DataType.INT64)

    zero, one = (rewriter.constant(np.asarray(i, np.int64), "position") for i in (0, 1))
    queries, keys = length(q), length(k)
    rows = rewriter.insert(before, "Range", [zero, queries, one], dtype=ir.DataType.INT64)
    columns = rewriter.insert(before, "Range", [zero, keys, one], dtype=ir.DataType.INT64)
    if from_end:
        past = rewriter.insert(before, "Sub", [keys, queries], dtype=ir.DataType.INT64)
        rows = rewriter.insert(before, "Add", [rows, past], dtype=ir.DataType.INT64)
    rows = rewriter.insert(before, "Unsqueeze", [rows, rewriter.constant(np.array([1], np.int64), "axes")])
    return rewriter.insert(before, "LessOrEqual", [columns, rows], dtype=ir.DataType.BOOL)
