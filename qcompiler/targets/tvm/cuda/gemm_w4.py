"""y = x · dequantize(W) + bias in float16 with 4-bit weights by group: unpacked on the way to shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import cast, f32, kernel_named, size, store
from qcompiler.targets.tvm.cuda.tiles import (
    COLUMNS,
    DEPTH,
    EACH,
    ROWS,
    THREADS,
    Load,
    Multiply,
    Write,
    cleared,
    shared,
    tiled,
    up,
)

NIBBLES = 8
"""Weights of one 32-bit word."""


@dataclasses.dataclass(frozen=True)
class Weight4:
    """One shape of Linear.

    Attributes:
        in_features, out_features: K and N.
        group_size: neighbouring values of K that share a scale and a zero point; a multiple of 8.
        bias: whether there is one.
    """

    in_features: int
    out_features: int
    group_size: int
    bias: bool = False

    @property
    def padded(self) -> tuple[int, int]:
        """K and N of the packed weight; the padding has scale 0."""
        return up(up(self.in_features, DEPTH), self.group_size), up(self.out_features, COLUMNS)

    def pack(self, q: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
        """Integers 0 … 15 [K, N] to words [padded N, padded K / 8], the first of K lowest."""
        k, n = self.padded
        whole = np.zeros((n, k), np.uint32)
        whole[: self.out_features, : self.in_features] = q.T
        shifts = np.arange(NIBBLES, dtype=np.uint32) * 4
        return np.bitwise_or.reduce(whole.reshape(n, -1, NIBBLES) << shifts, axis=2)

    def pack_groups(self, numbers: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
        """Scales or zero points [⌈K / group⌉, N] to float16 [padded N, padded K / group]."""
        k, n = self.padded
        whole = np.zeros((n, k // self.group_size), np.float16)
        whole[: self.out_features, : numbers.shape[0]] = numbers.T
        return whole

    def build(self, name: str) -> Any:
        """The PrimFunc: (x float16 [m, K], weight, scale, zero, [bias float32 [padded N]], y float16 [m, N])."""
        m, (k, n), groups = size("m"), self.padded, self.padded[0] // self.group_size
        with kernel_named(name) as kernel:
            x = kernel.argument("x", (m, self.in_features), "float16")
            weight = kernel.argument("weight", (n, k // NIBBLES), "uint32")
            scale, zero = (kernel.argument(label, (n, groups), "float16") for label in ("scale", "zero"))
            bias = kernel.argument("bias", (n,)) if self.bias else None
            y = kernel.argument("y", (m, self.out_features), "float16")

            def begin() -> tuple[Load, Multiply, Write]:
                xs, ws = shared(ROWS, DEPTH, "float16"), shared(COLUMNS, DEPTH, "float16")
                sums = cleared(f32(0.0))

                def load(row: Any, column: Any, step: Any, thread: Any) -> None:
                    with T.serial(0, ROWS * DEPTH // THREADS) as part:
                        place = thread + part * THREADS
                        r, d = place // DEPTH, place % DEPTH
                        inside = tirx.all(row + r < m, step * DEPTH + d < self.in_features)
                        value = tirx.if_then_else(inside, x[row + r, step * DEPTH + d], tirx.const(0.0, "float16"))
                        store(xs, [r, d], value)
                    words = DEPTH // NIBBLES  # 64 columns of them: one for each thread
                    c, word = thread // words, thread % words
                    first = step * DEPTH + word * NIBBLES
                    group = first // self.group_size
                    for nibble in range(NIBBLES):
                        packed = weight[column + c, step * words + word]
                        q = cast((packed >> tirx.const(4 * nibble, "uint32")) & tirx.const(15, "uint32"), "float16")
                        store(
                            ws, [c, word * NIBBLES + nibble], (q - zero[column + c, group]) * scale[column + c, group]
                        )

                def multiply(row: Any, column: Any) -> None:
                    with T.serial(0, DEPTH) as d:
                        for i in range(EACH):
                            for j in range(EACH):
                                product = cast(xs[row + i, d], "float32") * cast(ws[column + j, d], "float32")
                                store(sums, [i * EACH + j], sums[i * EACH + j] + product)

                def write(row: Any, column: Any, i: int, j: int) -> None:
                    value = sums[i * EACH + j] if bias is None else sums[i * EACH + j] + bias[column]
                    with T.If(column < self.out_features), T.Then():
                        store(y, [row, column], cast(value, "float16"))

                return load, multiply, write

            tiled(m, n, k, begin)
        return kernel.function
