"""y = epilogue(s_x · s_w[n] · Σ (x[m, k] - z_x) · W[k, n]): 8-bit GEMM with packed weights, any number of rows.

The weight is packed once to panels [⌈N/lanes⌉][⌈K/group⌉][lanes][group], so that one vector load holds what one dot
takes. A tile of accumulators runs through K in registers. Threads share panels of columns times blocks of rows:
a block of rows stays in the second-level cache for all panels, a panel in the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import at, cast, kernel_named, row_tiles, size, spread, store, zeros
from qcompiler.targets.tvm.isa import Isa
from qcompiler.targets.tvm.kernels.epilogue import PLAIN, Epilogue, Finisher

BLOCK = 96
"""Rows of one block: a multiple of every tile; 96 x 3072 bytes fit in a second-level cache."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is cut.

    Attributes:
        rows, vectors: of one tile of accumulators, which with its weights must fit in the vector registers.
        block: rows that pass one panel of columns before the next.
    """

    rows: int
    vectors: int
    block: int


def default_tiling(out_features: int, isa: Isa) -> Tiling:
    """Without a measurement: four neighbouring lines of the output are written at a time where registers allow it."""
    wanted = -(-out_features // isa.lanes)
    if isa.dot != "vnni" or isa.registers < 32:
        return Tiling(*isa.tile, BLOCK)
    return Tiling(4, 4, 256) if wanted > 3 else Tiling(8, wanted, 256)


@dataclasses.dataclass(frozen=True)
class GemmInt8:
    """One shape of Linear.

    Attributes:
        in_features, out_features: K and N.
        scales: "static": the activation's scale and zero point are in the column scale and offset. "tensor" and "row":
            they are arguments, of one element or one for each row.
        epilogue: what follows.
        tiling: None: :func:`default_tiling`.
    """

    in_features: int
    out_features: int
    scales: str = "static"
    epilogue: Epilogue = PLAIN
    tiling: Tiling | None = None

    def tiles(self, isa: Isa) -> Tiling:
        """How it is cut."""
        return self.tiling or default_tiling(self.out_features, isa)

    def padded(self, isa: Isa) -> tuple[int, int]:
        """K and N with the padding that packed weights and stored activations have."""
        return _up(self.in_features, isa.group), _up(self.out_features, isa.lanes * self.tiles(isa).vectors)

    def pack(self, weight: npt.NDArray[np.int8], isa: Isa) -> npt.NDArray[np.int8]:
        """[K, N] to panels [padded N / lanes, padded K / group, lanes · group]; the padding is zero."""
        rows, width = self.padded(isa)
        whole = np.zeros((rows, width), np.int8)
        whole[: self.in_features, : self.out_features] = weight
        panels = whole.reshape(rows // isa.group, isa.group, width // isa.lanes, isa.lanes).transpose(2, 0, 3, 1)
        return np.ascontiguousarray(panels).reshape(width // isa.lanes, rows // isa.group, isa.lanes * isa.group)

    def pad(self, vector: npt.NDArray[Any], isa: Isa) -> npt.NDArray[Any]:
        """[N] to [padded N]."""
        return pad(vector, self.padded(isa)[1])

    def build(self, isa: Isa, name: str) -> Any:
        """The PrimFunc: (x, weight, offset, scale, [x_scale, x_zero], [bias], [residuals], [steps], y).

        x [m, padded K] of ``isa.activation``; weight packed; offset int32 and scale, bias float32 [padded N]; x_scale
        float32 and x_zero int32 [m] or [1]; residuals float32 [m, N]; y [m, N].

        With static scales offset = z_x · Σ_k W, scale = s_x · s_w; otherwise offset = Σ_k W and scale = s_w.
        """
        return _Builder(self, isa).build(name)


def pad(vector: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """[N] to [count], by zeros."""
    return np.concatenate([vector, np.zeros(count - len(vector), vector.dtype)])


class _Builder:
    def __init__(self, gemm: GemmInt8, isa: Isa) -> None:
        self.gemm, self.isa = gemm, isa
        self.k, self.n = gemm.padded(isa)
        self.tiling = gemm.tiles(isa)
        self.vectors = self.tiling.vectors

    def build(self, name: str) -> Any:
        gemm, isa, lanes = self.gemm, self.isa, self.isa.lanes
        m = size("m")
        with kernel_named(name) as kernel:
            self.x = kernel.argument("x", (m, self.k), isa.activation)
            packed = (self.n // lanes, self.k // isa.group, lanes * isa.group)
            self.weight = kernel.argument("weight", packed, "int8")
            self.offset = kernel.argument("offset", (self.n,), "int32")
            self.scale = kernel.argument("scale", (self.n,))
            self.x_scale: Any = None
            self.x_zero: Any = None
            if gemm.scales != "static":
                count = m if gemm.scales == "row" else 1
                self.x_scale = kernel.argument("x_scale", (count,))
                self.x_zero = kernel.argument("x_zero", (count,), "int32")
            self.finisher = Finisher(gemm.epilogue, kernel, m, isa, gemm.out_features, self.n)
            panels = self.n // (lanes * self.vectors)
            blocked(m, panels, self.tiling.rows, self._tile, self.tiling.block)
        return kernel.function

    def _tile(self, panel: Any, row: Any, height: int) -> None:
        isa, lanes, group = self.isa, self.isa.lanes, self.isa.group
        sums = [zeros(self.vectors, lanes, "int32") for _ in range(height)]
        parts = [at(j * lanes, lanes) for j in range(self.vectors)]

        with T.serial(0, self.k // group) as k:
            weights = [self.weight[panel * self.vectors + j, k, at(0, lanes * group)] for j in range(self.vectors)]
            for r in range(height):
                values = T.reinterpret(self.x[row + r, at(k * group, group)], dtype="int32")
                for j in range(self.vectors):
                    store(sums[r], [parts[j]], isa.multiply_add(sums[r][parts[j]], values, weights[j]))
        for r in range(height):
            for j in range(self.vectors):
                column = (panel * self.vectors + j) * lanes
                self.finisher.write(row + r, column, self._rescaled(row + r, column, sums[r][parts[j]]))

    def _rescaled(self, row: Any, column: Any, sums: Any) -> Any:
        lanes = self.isa.lanes
        offset, scale = self.offset[at(column, lanes)], self.scale[at(column, lanes)]
        if self.x_scale is not None:
            which = row if self.gemm.scales == "row" else 0
            offset = offset * spread(self.x_zero[which], lanes)
            scale = scale * spread(self.x_scale[which], lanes)
        return cast(sums - offset, "float32") * scale


def blocked(m: Any, panels: int, height: int, tile: Callable[[Any, Any, int], None], block: int = BLOCK) -> None:
    """``tile(panel, first row, rows)`` for all panels and rows; threads share blocks of rows times panels."""
    with T.parallel(0, (m + block - 1) // block * panels) as task:
        first = task // panels * block
        count = tirx.min(tirx.IntImm("int64", block), m - first)
        row_tiles(count, height, lambda row, rows: tile(task % panels, first + row, rows))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
