"""Activations to int8 by groups of inputs, as the GEMM with weights by group reads them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import (
    Kernel,
    at,
    cast,
    columns,
    f32,
    horizontal,
    i32,
    kernel_named,
    local,
    parallel_rows,
    size,
    spread,
    store,
)
from qcompiler.targets.tvm.isa import Isa
from qcompiler.targets.tvm.kernels.quantize import TINY, Load, pad, smoothed
from qcompiler.targets.tvm.vecmath import round_even


@dataclasses.dataclass(frozen=True)
class QuantizeGroups:
    """(x [m, K], [multiplier [K]], q int8 [m, groups · group_size], x_scale [m, groups], x_sum int32 [m, groups]).

    scale = max|x| / 127 of each group, q = round(x / scale), ties to even; x_sum = Σ q. The padding is 0.

    Attributes:
        in_features: K; the last group may be short.
        group_size: inputs that share a scale.
        smoothed: whether x · multiplier is what is quantized.
    """

    in_features: int
    group_size: int
    smoothed: bool = False

    def build(self, isa: Isa, name: str) -> Any:
        """The PrimFunc."""
        m, count = size("m"), self.in_features
        with kernel_named(name) as kernel:
            buffer = kernel.argument("x", (m, count))
            x = smoothed(buffer, kernel.argument("multiplier", (count,)) if self.smoothed else None)
            results = group_arguments(kernel, m, count, self.group_size)
            parallel_rows(m, lambda row: grouped_row(x, row, results, count, self.group_size, isa))
        return kernel.function


def group_arguments(kernel: Kernel, m: Any, count: int, group_size: int) -> tuple[Any, Any, Any]:
    """q, x_scale and x_sum of m rows of ``count`` inputs."""
    groups = -(-count // group_size)
    return (
        kernel.argument("q", (m, groups * group_size), "int8"),
        kernel.argument("x_scale", (m, groups)),
        kernel.argument("x_sum", (m, groups), "int32"),
    )


def grouped_row(x: Load, row: Any, results: tuple[Any, Any, Any], count: int, group_size: int, isa: Isa) -> None:
    """One row; ``results`` are q, x_scale and x_sum."""
    whole, rest = divmod(count, group_size)
    with T.serial(0, whole) as group:
        _group(x, row, results, group, group * group_size, group_size, isa)
    if rest:
        _group(x, row, results, whole, whole * group_size, rest, isa)
        pad(results[0], row, count, (whole + 1) * group_size, "int8")


def _group(x: Load, row: Any, results: tuple[Any, Any, Any], group: Any, first: Any, count: int, isa: Isa) -> None:
    q, x_scale, x_sum = results
    lanes = isa.lanes
    largest, total = local(lanes), local(lanes, "int32")
    store(largest, [at(0, lanes)], f32(TINY, lanes))
    store(total, [at(0, lanes)], i32(0, lanes))

    def widen(c: Any, w: int) -> None:
        store(largest, [at(0, w)], tirx.max(largest[at(0, w)], tirx.abs(x(row, first + c, w))))

    def write(c: Any, w: int) -> None:
        store(steps, [at(0, w)], cast(round_even(x(row, first + c, w) / spread(x_scale[row, group], w)), "int32"))
        store(total, [at(0, w)], total[at(0, w)] + steps[at(0, w)])
        store(q, [row, at(first + c, w)], cast(steps[at(0, w)], "int8"))

    columns(count, lanes, widen)
    store(x_scale, [row, group], horizontal(largest, lanes, tirx.max) / f32(127.0))
    steps = local(lanes, "int32")
    columns(count, lanes, write)
    store(x_sum, [row, group], horizontal(total, lanes, lambda a, b: a + b))


def reference(
    x: npt.NDArray[np.float32], group_size: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """q, x_scale and x_sum in numpy."""
    m, count = x.shape
    padded = np.zeros((m, -(-count // group_size), group_size), np.float32)
    padded.reshape(m, -1)[:, :count] = x
    scale = np.maximum(np.abs(padded).max(-1), np.float32(TINY)) / np.float32(127)
    q = np.rint(padded / scale[..., None]).astype(np.int8)
    return q.reshape(m, -1), scale, q.sum(-1, dtype=np.int32)
