"""Channel labels, and one node's step of their way through the graph."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.shapes import Fact, Facts

Labels = npt.NDArray[np.int32]

NONE = np.int32(-1)


@dataclasses.dataclass
class Step:
    """One node met by labels: what comes in, and what had to be blocked.

    Attributes:
        labels: one array an input, None where the input carries none.
        blocked: (labels, why) pairs for which neither scale nor shift may pass.
        shift_blocked: the same for the shift alone.
    """

    node: ir.Node
    labels: list[Labels | None]
    facts: Facts
    blocked: list[tuple[Labels, str]] = dataclasses.field(default_factory=list)
    shift_blocked: list[tuple[Labels, str]] = dataclasses.field(default_factory=list)

    def block_all(self, why: str) -> list[Labels | None]:
        """Block every label that reaches this node; nothing travels on."""
        self.blocked.extend((labels, why) for labels in self.labels if labels is not None)
        return [None] * len(self.node.outputs)

    def block_shift(self, why: str) -> None:
        """The scale passes, the shift of every label here does not."""
        self.shift_blocked.extend((labels, why) for labels in self.labels if labels is not None)

    def fact(self, index: int) -> Fact | None:
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return self.facts.get(value.name or "") if value is not None else None

    def numbers(self, index: int) -> npt.NDArray[np.generic] | None:
        fact = self.fact(index)
        return fact.numbers if fact is not None else None

    def shape(self, output: int = 0) -> tuple[int, ...]:
        return self.facts[self.node.outputs[output].name or ""].shape

    def attribute(self, name: str, default: int) -> int:
        return self.node.attributes[name].as_int() if name in self.node.attributes else default


def constant_along(labels: Labels, axis: int) -> bool:
    """Whether the labels are the same at every position of that axis."""
    first = np.take(labels, [0], axis=axis)
    return bool((labels == first).all())


def data_labels(step: Step) -> Labels | None:
    """The labels of input 0 where no other input carries any; else None, and all is blocked."""
    if step.labels[0] is None or any(labels is not None for labels in step.labels[1:]):
        step.block_all(f"{step.node.op_type} reads it as something else than data")
        return None
    return step.labels[0]
