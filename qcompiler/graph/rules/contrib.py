"""Operators of ONNX Runtime's own (com.microsoft) back to the standard ones they were fused from.

A fused operator hides Linears, norms and residuals. What is in no table here passes through untouched.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompiler.core import DOMAIN
from qcompiler.graph.edit import remove_dead
from qcompiler.graph.rules.contrib_attention import expand_attention, expand_multi_head_attention
from qcompiler.graph.rules.patterns import rank
from qcompiler.graph.rules.rewriter import Rewriter
from qcompiler.graph.rules.sequences import infer_shapes

_MICROSOFT = "com.microsoft"


def expand_contrib(rewriter: Rewriter) -> None:
    """Expand every operator of the table below; shapes that one expansion makes known let others happen."""
    before = -1
    while (left := _left(rewriter)) and left != before:
        before = left
        for domain, table in _TABLES.items():
            for node in rewriter.nodes(*table, domain=domain):
                table[node.op_type](rewriter, node)
        remove_dead(rewriter.model)
        infer_shapes(rewriter.model)


def _left(rewriter: Rewriter) -> int:
    return sum(1 for domain, table in _TABLES.items() for _ in rewriter.nodes(*table, domain=domain))


def drop_unused_domains(model: ir.Model) -> None:
    """Forget the imports of domains that no node is of any more."""
    used = {node.domain for node in model.graph.all_nodes()} | {"", "ai.onnx"}
    for domain in set(model.graph.opset_imports) - used:
        del model.graph.opset_imports[domain]


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _used(node: ir.Node, index: int) -> bool:
    return len(node.outputs) > index and bool(node.outputs[index].uses() or node.outputs[index].is_graph_output())


# --- Gelu and its like ---


def _gelu(approximate: str) -> Callable[[Rewriter, ir.Node], None]:
    def rule(rewriter: Rewriter, node: ir.Node) -> None:
        x, bias = node.inputs[0], _optional(node, 1)
        if bias is not None:
            x = rewriter.insert(node, "Add", [x, bias], shape=node.outputs[0].shape, name=f"{node.name}/Add")
        rewriter.replace(node.outputs[0], "Gelu", [x], {"approximate": approximate})

    return rule


def _quick_gelu(rewriter: Rewriter, node: ir.Node) -> None:
    """x · sigmoid(alpha · x)."""
    x = node.inputs[0]
    assert x is not None
    alpha = np.asarray(node.attributes.get_float("alpha", 1.702), (x.dtype or ir.DataType.FLOAT).numpy())
    scaled = x if alpha == 1.0 else rewriter.insert(node, "Mul", [x, rewriter.constant(alpha, "alpha")], shape=x.shape)
    gate = rewriter.insert(node, "Sigmoid", [scaled], shape=x.shape)
    rewriter.replace(node.outputs[0], "Mul", [x, gate])


# --- norms ---


def _skip_layer_norm(rewriter: Rewriter, node: ir.Node) -> None:
    """LayerNormalization(input + skip + bias)."""
    if _used(node, 1) or _used(node, 2):
        return
    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    x, skip, gamma = node.inputs[:3]
    beta, bias = (None, _optional(node, 3)) if simplified else (_optional(node, 3), _optional(node, 4))
    shape = node.outputs[0].shape
    if bias is not None:  # the Linear before it lost its bias to this operator
        x = rewriter.insert(node, "Add", [x, bias], shape=shape, name=f"{node.name}/bias")
    total = rewriter.insert(node, "Add", [x, skip], shape=shape, name=f"{node.name}/residual")
    if _used(node, 3):
        rewriter.take_over(node.outputs[3], total)
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    if simplified:
        rewriter.replace(node.outputs[0], "RMSNorm", [total, gamma], {"epsilon": epsilon}, domain=DOMAIN)
    else:
        inputs = [total, gamma] if beta is None else [total, gamma, beta]
        rewriter.replace(node.outputs[0], "LayerNormalization", inputs, {"axis": -1, "epsilon": epsilon})


def _simplified_layer_norm(rewriter: Rewriter, node: ir.Node) -> None:
    if _used(node, 1) or node.attributes.get_int("axis", -1) not in (-1, (rank(node.inputs[0]) or 0) - 1):
        return
    attributes = {"epsilon": node.attributes.get_float("epsilon", 1e-5)}
    rewriter.replace(node.outputs[0], "RMSNorm", node.inputs[:2], attributes, domain=DOMAIN)


def _embed_layer_norm(rewriter: Rewriter, node: ir.Node) -> None:
    """LayerNormalization(word[ids] + position[positions] + segment[segments])."""
    ids, segments, words, positions, segment_table, gamma, beta = node.inputs[:7]
    mask, position_ids = _optional(node, 7), _optional(node, 8)
    if _used(node, 1) and (
        mask is None or node.attributes.get_int("mask_index_type", 0) != 0 or not _lengths_only(node)
    ):
        return
    assert words is not None
    dtype = words.dtype
    total = rewriter.insert(node, "Gather", [words, ids], dtype=dtype, name=f"{node.name}/words")
    if position_ids is None:
        position_ids = _positions(rewriter, node, ids)
    place = rewriter.insert(node, "Gather", [positions, position_ids], dtype=dtype, name=f"{node.name}/positions")
    total = rewriter.insert(node, "Add", [total, place])
    if segments is not None and segment_table is not None:
        kind = rewriter.insert(node, "Gather", [segment_table, segments], dtype=dtype, name=f"{node.name}/segments")
        total = rewriter.insert(node, "Add", [total, kind])
    if _used(node, 2):
        rewriter.take_over(node.outputs[2], total)
    if _used(node, 1):
        axes = rewriter.constant(np.array([1], np.int64), "axes")
        count = rewriter.insert(node, "ReduceSum", [mask, axes], {"keepdims": 0}, shape=ir.Shape([None]))
        rewriter.take_over(node.outputs[1], count)
    attributes = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-12)}
    rewriter.replace(node.outputs[0], "LayerNormalization", [total, gamma, beta], attributes)


def _lengths_only(node: ir.Node) -> bool:
    """Whether the mask index goes into Attention alone, as the number of tokens of each row."""
    return all(user.op_type == "Attention" and index == 3 for user, index in node.outputs[1].uses())


def _positions(rewriter: Rewriter, node: ir.Node, ids: ir.Value | None) -> ir.Value:
    """0 … S - 1, [1, S]."""
    size = rewriter.insert(node, "Shape", [ids], {"start": 1, "end": 2}, dtype=ir.DataType.INT64)
    scalar = rewriter.constant(np.array([], np.int64), "scalar")
    length = rewriter.insert(node, "Reshape", [size, scalar], shape=ir.Shape([]), dtype=ir.DataType.INT64)
    zero, one = (rewriter.constant(np.asarray(i, np.int64), "position") for i in (0, 1))
    row = rewriter.insert(node, "Range", [zero, length, one], dtype=ir.DataType.INT64)
    return rewriter.insert(node, "Unsqueeze", [row, rewriter.constant(np.array([0], np.int64), "axes")])


# --- matrix products ---


def _fused_matmul(rewriter: Rewriter, node: ir.Node) -> None:
    """alpha · A' B'."""
    if node.attributes.get_int("transBatchA", 0) or node.attributes.get_int("transBatchB", 0):
        return
    sides = []
    for index, flag in enumerate(("transA", "transB")):
        x = node.inputs[index]
        if node.attributes.get_int(flag, 0):
            size = rank(x)
            if size is None or size < 2:
                return
            perm = [*range(size - 2), size - 1, size - 2]
            shape = ir.Shape([x.shape[i] for i in perm]) if x is not None and x.shape is not None else None
            x = rewriter.insert(node, "Transpose", [x], {"perm": perm}, name=f"{node.name}/{flag}", shape=shape)
        sides.append(x)
    alpha = node.attributes.get_float("alpha", 1.0)
    if alpha == 1.0:
        rewriter.replace(node.outputs[0], "MatMul", sides)
        return
    product = rewriter.insert(node, "MatMul", sides, shape=node.outputs[0].shape, name=f"{node.name}/MatMul")
    factor = np.asarray(alpha, (node.outputs[0].dtype or product.dtype or ir.DataType.FLOAT).numpy())
    rewriter.replace(node.outputs[0], "Mul", [product, rewriter.constant(factor, "alpha")])


def _fused_gemm(rewriter: Rewriter, node: ir.Node) -> None:
    """An activation behind a Gemm."""
    activation = node.attributes.get_string("activation", "")
    if activation not in ("Relu", "Tanh", "Sigmoid"):
        return
    attributes = {
        key: node.attributes[key].value for key in ("alpha", "beta", "transA", "transB") if key in node.attributes
    }
    product = rewriter.insert(
        node, "Gemm", node.inputs, attributes, shape=node.outputs[0].shape, name=f"{node.name}/Gemm"
    )
    rewriter.replace(node.outputs[0], activation, [product])


_Rules = dict[str, Callable[[Rewriter, ir.Node], None]]
_TABLE: _Rules = {
    "Gelu": _gelu("none"),
    "BiasGelu": _gelu("none"),
    "FastGelu": _gelu("tanh"),
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_layer_norm,
    "SimplifiedLayerNormalization": _simplified_layer_norm,
    "EmbedLayerNormalization": _embed_layer_norm,
    "FusedMatMul": _fused_matmul,
    "FusedGemm": _fused_gemm,
    "Attention": expand_attention,
    "MultiHeadAttention": expand_multi_head_attention,
}
_TABLES: dict[str, _Rules] = {_MICROSOFT: _TABLE, "": {"SimplifiedLayerNormalization": _simplified_layer_norm}}
