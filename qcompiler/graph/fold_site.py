"""What the flow analysis finds: a source of channels, and the Linears that would absorb its scale or shift."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import Note
from qcompiler.graph.shapes import Fact


@dataclasses.dataclass(frozen=True, eq=False)
class Sink:
    """A Linear (or a MatMul with a constant weight of more axes) whose input channels carry a source's labels.

    Attributes:
        linear: name of the MatMul node.
        columns: int32 [in_features]: the source channel of each input feature, -1 where it carries none.
    """

    linear: str
    columns: npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True, eq=False)
class FoldSite:
    """One source and everything that its scale would touch.

    Attributes:
        value: the source's output.
        source: the node that absorbs 1/scale.
        kind: "norm", "mul" or "linear".
        channels: number of source channels.
        sinks: the Linears that absorb scale, in graph order.
        scale_blocked: bool [channels]: where scale must stay 1.
        shift_blocked: bool [channels]: where shift must stay 0.
        blockers: one note for each (node, reason) that blocked any channel.
        weights: names of the initializers that a fold writes, the source's first. Sites with equal ``weights`` call
            the same modules (ALBERT): one scale for all of them keeps the weights shared.
        boundary: what the region between source and sinks reads from outside, by value name: shape, dtype and, where
            they do not depend on data, numbers. ``verify.py`` feeds the region with it.
    """

    value: ir.Value
    source: ir.Node
    kind: str
    channels: int
    sinks: tuple[Sink, ...]
    scale_blocked: npt.NDArray[np.bool_]
    shift_blocked: npt.NDArray[np.bool_]
    blockers: tuple[Note, ...]
    weights: tuple[str, ...]
    boundary: Mapping[str, Fact]

    @property
    def foldable(self) -> bool:
        """Whether any sink carries a channel whose scale is free."""
        return any((~self.scale_blocked[sink.columns[sink.columns >= 0]]).any() for sink in self.sinks)
