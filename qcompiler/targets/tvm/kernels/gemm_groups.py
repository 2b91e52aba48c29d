"""y = epilogue(Σ_g s_x[g] · s_w[g, n] · Σ_{k in g} x[m, k] · (W[k, n] - z[g, n])): weights of 2, 4 or 8 bits by group.

Activations are int8 by the same groups. The weight stays unsigned: it is the unsigned operand of the dot, and what its
zero point subtracts, z · Σ x, is where each group's sums begin, so that unpacking costs a mask and a shift.

A byte holds numbers that lie one dot (four inputs) apart, so that one load of packed bytes gives whole dots: panels
[⌈N / width⌉][K / step][vectors][lanes · 4] with step = 4 · 8 / bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import at, cast, kernel_named, local, row_tiles, size, spread, store, zeros
from qcompiler.targets.tvm.isa import QUAD, Isa
from qcompiler.targets.tvm.kernels.epilogue import PLAIN, Epilogue, Finisher

VECTORS = 4
"""Vectors of columns of one panel: as many sums as a dot's latency wants, of a single row."""


BLOCK = 64
"""Rows of one task: few enough that two threads find equal shares of a few panels."""


@dataclasses.dataclass(frozen=True)
class ByGroup:
    """One shape of Linear.

    Attributes:
        in_features, out_features: K and N.
        group_size: inputs that share a scale, a multiple of 16; K is padded to a multiple.
        bits: of a weight: 2, 4 or 8.
        symmetric: whether all zero points are the middle, 2^(bits - 1); else they are an argument.
        epilogue: what follows.
    """

    in_features: int
    out_features: int
    group_size: int
    bits: int = 4
    symmetric: bool = True
    epilogue: Epilogue = PLAIN

    @property
    def groups(self) -> int:
        """How many there are along K."""
        return -(-self.in_features // self.group_size)


class GemmGroups(ByGroup):
    """Integer products of one shape of Linear."""

    @property
    def step(self) -> int:
        """Inputs whose weights one byte of each lane's four holds."""
        return QUAD * 8 // self.bits

    def build(self, isa: Isa, name: str) -> Any:
        """The PrimFunc: (x, weight, scale, [zero], x_scale, x_sum, [bias], [residuals], [steps], y).

        x int8 [m, groups · group_size], padded with zeros; weight, scale and zero as :func:`pack` and
        :func:`pack_groups` give them; x_scale float32 and x_sum = Σ x int32, [m, groups].
        """
        return _Builder(self, isa).build(name)


def rows_of_tile(isa: Isa) -> int:
    """Rows whose integer sums fill half the registers: the other half holds those of all groups."""
    return isa.registers // (2 * VECTORS)


def by_panel(m: Any, panels: int, height: int, tile: Callable[[Any, Any, int], None]) -> None:
    """``tile(panel, first row, rows)`` for all panels and rows; threads share panels times blocks of rows.

    All rows pass a panel before the next: each thread reads its own half of a weight that no cache holds.
    """
    blocks = (m + BLOCK - 1) // BLOCK
    with T.parallel(0, panels * blocks) as task:
        first = task % blocks * BLOCK
        count = tirx.min(tirx.IntImm("int64", BLOCK), m - first)
        row_tiles(count, height, lambda row, rows: tile(task // blocks, first + row, rows))


def width(isa: Isa) -> int:
    """Columns of a panel."""
    return VECTORS * isa.lanes


def pack(q: npt.NDArray[Any], group_size: int, bits: int, isa: Isa) -> npt.NDArray[np.uint8]:
    """Unsigned [K, N] to panels [⌈N / width⌉, padded K / step, vectors, lanes · 4]; the padding is zero."""
    gemm = GemmGroups(q.shape[0], q.shape[1], group_size, bits)
    rows, panels, per = gemm.groups * group_size, -(-q.shape[1] // width(isa)), 8 // bits
    whole = np.zeros((rows, panels * width(isa)), np.uint8)
    whole[: q.shape[0], : q.shape[1]] = q
    split = whole.reshape(rows // gemm.step, per, QUAD, panels, VECTORS, isa.lanes)
    packed = np.zeros((rows // gemm.step, *split.shape[2:]), np.uint8)
    for part in range(per):
        packed |= split[:, part] << np.uint8(bits * part)
    packed = packed.transpose(2, 0, 3, 4, 1)  # [panels, steps, vectors, lanes, 4]
    return np.ascontiguousarray(packed).reshape(panels, rows // gemm.step, VECTORS, isa.lanes * QUAD)


def pack_groups(values: npt.NDArray[Any], isa: Isa) -> npt.NDArray[Any]:
    """Scales or zero points [groups, N] to [⌈N / width⌉, groups, width]; the padding is zero."""
    groups, out_features = values.shape
    panels = -(-out_features // width(isa))
    whole = np.zeros((groups, panels * width(isa)), values.dtype)
    whole[:, :out_features] = values
    return np.ascontiguousarray(whole.reshape(groups, panels, width(isa)).transpose(1, 0, 2))


def pad_panels(vector: npt.NDArray[Any], isa: Isa) -> npt.NDArray[Any]:
    """A bias [N] to whole panels."""
    return pack_groups(vector[None], isa).reshape(-1)


def reference(
    x: npt.NDArray[Any],
    x_scale: npt.NDArray[Any],
    q: npt.NDArray[Any],
    scale: npt.NDArray[Any],
    zero: npt.NDArray[Any],
    group_size: int,
) -> npt.NDArray[np.float64]:
    """The sums in numpy.

    Args:
        x: int8 [m, padded K].
        x_scale: [m, groups].
        q: unsigned [K, N].
        scale, zero: [groups, N].
        group_size: inputs that share a scale.
    """
    y = np.zeros((len(x), q.shape[1]))
    for group in range(len(scale)):
        here = slice(group * group_size, (group + 1) * group_size)
        weight = q[here].astype(np.int64) - zero[group]
        sums = x[:, here][:, : len(weight)].astype(np.int64) @ weight
        y += sums * (x_scale[:, group : group + 1].astype(np.float64) * scale[group])
    return y


class _Builder:
    def __init__(self, gemm: GemmGroups, isa: Isa) -> None:
        self.gemm, self.isa = gemm, isa
        self.panels = -(-gemm.out_features // width(isa))
        self.steps = gemm.group_size // gemm.step

    def build(self, name: str) -> Any:
        gemm, isa = self.gemm, self.isa
        m, depth = size("m"), gemm.groups * gemm.group_size
        with kernel_named(name) as kernel:
            self.x = kernel.argument("x", (m, depth), "int8")
            shape = (self.panels, depth // gemm.step, VECTORS, isa.lanes * QUAD)
            self.weight = kernel.argument("weight", shape, "uint8")
            by_group = (self.panels, gemm.groups, width(isa))
            self.scale = kernel.argument("scale", by_group)
            self.zero = None if gemm.symmetric else kernel.argument("zero", by_group, "uint8")
            self.x_scale = kernel.argument("x_scale", (m, gemm.groups))
            self.x_sum = kernel.argument("x_sum", (m, gemm.groups), "int32")
            padded = self.panels * width(isa)
            self.finisher = Finisher(gemm.epilogue, kernel, m, isa, gemm.out_features, padded)
            by_panel(m, self.panels, rows_of_tile(isa), self._tile)
        return kernel.function

    def _tile(self, panel: Any, row: Any, height: int) -> None:
        lanes = self.isa.lanes
        total = [zeros(VECTORS, lanes) for _ in range(height)]
        places = [(r, j, at(j * lanes, lanes)) for r in range(height) for j in range(VECTORS)]
        with T.serial(0, self.gemm.groups) as group:
            sums = [local(VECTORS * lanes, "int32") for _ in range(height)]
            for r, j, here in places:
                store(sums[r], [here], self._start(panel, row + r, group, j))
            with T.serial(0, self.steps) as step:
                self._dots(panel, row, group * self.steps + step, sums, height)
            for r, _, here in places:
                factor = self.scale[panel, group, here] * spread(self.x_scale[row + r, group], lanes)
                store(total[r], [here], total[r][here] + cast(sums[r][here], "float32") * factor)
        for r, j, here in places:
            self.finisher.write(row + r, (panel * VECTORS + j) * lanes, total[r][here])

    def _start(self, panel: Any, row: Any, group: Any, vector: int) -> Any:
        """-z · Σ x."""
        lanes, x_sum = self.isa.lanes, self.x_sum[row, group]
        if self.zero is None:
            return spread(x_sum * tirx.const(-(1 << (self.gemm.bits - 1)), "int32"), lanes)
        zero = cast(self.zero[panel, group, at(vector * lanes, lanes)], "int32")
        return zero * spread(tirx.const(0, "int32") - x_sum, lanes)

    def _dots(self, panel: Any, row: Any, step: Any, sums: list[Any], height: int) -> None:
        gemm, isa, lanes = self.gemm, self.isa, self.isa.lanes
        packed = [self.weight[panel, step, j, at(0, lanes * QUAD)] for j in range(VECTORS)]
        for part in range(8 // gemm.bits):
            weights = [_numbers(p, part, gemm.bits) for p in packed]
            for r in range(height):
                values = T.reinterpret(self.x[row + r, at(step * gemm.step + part * QUAD, QUAD)], dtype="int32")
                for j in range(VECTORS):
                    here = at(j * lanes, lanes)
                    dot = isa.multiply_add_unsigned(sums[r][here], values, weights[j], gemm.bits)
                    store(sums[r], [here], dot)


def _numbers(packed: Any, part: int, bits: int) -> Any:
    """Every ``part``-th number of the bytes."""
    if bits == 8:
        return packed
    count = int(packed.ty.dtype.lanes)
    shifted = packed if part == 0 else packed >> T.broadcast(tirx.const(bits * part, "uint8"), count)
    return shifted if (part + 1) * bits == 8 else shifted & T.broadcast(tirx.const((1 << bits) - 1, "uint8"), count)
