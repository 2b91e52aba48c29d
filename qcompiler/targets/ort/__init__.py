"""Target ``ort-cpu``: ONNX Runtime's CPU provider, its integer products and its fast float operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir

from qcompiler.capability import Capability
from qcompiler.graph.edit import remove_dead
from qcompiler.graph.functions import OPSET, inline_functions
from qcompiler.graph.shapes import concrete_shapes
from qcompiler.targets.base import Target
from qcompiler.targets.lowered import Coverage, Lowered
from qcompiler.targets.ort.attention import lower_attention
from qcompiler.targets.ort.bnb4 import lower_codebooks
from qcompiler.targets.ort.capability import capability
from qcompiler.targets.ort.costs import load_costs
from qcompiler.targets.ort.embeddings import lower_embeddings
from qcompiler.targets.ort.linears import lower_linears
from qcompiler.targets.ort.nbits import lower_blocks
from qcompiler.targets.ort.norms import keep_additions_apart, lower_rms_norms
from qcompiler.targets.ort.qmoe import lower_experts
from qcompiler.targets.ort.readback import integer_coverage
from qcompiler.targets.ort.storage import lower_storage

LOWERED_OPSET = 23
"""Attention, RMSNormalization and RotaryEmbedding came with opset 23; what else changed since 21 added dtypes only."""


@dataclasses.dataclass(frozen=True)
class OrtCpu(Target):
    """ONNX Runtime on CPU.

    Attributes:
        rows: tokens in one run that the kernels are chosen for: batch x sequence; 1 for generating token by token.
        vnni: False makes weights that are safe on x86 machines without VNNI, True uses all 8 bits; None: as the
            compiling machine is.
    """

    name: ClassVar[str] = "ort-cpu"
    rows: int = 1024
    vnni: bool | None = None

    def capability(self) -> Capability:
        return capability(self.rows, self.vnni)

    def tables(self) -> Mapping[str, str]:
        return {"costs": load_costs().sha256}

    def lower(self, model: ir.Model) -> Lowered:
        """Attention and norms to one operator each, Linears to integer products; what else is ours is inlined.

        Shapes are asked of the canonical graph, so attention comes first: shape inference knows no integer product.
        """
        costs = load_costs()
        facts = concrete_shapes(model)
        notes = [*lower_attention(model, facts), *lower_rms_norms(model, facts)]
        experts, expert_notes = lower_experts(model)
        blocks, block_notes = lower_blocks(model)
        tables, table_notes = lower_codebooks(model)
        notes += [*lower_embeddings(model), *lower_storage(model)]
        nodes, linear_notes = lower_linears(
            model, lambda granularity, k, n: costs.fastest(granularity, self.rows, k, n)
        )
        nodes = {**experts, **blocks, **tables, **nodes}
        notes += [*expert_notes, *block_notes, *table_notes, *linear_notes]
        remove_dead(model)
        inline_functions(model)
        notes += keep_additions_apart(model)
        if model.graph.opset_imports.get("") == OPSET:
            model.graph.opset_imports[""] = LOWERED_OPSET
            model.ir_version = max(model.ir_version, 11)
        return Lowered(nodes, tuple(notes))

    def coverage(self, model: ir.Model, lowered: Lowered, canonical: ir.Model) -> Coverage:
        """Of the graph that ONNX Runtime makes of it."""
        return integer_coverage(model, lowered, canonical)
