"""y[b] = a[b] · c[b] in float32, all sizes symbolic: products of two activations that are no Attention."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import at, kernel_named, row_tiles, size, spread, store, zeros
from qcompiler.targets.tvm.isa import Isa


@dataclasses.dataclass(frozen=True)
class BatchMatMul:
    """(a [B, M, K], c [B, K, N], y [B, M, N])."""

    def build(self, isa: Isa, name: str) -> Any:
        """The PrimFunc."""
        b, m, k, n = size("b"), size("m"), size("k"), size("n")
        height, vectors = isa.tile
        with kernel_named(name) as kernel:
            first = kernel.argument("a", (b, m, k))
            second = kernel.argument("c", (b, k, n))
            y = kernel.argument("y", (b, m, n))

            def tile(batch: Any, row: Any, rows: int, column: Any, lanes: int, count: int) -> None:
                sums = zeros(rows * count, lanes)
                with T.serial(0, k) as step:
                    values = [second[batch, step, at(column + j * lanes, lanes)] for j in range(count)]
                    for r in range(rows):
                        for j in range(count):
                            here = at((r * count + j) * lanes, lanes)
                            store(sums, [here], sums[here] + spread(first[batch, row + r, step], lanes) * values[j])
                for r in range(rows):
                    for j in range(count):
                        value = sums[at((r * count + j) * lanes, lanes)]
                        store(y, [batch, row + r, at(column + j * lanes, lanes)], value)

            width = isa.lanes * vectors
            with T.parallel(0, b) as batch:
                with T.serial(0, n // width) as panel:
                    row_tiles(
                        m,
                        height,
                        lambda row, rows: tile(batch, row, rows, panel * width, isa.lanes, vectors),
                    )
                with T.serial(0, n % width) as rest:
                    row_tiles(m, height, lambda row, rows: tile(batch, row, rows, n // width * width + rest, 1, 1))
        return kernel.function
