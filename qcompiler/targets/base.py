"""What a target is: what it can run, as data, and a lowering."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from qcompiler.capability import Capability, Kernel
from qcompiler.core import Companion, Executable
from qcompiler.scheme import Scheme
from qcompiler.targets.lowered import Coverage, Lowered


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

    def prepare(self, model: ir.Model, scheme: Scheme) -> None:  # noqa: B027 (most targets need nothing here)
        """See the canonical float graph before any pass quantizes or folds.

        A target notes what :meth:`lower` must know of it, and keeps in float what it has no form for.

        Raises:
            TargetError: this model cannot become what the target makes.
        """

    @abc.abstractmethod
    def lower(self, model: ir.Model) -> Lowered:
        """Rewrite the folded canonical graph in place to the target's operators; no function of ours is left.

        A target that makes an executable leaves the graph as it is: it stays the description of what runs.
        """

    @abc.abstractmethod
    def coverage(self, model: ir.Model, lowered: Lowered, canonical: ir.Model) -> Coverage:
        """The share of integer work in what really runs.

        Args:
            model: the lowered model.
            lowered: what :meth:`lower` said of it.
            canonical: the canonical model that it was lowered from.
        """

    def load(self, folder: Path) -> Executable | None:
        """What :meth:`Executable.save` wrote there; None for targets whose model.onnx is what runs.

        Raises:
            ArtefactError: it cannot be read, or does not run on this machine.
        """
        return None

    def companion(self, folder: Path) -> Companion | None:
        """What :meth:`Companion.save` wrote there; None for targets that write model.onnx alone."""
        return None
