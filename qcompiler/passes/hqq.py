"""hqq: refit the grid of each group of a weight by half-quadratic quantization, without calibration data."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qcompiler.core import Note, OptionError
from qcompiler.graph.edit import array_of
from qcompiler.graph.weights import grid_of, in_groups, write_grid
from qcompiler.numerics.hqq import HalfQuadratic, hqq_grid
from qcompiler.passes.base import Context, Pass, PassResult, Stats


@dataclasses.dataclass(frozen=True)
class Hqq(Pass):
    """Give weights in groups the scales and zero points of least Σ|w - ŵ|^p; runs after ``insert``, before ``gptq``.

    Attributes:
        p: of the norm, above 0; 0.7 is the authors', 2 the least mean square error.
        beta, kappa: weight of the quadratic step, and its growth by iteration.
        iterations: from the best of some parts of the full range.
    """

    name: ClassVar[str] = "hqq"
    by_weight: ClassVar[bool] = True
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 8

    def __post_init__(self) -> None:
        if not (0 < self.p <= 2 and self.beta > 0 and self.kappa >= 1 and self.iterations >= 1):
            raise OptionError(
                f"hqq{{p={self.p:g},beta={self.beta:g},kappa={self.kappa:g},iterations={self.iterations}}}: p is from "
                "0 to 2, beta above 0, kappa and iterations 1 at least."
            )

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        notes = []
        options = HalfQuadratic(self.p, self.beta, self.kappa, self.iterations)
        for call, readers in in_groups(model).items():
            weight = array_of(readers[0].weight)
            assert weight is not None
            before = grid_of(call)
            after = hqq_grid(weight, before, options)
            write_grid(call, after)
            old, new = (grid.squared_error(weight) for grid in (before, after))
            why = f"squared error {new / old:.2f} of the full range's" if old else "no error"
            notes += [Note(linear.name, "hqq", why) for linear in readers]
        return PassResult(bool(notes), tuple(notes))
