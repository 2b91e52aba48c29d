"""Activations on their own: f(x), or f(x) · gate."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import at, columns, kernel_named, size, store
from qcompiler.targets.tvm.isa import Isa
from qcompiler.targets.tvm.vecmath import ACTIVATIONS

CHUNK = 4096
"""Elements of one task."""


@dataclasses.dataclass(frozen=True)
class Pointwise:
    """(x [n], [gate [n]], y [n]): an activation of :data:`qcompiler.targets.tvm.vecmath.ACTIVATIONS`."""

    activation: str
    gated: bool = False

    def build(self, isa: Isa, name: str) -> Any:
        """The PrimFunc."""
        n = size("n")
        with kernel_named(name) as kernel:
            x = kernel.argument("x", (n,))
            gate = kernel.argument("gate", (n,)) if self.gated else None
            y = kernel.argument("y", (n,))
            with T.parallel(0, (n + CHUNK - 1) // CHUNK) as task:
                first = task * CHUNK

                def body(c: Any, w: int) -> None:
                    value = ACTIVATIONS[self.activation](x[at(first + c, w)])
                    store(y, [at(first + c, w)], value * gate[at(first + c, w)] if gate is not None else value)

                columns(tirx.min(tirx.IntImm("int64", CHUNK), n - first), isa.lanes, body)
        return kernel.function
