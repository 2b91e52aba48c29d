"""Softmax along the last axis."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import at, columns, f32, horizontal, kernel_named, local, size, spread, store
from qcompiler.targets.tvm.isa import Isa
from qcompiler.targets.tvm.vecmath import exp


@dataclasses.dataclass(frozen=True)
class Softmax:
    """(x [m, n], y [m, n]): e^(x - max) / Σ e^(x - max); NaN where a row is -inf throughout, as ONNX has it."""

    def build(self, isa: Isa, name: str) -> Any:
        """The PrimFunc."""
        m, n, lanes = size("m"), size("n"), isa.lanes
        with kernel_named(name) as kernel:
            x, y = kernel.argument("x", (m, n)), kernel.argument("y", (m, n))
            with T.parallel(0, m) as row:
                largest, total, numbers = local(lanes), local(lanes), local(2)
                store(largest, [at(0, lanes)], f32(float("-inf"), lanes))
                store(total, [at(0, lanes)], f32(0.0, lanes))
                columns(
                    n,
                    lanes,
                    lambda c, w: store(largest, [at(0, w)], tirx.max(largest[at(0, w)], x[row, at(c, w)])),
                )
                store(numbers, [0], horizontal(largest, lanes, tirx.max))

                def exponential(c: Any, w: int) -> None:
                    store(y, [row, at(c, w)], exp(x[row, at(c, w)] - spread(numbers[0], w)))
                    store(total, [at(0, w)], total[at(0, w)] + y[row, at(c, w)])

                columns(n, lanes, exponential)
                store(numbers, [1], f32(1.0) / horizontal(total, lanes, lambda a, b: a + b))
                columns(n, lanes, lambda c, w: store(y, [row, at(c, w)], y[row, at(c, w)] * spread(numbers[1], w)))
        return kernel.function
