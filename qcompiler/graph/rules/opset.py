"""Opset 21 from 11 to 23: attributes that became inputs on the way up; operators of 22 and 23 on the way down.

``onnx.version_converter`` refuses graphs with contrib operators, and the graphs of ``onnxruntime.transformers`` are
full of them; what changed between 11 and 21 for operators that Transformers use fits one table.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.core import DOMAIN, ModelError
from qcompiler.graph.functions import OPSET
from qcompiler.graph.rules.patterns import dims, rank
from qcompiler.graph.rules.rewriter import Rewriter
from qcompiler.graph.rules.sequences import infer_shapes

OLDEST, NEWEST = 11, 23

_SOFTMAXES = ("Softmax", "LogSoftmax", "Hardmax")
_REDUCTIONS = ("Max", "Mean", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
_CONTRIB_ONCE = {"SimplifiedLayerNormalization", "LayerNormalization"}
"""ONNX Runtime registers these in the standard domain, at any opset."""


def source_opset(model: ir.Model) -> int:
    """The standard opset the model came in.

    Raises:
        ModelError: none, or one outside 11 to 23.
    """
    version = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx"))
    if version is None:
        raise ModelError("the model imports no standard ONNX opset: it has no operator that qcompiler knows.")
    if not OLDEST <= version <= NEWEST:
        raise ModelError(f"the model is of ONNX opset {version}; export it with one from {OLDEST} to {NEWEST}.")
    return version


def convert_opset(rewriter: Rewriter, version: int) -> None:
    """Bring the graph, its subgraphs' imports included, from ``version`` to opset 21.

    Raises:
        ModelError: an operator whose meaning cannot be kept, by name.
    """
    for node in list(rewriter.graph.all_nodes()):
        since, rule = _UPWARD.get(node.op_type, (0, _keep)) if node.domain == "" else (0, _keep)
        if version < since:
            rule(rewriter, node)
    if version > OPSET:
        infer_shapes(rewriter.model)
        for node in rewriter.nodes(*_DOWNWARD):
            _DOWNWARD[node.op_type](rewriter, node)
    _refuse_changed(rewriter, version)
    imports = rewriter.graph.opset_imports
    imports.pop("ai.onnx", None)
    imports[""] = OPSET


def convert_softmax(rewriter: Rewriter, version: int) -> None:
    """Softmax and its like from before opset 13: to be called when ranks are known.

    Raises:
        ModelError: one that runs over several axes at once.
    """
    if version < 13:
        for node in rewriter.nodes(*_SOFTMAXES):
            _softmax(rewriter, node)


def _refuse_changed(rewriter: Rewriter, version: int) -> None:
    for node in rewriter.model.graph.all_nodes():
        if node.domain != "" or node.op_type in _CONTRIB_ONCE:
            continue
        if not onnx.defs.has(node.op_type, "") or not _exists(node.op_type):
            raise ModelError(
                f"node {node.name!r} is a {node.op_type}, which ONNX opset {OPSET} does not have: "
                f"export the model at opset {OPSET}."
            )
        nested = node.graph is not rewriter.graph
        if nested and node.op_type in _SOFTMAXES and version < 13 and node.attributes.get_int("axis", 1) != -1:
            raise ModelError(
                f"node {node.name!r} ({node.op_type}) lies in a subgraph of an opset {version} model, which cannot be "
                f"brought to opset {OPSET}: export the model at opset 13 or newer."
            )


def _exists(op_type: str) -> bool:
    try:
        return not onnx.defs.get_schema(op_type, OPSET, "").deprecated
    except onnx.defs.SchemaError:
        return False


# --- up ---


def _keep(rewriter: Rewriter, node: ir.Node) -> None:
    """Most operators only gained types."""


def _ints_to_input(attribute: str, index: int = 1) -> Callable[[Rewriter, ir.Node], None]:
    """An attribute of integers becomes an input."""

    def rule(rewriter: Rewriter, node: ir.Node) -> None:
        values = node.attributes.pop(attribute, None)
        if values is not None:
            node.resize_inputs(index + 1)
            node.replace_input_with(
                index, rewriter.constant(np.array(values.as_ints(), np.int64), f"{node.name}/{attribute}")
            )

    return rule


def _split(rewriter: Rewriter, node: ir.Node) -> None:
    """Sizes become an input (13), equal parts a number (18)."""
    _ints_to_input("split")(rewriter, node)
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _softmax(rewriter: Rewriter, node: ir.Node) -> None:
    """Before 13 all axes from ``axis`` on were flattened into one, and the default was 1."""
    axis, size = node.attributes.get_int("axis", 1), rank(node.inputs[0])
    if axis != -1 and (size is None or axis % size != size - 1):
        shape = dims(node.inputs[0])
        tail = shape[axis + 1 :] if shape is not None and axis >= 0 else [None]
        if not all(d == 1 for d in tail):
            raise ModelError(
                f"node {node.name!r} is a {node.op_type} over several axes at once, as before opset 13: "
                "export the model at opset 13 or newer."
            )
    else:
        axis = -1
    node.attributes["axis"] = ir.AttrInt64("axis", axis)


def _dropout(rewriter: Rewriter, node: ir.Node) -> None:
    node.attributes.pop("ratio", None)


def _grid_sample(rewriter: Rewriter, node: ir.Node) -> None:
    mode = node.attributes.get_string("mode", "linear")
    renamed = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    node.attributes["mode"] = ir.AttrString("mode", renamed)


_UPWARD: dict[str, tuple[int, Callable[[Rewriter, ir.Node], None]]] = {
    "Squeeze": (13, _ints_to_input("axes")),
    "Unsqueeze": (13, _ints_to_input("axes")),
    "ReduceSum": (13, _ints_to_input("axes")),
    **{f"Reduce{name}": (18, _ints_to_input("axes")) for name in _REDUCTIONS},
    "Split": (18, _split),
    "Dropout": (12, _dropout),
    "GridSample": (20, _grid_sample),
}


# --- down ---


def _rms_normalization(rewriter: Rewriter, node: ir.Node) -> None:
    x, weight = node.inputs[0], node.inputs[1]
    if node.attributes.get_int("axis", -1) not in (-1, (rank(x) or 0) - 1):
        raise ModelError(
            f"node {node.name!r} is an RMSNormalization over several axes, which opset {OPSET} does not have."
        )
    attributes = {"epsilon": node.attributes.get_float("epsilon", 1e-5)}
    rewriter.replace(node.outputs[0], "RMSNorm", [x, weight], attributes, domain=DOMAIN)


def _attention(rewriter: Rewriter, node: ir.Node) -> None:
    """Attention-23 of four axes, or of three with head counts; without a cache of its own."""
    from qcompiler.graph.rules.heads import attend, merge_heads, split_heads

    inputs = [*node.inputs, *[None] * (6 - len(node.inputs))]
    q, k, v, mask = inputs[:4]
    softcap = node.attributes.get_float("softcap", 0.0)
    extra = (
        inputs[4] is not None or inputs[5] is not None or any(o.uses() or o.is_graph_output() for o in node.outputs[1:])
    )
    if softcap or extra or q is None or k is None or v is None:
        raise ModelError(
            f"node {node.name!r} is an Attention with a cache or softcap, which opset {OPSET} does not have: "
            f"export the model at opset {OPSET}."
        )
    heads = node.attributes.get_int("q_num_heads", 0)
    kv_heads = node.attributes.get_int("kv_num_heads", 0)
    if rank(q) == 3:
        q = split_heads(rewriter, node, q, heads)
        k, v = split_heads(rewriter, node, k, kv_heads), split_heads(rewriter, node, v, kv_heads)
    scale = node.attributes.get_float("scale", None)
    causal = node.attributes.get_int("is_causal", 0) == 1
    y = attend(rewriter, node, q, k, v, mask, scale, causal=causal)
    rewriter.take_over(node.outputs[0], merge_heads(rewriter, node, y) if rank(node.inputs[0]) == 3 else y)


def _rotary(rewriter: Rewriter, node: ir.Node) -> None:
    """RotaryEmbedding-23 with cos and sin by position and without position ids, on the whole head."""
    x, cos, sin = node.inputs[:3]
    whole = node.attributes.get_int("rotary_embedding_dim", 0) == 0 and node.attributes.get_int("interleaved", 0) == 0
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        positions = node.inputs[3]
        dtype = cos.dtype if cos is not None else None
        cos, sin = (rewriter.insert(node, "Gather", [table, positions], dtype=dtype) for table in (cos, sin))
    elif rank(cos) != 3:
        whole = False
    if not whole or rank(x) != 4:
        raise ModelError(
            f"node {node.name!r} is a RotaryEmbedding of opset 23 in a form that opset {OPSET} cannot write: "
            f"export the model at opset {OPSET}."
        )
    one = rewriter.constant(np.array([1], np.int64), "axes")
    tables = []
    for table in (cos, sin):  # [B, S, D / 2] holds each angle once, our function wants [B, 1, S, D]
        twice = rewriter.insert(node, "Concat", [table, table], {"axis": -1})
        tables.append(rewriter.insert(node, "Unsqueeze", [twice, one]))
    rewriter.replace(node.outputs[0], "RotaryEmbedding", [x, *tables], domain=DOMAIN)


_DOWNWARD: dict[str, Callable[[Rewriter, ir.Node], None]] = {
    "RMSNormalization": _rms_normalization,
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
}
