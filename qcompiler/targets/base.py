"""What a target is: what it can run, as data, and a lowering."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir

from qcompiler.core import Capability, Kernel, Note


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


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What a lowering did.

    Attributes:
        nodes: name of each quantized Linear -> name of the lowered node that computes it (several may share one).
        notes: decisions: which kernel, which fusion, and what stayed as it was, with the reason.
    """

    nodes: Mapping[str, str]
    notes: tuple[Note, ...] = ()


class Target(abc.ABC):
    """A place where compiled models run. Subclasses are frozen dataclasses; their fields are the target's options."""

    name: ClassVar[str]

    @abc.abstractmethod
    def capability(self) -> Capability:
        """What this target can run on this machine."""

    def tables(self) -> Mapping[str, str]:
        """Digests of the data that decides what :meth:`lower` makes, by name: part of the recipe."""
        return {}

    @abc.abstractmethod
    def lower(self, model: ir.Model) -> Lowered:
        """Rewrite the folded canonical graph in place to the target's operators; no function of ours is left."""
