"""clip_weights: search the range of each group of a weight, by the error that it makes at the Linear's output."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.core import Note, OptionError, StatRequest
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import Linear
from qcompiler.graph.weights import grid_of, in_groups, write_grid
from qcompiler.numerics.group_clip import clipped_grid
from qcompiler.passes.base import Context, Pass, PassResult, Stats


@dataclasses.dataclass(frozen=True)
class ClipWeights(Pass):
    """Give weights in groups the scales of least weighted squared error; runs after ``insert`` and before ``gptq``.

    Attributes:
        shortest: of the ranges tried, as a part of the full one; None: 0.7 for groups of up to 256 inputs, else 0.5:
            the largest of many weights is further out.
    """

    name: ClassVar[str] = "clip_weights"
    shortest: float | None = None

    def __post_init__(self) -> None:
        if self.shortest is not None and not 0 < self.shortest <= 1:
            raise OptionError(f"clip_weights{{shortest={self.shortest}}}: a part of the full range is wanted, 0 to 1.")

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        return [_request(linear) for readers in in_groups(model).values() for linear in readers]

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        notes = []
        for call, readers in in_groups(model).items():
            weight = array_of(readers[0].weight)
            assert weight is not None
            importance = np.mean([stats[_request(linear)] for linear in readers], axis=0)
            before = grid_of(call)
            after = clipped_grid(weight, before, importance, self.shortest)
            old, new = (
                float((np.square(weight - grid.rounded(weight)) * importance[:, None]).sum())
                for grid in (before, after)
            )
            write_grid(call, after)
            why = f"weighted squared error {new / old:.2f} of the full range's" if old else "no error"
            notes += [Note(linear.name, "clipped by group", why) for linear in readers]
        return PassResult(bool(notes), tuple(notes))


def _request(linear: Linear) -> StatRequest:
    """How much each input counts; of all rows, for a few tokens may carry most of it and a sample miss them."""
    return StatRequest(linear.x.name or "", "meansquare", -1)
