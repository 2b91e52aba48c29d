"""Activations to integers 0 … 255, in the type and with the padding of K that the 8-bit GEMM reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import (
    at,
    cast,
    columns,
    f32,
    horizontal,
    i32,
    kernel_named,
    local,
    size,
    spread,
    store,
)
from qcompiler.targets.tvm.isa import Isa
from qcompiler.targets.tvm.kernels.epilogue import STEPS, quantize
from qcompiler.targets.tvm.vecmath import round_even

TINY = 1e-30
"""What FakeQuantPerToken takes for a row of zeros."""


@dataclasses.dataclass(frozen=True)
class Quantize:
    """x [m, K] to integers [m, K rounded up to the dot's group]; the padding is 0.

    Attributes:
        in_features: K.
        granularity: "static": (x, steps, q). "row": (x, q, x_scale [m], x_zero [m]): the least scale whose integers
            1 … 255 about ``zero_point`` hold the row. "tensor": the same arguments of one element each, asymmetric as
            ONNX's DynamicQuantizeLinear.
        smoothed: whether a multiplier float32 [K] follows x: x · multiplier is what is quantized.
        zero_point: of every row, in 2 … 254.
    """

    in_features: int
    granularity: str = "static"
    smoothed: bool = False
    zero_point: int = 128

    def build(self, isa: Isa, name: str) -> Any:
        """The PrimFunc, with the arguments of the granularity."""
        m, count = size("m"), self.in_features
        padded = -(-count // isa.group) * isa.group
        with kernel_named(name) as kernel:
            buffer = kernel.argument("x", (m, count))
            x = smoothed(buffer, kernel.argument("multiplier", (count,)) if self.smoothed else None)
            steps = kernel.argument("steps", STEPS) if self.granularity == "static" else None
            q = kernel.argument("q", (m, padded), isa.activation)
            if steps is None:
                scales = m if self.granularity == "row" else 1
                x_scale = kernel.argument("x_scale", (scales,))
                x_zero = kernel.argument("x_zero", (scales,), "int32")
            if self.granularity == "tensor":
                self._tensor(isa, m, x, q, x_scale, x_zero, padded)
            else:
                with T.parallel(0, m) as row:
                    if steps is not None:
                        static_row(x, row, q, count, padded, steps, isa)
                    else:
                        dynamic_row(x, row, q, count, padded, x_scale, x_zero, self.zero_point, isa)
        return kernel.function

    def _tensor(self, isa: Isa, m: Any, x: Load, q: Any, x_scale: Any, x_zero: Any, padded: int) -> None:
        """The range, widened to hold 0, in 255 steps; a tensor of zeros has scale 1 and gives zeros."""
        count = self.in_features
        low, high = _range(x, m, count, isa)
        spanned = high[0] - low[0]
        store(x_scale, [0], tirx.Select(spanned > f32(0.0), spanned / f32(255.0), f32(1.0)))
        zero = round_even(tirx.min(tirx.max(f32(0.0) - low[0] / x_scale[0], f32(0.0)), f32(255.0)))
        store(x_zero, [0], cast(zero, "int32"))
        with T.parallel(0, m) as row:

            def body(c: Any, w: int) -> None:
                value = round_even(x(row, c, w) / spread(x_scale[0], w)) + spread(cast(x_zero[0], "float32"), w)
                inside = tirx.min(tirx.max(value, f32(0.0, w)), f32(255.0, w))
                store(q, [row, at(c, w)], cast(cast(inside, "int32"), isa.activation))

            columns(count, isa.lanes, body)
            pad(q, row, count, padded, isa.activation)


Load = Callable[[Any, Any, int], Any]
"""One vector of an activation: (row, first column, lanes)."""


def smoothed(x: Any, multiplier: Any) -> Load:
    """Loads of x, multiplied by a vector along the last axis where there is one."""
    if multiplier is None:
        return lambda row, c, w: x[row, at(c, w)]
    return lambda row, c, w: x[row, at(c, w)] * multiplier[at(c, w)]


def _range(x: Load, m: Any, count: int, isa: Isa) -> tuple[Any, Any]:
    """Local buffers whose first element is min(x, 0) and max(x, 0)."""
    low, high = local(isa.lanes), local(isa.lanes)
    for buffer in (low, high):
        store(buffer, [at(0, isa.lanes)], f32(0.0, isa.lanes))

    with T.serial(0, m) as row:

        def body(c: Any, w: int) -> None:
            for buffer, combine in ((low, tirx.min), (high, tirx.max)):
                store(buffer, [at(0, w)], combine(buffer[at(0, w)], x(row, c, w)))

        columns(count, isa.lanes, body)
    for buffer, combine in ((low, tirx.min), (high, tirx.max)):
        store(buffer, [0], horizontal(buffer, isa.lanes, combine))
    return low, high


def row_scale(x: Load, row: Any, count: int, zero_point: int, isa: Isa) -> Any:
    """max(highest / (255 - zero_point), lowest / (1 - zero_point))."""
    low, high = local(isa.lanes), local(isa.lanes)
    for buffer in (low, high):
        store(buffer, [at(0, isa.lanes)], f32(0.0, isa.lanes))

    def body(c: Any, w: int) -> None:
        for buffer, combine in ((low, tirx.min), (high, tirx.max)):
            store(buffer, [at(0, w)], combine(buffer[at(0, w)], x(row, c, w)))

    columns(count, isa.lanes, body)
    above = horizontal(high, isa.lanes, tirx.max) / f32(255 - zero_point)
    below = horizontal(low, isa.lanes, tirx.min) / f32(1 - zero_point)
    return tirx.max(tirx.max(above, below), f32(TINY))


def static_row(x: Load, row: Any, q: Any, count: int, padded: int, steps: Any, isa: Isa) -> None:
    """One row by a static scale and zero point."""

    def body(c: Any, w: int) -> None:
        store(q, [row, at(c, w)], quantize(x(row, c, w), steps, isa.activation))

    columns(count, isa.lanes, body)
    pad(q, row, count, padded, isa.activation)


def dynamic_row(
    x: Load, row: Any, q: Any, count: int, padded: int, x_scale: Any, x_zero: Any, zero_point: int, isa: Isa
) -> None:
    """One row by its own scale: round(x · (1 / scale)) + zero_point."""
    store(x_scale, [row], row_scale(x, row, count, zero_point, isa))
    store(x_zero, [row], i32(zero_point))
    inverse = local(1)
    store(inverse, [0], f32(1.0) / x_scale[row])

    def body(c: Any, w: int) -> None:
        steps = round_even(x(row, c, w) * spread(inverse[0], w)) + f32(zero_point, w)
        store(q, [row, at(c, w)], cast(cast(steps, "int32"), isa.activation))

    columns(count, isa.lanes, body)
    pad(q, row, count, padded, isa.activation)


def pad(q: Any, row: Any, count: int, padded: int, dtype: str) -> None:
    """Zeros behind a row."""
    for column in range(count, padded):
        store(q, [row, column], tirx.const(0, dtype))
