"""y = s_x · s_w[n] · Σ (x[m, k] - z_x) · W[k, n] + bias[n] on a GPU: s8 x s8 by dp4a, four products an instruction."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import at, cast, kernel_named, size, store
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

WORDS = DEPTH // 4


@dataclasses.dataclass(frozen=True)
class Int8:
    """One shape of Linear.

    Attributes:
        in_features, out_features: K and N.
        scales: "static", "tensor" or "row", as :class:`qcompiler.targets.tvm.kernels.gemm_int8.GemmInt8` has it.
        bias: whether there is one.
    """

    in_features: int
    out_features: int
    scales: str = "static"
    bias: bool = False

    @property
    def padded(self) -> tuple[int, int]:
        """K and N of the stored integers; the padding is 0."""
        return up(self.in_features, DEPTH), up(self.out_features, COLUMNS)

    def pack(self, weight: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
        """[K, N] to [padded N, padded K]."""
        k, n = self.padded
        whole = np.zeros((n, k), np.int8)
        whole[: self.out_features, : self.in_features] = weight.T
        return whole

    def build(self, name: str) -> Any:
        """The PrimFunc: (x, weight, offset, scale, [x_scale, x_zero], [bias], y).

        x int8 [m, padded K] is q - 128 of q in 0 … 255; offset int32 and scale, bias float32 [padded N]; x_scale
        float32 and x_zero int32 [m] or [1], the zero point less 128; y float32 [m, N]. With static scales
        offset = (z_x - 128) · Σ_k W and scale = s_x · s_w; otherwise offset = Σ_k W and scale = s_w.
        """
        m, (k, n) = size("m"), self.padded
        with kernel_named(name) as kernel:
            x, weight = kernel.argument("x", (m, k), "int8"), kernel.argument("weight", (n, k), "int8")
            offset, scale = kernel.argument("offset", (n,), "int32"), kernel.argument("scale", (n,))
            count = m if self.scales == "row" else 1
            if self.scales != "static":
                x_scale, x_zero = kernel.argument("x_scale", (count,)), kernel.argument("x_zero", (count,), "int32")
            bias = kernel.argument("bias", (n,)) if self.bias else None
            y = kernel.argument("y", (m, self.out_features))

            def begin() -> tuple[Load, Multiply, Write]:
                xs, ws = shared(ROWS, WORDS, "int32"), shared(COLUMNS, WORDS, "int32")
                zero = tirx.const(0, "int32")
                sums = cleared(zero)

                def load(row: Any, column: Any, step: Any, thread: Any) -> None:
                    with T.serial(0, ROWS * WORDS // THREADS) as part:
                        place = thread + part * THREADS
                        r, word = place // WORDS, place % WORDS
                        here = at(step * DEPTH + word * 4, 4)
                        values = T.reinterpret(x[row + r, here], dtype="int32")
                        store(xs, [r, word], tirx.if_then_else(row + r < m, values, zero))
                        store(ws, [r, word], T.reinterpret(weight[column + r, here], dtype="int32"))

                def multiply(row: Any, column: Any) -> None:
                    for word in range(WORDS):
                        for i in range(EACH):
                            for j in range(EACH):
                                number = i * EACH + j
                                operands = (xs[row + i, word], ws[column + j, word], sums[number])
                                store(sums, [number], T.call_pure_extern("int32", "__dp4a", *operands))

                def write(row: Any, column: Any, i: int, j: int) -> None:
                    shift, factor = offset[column], scale[column]
                    if self.scales != "static":
                        which = row if self.scales == "row" else 0
                        shift, factor = shift * x_zero[which], factor * x_scale[which]
                    value = cast(sums[i * EACH + j] - shift, "float32") * factor
                    with T.If(column < self.out_features), T.Then():
                        store(y, [row, column], value if bias is None else value + bias[column])

                return load, multiply, write

            tiled(m, n, k, begin)
        return kernel.function
