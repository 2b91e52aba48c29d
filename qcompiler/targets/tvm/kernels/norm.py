"""LayerNormalization and RMSNorm along the last axis, with the quantization of what the next Linears read."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import (
    at,
    columns,
    f32,
    horizontal,
    kernel_named,
    local,
    parallel_rows,
    size,
    spread,
    store,
    zeros,
)
from qcompiler.targets.tvm.isa import Isa
from qcompiler.targets.tvm.kernels.epilogue import STEPS
from qcompiler.targets.tvm.kernels.quantize import dynamic_row, smoothed, static_row
from qcompiler.targets.tvm.kernels.quantize_groups import group_arguments, grouped_row

CHAINS = 4
"""Sums of a row that are made side by side."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """y = (x - mean) / sqrt(var + epsilon) · weight + bias, or without the mean (RMSNorm).

    Attributes:
        features: length of the last axis.
        epsilon: under the root.
        centred: False is RMSNorm.
        bias: whether there is one.
        smoothed: whether the normalized value is multiplied by a vector [features] before it is quantized; y is not.
        zero_point: of rows that are quantized by their own scales.
        quantized: "": (x, weight, [bias], y). "static": (x, weight, [bias], [multiplier], steps, y, q). "row": (x,
            weight, [bias], [multiplier], y, q, x_scale, x_zero), as
            :class:`qcompiler.targets.tvm.kernels.quantize.Quantize` gives them. "group": (x, weight, [bias],
            [multiplier], y, q, x_scale, x_sum), as
            :class:`qcompiler.targets.tvm.kernels.quantize_groups.QuantizeGroups` gives them.
        group_size: where quantized is "group".
    """

    features: int
    epsilon: float
    centred: bool = True
    bias: bool = False
    quantized: str = ""
    smoothed: bool = False
    zero_point: int = 128
    group_size: int = 0

    def build(self, isa: Isa, name: str) -> Any:
        """The PrimFunc; x and y are [m, features]."""
        m, count = size("m"), self.features
        padded = -(-count // isa.group) * isa.group
        with kernel_named(name) as kernel:
            x = kernel.argument("x", (m, count))
            weight = kernel.argument("weight", (count,))
            bias = kernel.argument("bias", (count,)) if self.bias else None
            multiplier = kernel.argument("multiplier", (count,)) if self.smoothed else None
            steps = kernel.argument("steps", STEPS) if self.quantized == "static" else None
            y = kernel.argument("y", (m, count))
            if self.quantized == "group":
                grouped = group_arguments(kernel, m, count, self.group_size)
            elif self.quantized:
                q = kernel.argument("q", (m, padded), isa.activation)
            if self.quantized == "row":
                x_scale = kernel.argument("x_scale", (m,))
                x_zero = kernel.argument("x_zero", (m,), "int32")

            def whole(row: Any) -> None:
                self._row(isa, row, x, weight, bias, y)
                if self.quantized == "static":
                    static_row(smoothed(y, multiplier), row, q, count, padded, steps, isa)
                elif self.quantized == "row":
                    dynamic_row(smoothed(y, multiplier), row, q, count, padded, x_scale, x_zero, self.zero_point, isa)
                elif self.quantized == "group":
                    grouped_row(smoothed(y, multiplier), row, grouped, count, self.group_size, isa)

            parallel_rows(m, whole)
        return kernel.function

    def _row(self, isa: Isa, row: Any, x: Any, weight: Any, bias: Any, y: Any) -> None:
        """Two passes for the mean and the variance: one pass would cancel where the mean is large."""
        count, numbers = self.features, local(2)
        store(numbers, [0], f32(0.0))
        if self.centred:
            store(numbers, [0], self._sum(isa, lambda c, w: x[row, at(c, w)]) / f32(count))
        square = self._sum(isa, lambda c, w: _squared(x[row, at(c, w)] - spread(numbers[0], w)))
        store(numbers, [1], f32(1.0) / T.sqrt(square / f32(count) + f32(self.epsilon)))

        def body(c: Any, w: int) -> None:
            value = (x[row, at(c, w)] - spread(numbers[0], w)) * spread(numbers[1], w) * weight[at(c, w)]
            store(y, [row, at(c, w)], value + bias[at(c, w)] if bias is not None else value)

        columns(count, isa.lanes, body)

    def _sum(self, isa: Isa, term: Any) -> Any:
        """In four chains: an addition waits for the one before it."""
        lanes = isa.lanes
        sums = zeros(CHAINS, lanes)

        def add(chain: int, c: Any, w: int) -> None:
            here = at(chain * lanes, w)
            store(sums, [here], sums[here] + term(c, w))

        whole = self.features // (CHAINS * lanes)
        with T.serial(0, whole) as step:
            for chain in range(CHAINS):
                add(chain, (step * CHAINS + chain) * lanes, lanes)
        done = whole * CHAINS * lanes
        columns(self.features - done, lanes, lambda c, w: add(0, done + c, w))
        return horizontal(sums, CHAINS * lanes, lambda a, b: a + b)


def _squared(x: Any) -> Any:
    return x * x
