"""The share of integer work in the graph that ONNX Runtime really runs."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qcompiler.graph.heads import output_heads
from qcompiler.graph.linear import linears
from qcompiler.targets.base import Lowered
from qcompiler.targets.ort.optimised import Finder, is_integer, optimised_graph


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Share of the Linears' multiplications (per token) that run in integer kernels.

    Attributes:
        body: of all Linears but output heads; 0 … 1.
        head: of the output heads; None where the model has none.
        kernels: Linear -> the operator that computes it.
    """

    body: float
    head: float | None
    kernels: dict[str, str]


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
    heads = output_heads(canonical)
    kernels: dict[str, str] = {}
    done = {True: [0, 0], False: [0, 0]}  # is a head -> [integer, all]
    for linear in linears(canonical):
        node = finder.find(lowered.nodes[linear.name]) if linear.name in lowered.nodes else None
        kernels[linear.name] = node.op_type if node is not None else "MatMul"
        work = linear.in_features * linear.out_features
        counts = done[linear.name in heads]
        counts[0] += work * (node is not None and is_integer(node))
        counts[1] += work
    body, head = done[False], done[True]
    return Coverage(body[0] / body[1] if body[1] else 0.0, head[0] / head[1] if head[1] else None, kernels)
