"""The share of integer work in the graph that ONNX Runtime really runs."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.targets.lowered import Coverage, Lowered, coverage_of
from qcompiler.targets.ort.optimised import Finder, is_integer, optimised_graph
from qcompiler.targets.ort.pieces import pieces

PIECE = 256 << 20
"""Bytes of weights that are read back at once: ONNX Runtime holds them, packs them for its kernels and writes them."""


def integer_coverage(model: ir.Model, lowered: Lowered, canonical: ir.Model) -> Coverage:
    """Count what runs in integers after ONNX Runtime's own optimizer (all levels, CPU).

    Args:
        model: the lowered model.
        lowered: what the lowering said of it.
        canonical: the canonical model that it was lowered from, for the Linears' sizes and heads.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """
    found: dict[str, tuple[str, bool]] = {}
    for piece in pieces(model, PIECE):
        inside = {node.name for node in piece.graph}
        ours = [name for name in lowered.nodes.values() if name in inside]
        if not ours:
            continue
        finder = Finder(piece, optimised_graph(piece))
        for name in ours:
            node = finder.find(name)
            if node is not None:
                found[name] = node.op_type, is_integer(node)
    return coverage_of(canonical, lambda name: found.get(lowered.nodes.get(name, ""), ("MatMul", False)))
