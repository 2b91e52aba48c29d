"""The share of integer work in the graph that ONNX Runtime really runs."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.targets.base import Coverage, Lowered, coverage_of
from qcompiler.targets.ort.optimised import Finder, is_integer, optimised_graph


def integer_coverage(model: ir.Model, lowered: Lowered, canonical: ir.Model) -> Coverage:
    """Count what runs in integers after ONNX Runtime's own optimizer (all levels, CPU).

    Args:
        model: the lowered model.
        lowered: what the lowering said of it.
        canonical: the canonical model that it was lowered from, for the Linears' sizes and heads.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """
    finder = Finder(model, optimised_graph(model))

    def kernel(name: str) -> tuple[str, bool]:
        node = finder.find(lowered.nodes[name]) if name in lowered.nodes else None
        return ("MatMul", False) if node is None else (node.op_type, is_integer(node))

    return coverage_of(canonical, kernel)
