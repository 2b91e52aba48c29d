"""y = epilogue(Σ_g s[g, n] · Σ_{k in g} x[m, k] · (W[k, n] - z[g, n])): float activations, weights of 2, 4 or 8 bits.

Exact but for float32 rounding. A 32-bit lane holds 32 / bits numbers of one column, for as many inputs that follow each
other: one load serves as many steps, each a shift and, with AVX-512 and up to four bits, one look-up in a table of
sixteen floats in a register (vpermps reads the four low bits of each lane), elsewhere a mask and a conversion.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import at, cast, f32, i32, kernel_named, size, spread, store, zeros
from qcompiler.targets.tvm.isa import Isa
from qcompiler.targets.tvm.kernels.epilogue import Finisher
from qcompiler.targets.tvm.kernels.gemm_groups import VECTORS, ByGroup, by_panel, rows_of_tile, width


class GemmGroupsF32(ByGroup):
    """Float products of one shape of Linear."""

    @property
    def step(self) -> int:
        """Inputs whose weights one lane holds."""
        return 32 // self.bits

    def build(self, isa: Isa, name: str) -> Any:
        """The PrimFunc: (x [m, K], weight, scale, [zero], [bias], [residuals], [steps], y [m, N]).

        weight as :func:`pack` gives it; scale and zero (float32) as
        :func:`qcompiler.targets.tvm.kernels.gemm_groups.pack_groups`.
        """
        return _Builder(self, isa).build(name)


def pack(q: npt.NDArray[Any], group_size: int, bits: int, isa: Isa) -> npt.NDArray[np.int32]:
    """Unsigned [K, N] to panels [⌈N / width⌉, padded K / step, width]; the padding is zero."""
    gemm = GemmGroupsF32(q.shape[0], q.shape[1], group_size, bits)
    rows, panels = gemm.groups * group_size, -(-q.shape[1] // width(isa))
    whole = np.zeros((rows, panels * width(isa)), np.uint32)
    whole[: q.shape[0], : q.shape[1]] = q
    split = whole.reshape(rows // gemm.step, gemm.step, panels, width(isa))
    packed = np.zeros((rows // gemm.step, panels, width(isa)), np.uint32)
    for part in range(gemm.step):
        packed |= split[:, part] << np.uint32(bits * part)
    return np.ascontiguousarray(packed.transpose(1, 0, 2)).view(np.int32)


class _Builder:
    def __init__(self, gemm: GemmGroupsF32, isa: Isa) -> None:
        self.gemm, self.isa = gemm, isa
        self.panels = -(-gemm.out_features // width(isa))

    def build(self, name: str) -> Any:
        gemm, isa = self.gemm, self.isa
        m = size("m")
        with kernel_named(name) as kernel:
            self.x = kernel.argument("x", (m, gemm.in_features))
            steps = gemm.groups * gemm.group_size // gemm.step
            self.weight = kernel.argument("weight", (self.panels, steps, width(isa)), "int32")
            by_group = (self.panels, gemm.groups, width(isa))
            self.scale = kernel.argument("scale", by_group)
            self.zero = None if gemm.symmetric else kernel.argument("zero", by_group)
            self.finisher = Finisher(gemm.epilogue, kernel, m, isa, gemm.out_features, self.panels * width(isa))
            by_panel(m, self.panels, rows_of_tile(isa), self._tile)
        return kernel.function

    def _tile(self, panel: Any, row: Any, height: int) -> None:
        gemm, lanes = self.gemm, self.isa.lanes
        self.total = [zeros(VECTORS, lanes) for _ in range(height)]
        whole, rest = divmod(gemm.in_features, gemm.group_size)
        with T.serial(0, whole) as group:
            self._group(panel, row, height, group, gemm.group_size)
        if rest:
            self._group(panel, row, height, whole, rest)
        for r, j, here in self._places(height):
            self.finisher.write(row + r, (panel * VECTORS + j) * lanes, self.total[r][here])

    def _places(self, height: int) -> list[tuple[int, int, Any]]:
        lanes = self.isa.lanes
        return [(r, j, at(j * lanes, lanes)) for r in range(height) for j in range(VECTORS)]

    def _group(self, panel: Any, row: Any, height: int, group: Any, count: int) -> None:
        """``count`` inputs of one group."""
        gemm, lanes = self.gemm, self.isa.lanes
        sums = [zeros(VECTORS, lanes) for _ in range(height)]
        offset = None if self.zero is None else zeros(height, 1)
        first = group * (gemm.group_size // gemm.step)
        with T.serial(0, count // gemm.step) as step:
            self._products(panel, row, height, sums, offset, first + step, gemm.step)
        if count % gemm.step:
            self._products(panel, row, height, sums, offset, first + count // gemm.step, count % gemm.step)
        for r, _, here in self._places(height):
            value = sums[r][here]
            if self.zero is not None and offset is not None:
                value = value - self.zero[panel, group, here] * spread(offset[r], lanes)
            store(self.total[r], [here], self.total[r][here] + value * self.scale[panel, group, here])

    def _products(self, panel: Any, row: Any, height: int, sums: Any, offset: Any, step: Any, count: int) -> None:
        """``count`` inputs of one step."""
        gemm, lanes = self.gemm, self.isa.lanes
        packed = [self.weight[panel, step, at(j * lanes, lanes)] for j in range(VECTORS)]
        for part in range(count):
            weights = [self._numbers(p, part) for p in packed]
            for r in range(height):
                value = self.x[row + r, step * gemm.step + part]
                for j in range(VECTORS):
                    here = at(j * lanes, lanes)
                    store(sums[r], [here], sums[r][here] + spread(value, lanes) * weights[j])
                if offset is not None:
                    store(offset, [r], offset[r] + value)

    def _numbers(self, packed: Any, part: int) -> Any:
        """The part-th number of each lane in float, less the middle where that is the zero point."""
        gemm, lanes = self.gemm, self.isa.lanes
        shifted = packed if part == 0 else packed >> i32(gemm.bits * part, lanes)
        middle = float(1 << (gemm.bits - 1)) if gemm.symmetric else 0.0
        if lanes == 16 and gemm.bits <= 4:
            return self.isa.look_up([index % (1 << gemm.bits) - middle for index in range(16)], shifted)
        number = shifted & i32((1 << gemm.bits) - 1, lanes)
        return cast(number, "float32") - f32(middle, lanes)
