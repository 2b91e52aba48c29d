"""What a lowering did: which node computes which Linear, what runs, and how much of it in integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import onnx_ir as ir

from qcompiler.core import Companion, Executable, Note
from qcompiler.graph.heads import output_heads
from qcompiler.graph.linear import linears


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


def coverage_of(canonical: ir.Model, kernel: Callable[[str], tuple[str, bool]]) -> Coverage:
    """Count; ``kernel`` gives for the name of a Linear what computes it, and whether that multiplies in integers."""
    heads = output_heads(canonical)
    kernels: dict[str, str] = {}
    done = {True: [0, 0], False: [0, 0]}  # is a head -> [integer, all]
    for linear in linears(canonical):
        kernels[linear.name], integer = kernel(linear.name)
        work = linear.in_features * linear.out_features
        counts = done[linear.name in heads]
        counts[0] += work * integer
        counts[1] += work
    body, head = done[False], done[True]
    return Coverage(body[0] / body[1] if body[1] else 0.0, head[0] / head[1] if head[1] else None, kernels)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What a lowering did.

    Attributes:
        nodes: name of each quantized Linear -> name of the lowered node that computes it (several may share one).
        notes: decisions: which kernel, which fusion, and what stayed as it was, with the reason.
        executable: what runs; None: the lowered graph does, in ONNX Runtime.
        runs: whether the executable runs on this machine; errors are measured on the graph where it does not.
        companion: what else to save; None: nothing.
    """

    nodes: Mapping[str, str]
    notes: tuple[Note, ...] = ()
    executable: Executable | None = None
    runs: bool = True
    companion: Companion | None = None

    @property
    def runnable(self) -> Executable | None:
        """The executable, where this machine runs it; None: measure on the graph."""
        return self.executable if self.runs else None
