"""What a target is: what it can run, as data, and a lowering."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from qcompiler.capability import Capability, Kernel
from qcompiler.core import Executable, Note
from qcompiler.graph.heads import output_heads
from qcompiler.graph.linear import linears


def block_kernels(
    name: str,
    activation: tuple[str, str, bool],
    group_sizes: Mapping[int, Sequence[int]],
    speed: float | None = None,
) -> list[Kernel]:
    """Kernels of weights by group or by output channel, for one kind of activation; ``group_sizes`` by bits."""
    return [
        Kernel(name, f"{sign}int{bits}", granularity, *activation, speed, tuple(sizes))
        for bits, sizes in group_sizes.items()
        for sign in ("", "u")
        for granularity in ("per_group", "per_channel")
    ]


def table_kernels(name: str, block_sizes: Sequence[int], speed: float | None = None) -> list[Kernel]:
    """Kernels of weights by table in blocks, for float activations."""
    return [Kernel(name, table, "per_group", "float", "", False, speed, tuple(block_sizes)) for table in ("nf4", "fp4")]


def storage_kernels(speed: float | None = None) -> list[Kernel]:
    """MatMul in float32 of weights that are stored in 16 bits."""
    stored = {"int16": "per_channel", "float16": "per_tensor", "bfloat16": "per_tensor"}
    return [Kernel("MatMul", dtype, scales, "float", "", False, speed) for dtype, scales in stored.items()]


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
    """

    nodes: Mapping[str, str]
    notes: tuple[Note, ...] = ()
    executable: Executable | None = None
    runs: bool = True

    @property
    def runnable(self) -> Executable | None:
        """The executable, where this machine runs it; None: measure on the graph."""
        return self.executable if self.runs else None


class Target(abc.ABC):
    """A place where compiled models run. Subclasses are frozen dataclasses; their fields are the target's options.

    ``runs_graph`` says that the lowered graph is what runs, and all that is saved.
    """

    name: ClassVar[str]
    runs_graph: ClassVar[bool] = True

    @abc.abstractmethod
    def capability(self) -> Capability:
        """What this target can run on this machine."""

    def tables(self) -> Mapping[str, str]:
        """Digests of the data that decides what :meth:`lower` makes, by name: part of the recipe."""
        return {}

    @abc.abstractmethod
    def lower(self, model: ir.Model) -> Lowered:
        """Rewrite the folded canonical graph in place to the target's operators; no function of ours is left.

        A target that makes an executable leaves the graph as it is: it stays the description of what runs.
        """

    def coverage(self, model: ir.Model, lowered: Lowered, canonical: ir.Model) -> Coverage:
        """The share of integer work in what really runs; by default in the graph that ONNX Runtime makes of it.

        Args:
            model: the lowered model.
            lowered: what :meth:`lower` said of it.
            canonical: the canonical model that it was lowered from.
        """
        from qcompiler.targets.ort.readback import integer_coverage

        return integer_coverage(model, lowered, canonical)

    def load(self, folder: Path) -> Executable | None:
        """What :meth:`Executable.save` wrote there; None for targets whose model.onnx is what runs.

        Raises:
            ArtefactError: it cannot be read, or does not run on this machine.
        """
        return None
