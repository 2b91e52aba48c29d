"""Names of Linears: the parameter's where the file kept it, else where in the model the operator came from.

A name lost to an exporter ("onnx::MatMul_123") is found again in the bias ("encoder.layer.0.query.bias"), in the scopes
that the dynamo exporter leaves on its nodes, or in the legacy exporter's node names
("/encoder/layer.0/query/MatMul").
"""

from __future__ import annotations

import ast
import re

import onnx_ir as ir

from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.rules.rewriter import MAP, PARAMETER, Rewriter

_LOST = re.compile(r"onnx::|val_\d|const|_?\d+$|/|.*_output_\d", re.IGNORECASE)
_WEIGHT = re.compile(r"[._]weight$")
_EXPERT = re.compile(r"item:(\d+)")
_SUFFIX = re.compile(r"(_\d+)?$")


def name_linears(rewriter: Rewriter) -> None:
    """Give each Linear's MatMul a unique name, its parameters names that belong to it, and write the originals down."""
    taken: set[str] = set()
    sharing: dict[ir.Value, int] = {}
    found = linears(rewriter.model)
    for linear in found:
        for value in (linear.weight, linear.bias):
            if value is not None:
                sharing[value] = sharing.get(value, 0) + 1
    others = {node.name for node in rewriter.graph} - {linear.name for linear in found}
    for linear in found:
        base = _name(linear, sharing)
        name, number = base, 2
        while name in taken or name in others:
            name, number = f"{base}_{number}", number + 1
        taken.add(name)
        linear.matmul.name = name
        _claim(rewriter, linear.weight, f"{name}.weight", sharing)
        if linear.bias is not None:
            _claim(rewriter, linear.bias, f"{name}.bias", sharing)


def record_parameters(model: ir.Model) -> None:
    """Write down on each float initializer the name under which its parameter came in."""
    for name, value in model.graph.initializers.items():
        if value.dtype is not None and value.dtype.is_floating_point() and value.shape is not None and len(value.shape):
            value.metadata_props.setdefault(PARAMETER, name)


def _name(linear: Linear, sharing: dict[ir.Value, int]) -> str:
    weight = linear.weight.metadata_props.get(PARAMETER) or linear.weight.name or ""
    if not _LOST.match(weight):
        return _of_expert(_WEIGHT.sub("", weight), linear.weight.metadata_props.get(MAP, ""))
    bias = linear.bias.name if linear.bias is not None and sharing[linear.bias] == 1 else None
    if bias and bias.endswith(".bias") and not _LOST.match(bias):
        return bias.removesuffix(".bias")
    return _scope(linear.matmul) or _path(linear.matmul) or linear.output.name or "linear"


def _of_expert(name: str, maps: str) -> str:
    """ "experts.gate_up_proj" as "experts.3.gate_up_proj", where the weight is one of a parameter's matrices."""
    expert = _EXPERT.match(maps)
    if expert is None:
        return name
    parent, dot, own = name.rpartition(".")
    return f"{parent}{dot}{expert[1]}.{own}"


def _scope(node: ir.Node) -> str | None:
    """The module that the dynamo exporter says the node came from."""
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if text is None:
        return None
    scopes = ast.literal_eval(text)
    return scopes[-2] if len(scopes) > 1 and scopes[-2] else None


def _path(node: ir.Node) -> str | None:
    """The module path in a legacy node name, without the operator at its end."""
    parts = (node.name or "").strip("/").split("/")
    while len(parts) > 1 and _SUFFIX.sub("", parts[-1]) in ("MatMul", "Gemm", "Add"):
        parts.pop()
    return ".".join(parts) if parts != [""] else None


def _claim(rewriter: Rewriter, value: ir.Value, name: str, sharing: dict[ir.Value, int]) -> None:
    """Rename a parameter of lost name after its Linear."""
    if value.is_initializer() and value.name != name and _LOST.match(value.name or "") and sharing[value] == 1:
        rewriter.rename_initializer(value, name)
