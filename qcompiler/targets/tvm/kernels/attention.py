"""softmax(scale · q kᵀ + mask) v in one pass over each head: scores never leave the caches.

Operands come as [B, H, S, D] or as the rows of a Linear, [B, S, H, D]; k and v may have fewer heads, each shared by
neighbouring query heads (grouped-query attention). A row that is masked throughout gives 0.

Both products are float32, by measurement. MiniLM w8a8, 200 sentences of STS-B test, padded to the longest of eight:
25.85 dB; with q and k in int8 by token 25.77, with softmax(...) in uint8 by row and v in int8 by column 25.73 (a fixed
scale of 1/255: 25.64; v by head: 25.58), with all four 25.68, where .1 dB is all that this target may lose to ort-cpu.
At 8 x 128 of 12 heads of 32, AVX512-VNNI, the GEMMs of this package take for a layer .34 ms (int8) instead of .93 for
q kᵀ and .27 instead of .91 for the other: at most 1.2 ms of the kernel's 3.3, before anything is quantized or packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import (
    at,
    columns,
    f32,
    horizontal,
    kernel_named,
    local,
    row_tiles,
    size,
    spread,
    store,
    zeros,
)
from qcompiler.targets.tvm.isa import Isa
from qcompiler.targets.tvm.vecmath import exp

ROWS = 6
"""Query rows of one tile."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """(q, k, v, [mask], y).

    Attributes:
        heads, key_heads: of q, and of k and v; heads is a multiple of key_heads.
        width, value_width: length of a row of q and k, and of v.
        scale: of the scores.
        by_rows: for each of q, k, v, y whether it is [B, S, H, D] instead of [B, H, S, D].
        mask: for each axis of the additive mask whether it is broadcast (its size is 1); None: there is no mask.
    """

    heads: int
    key_heads: int
    width: int
    value_width: int
    scale: float
    by_rows: tuple[bool, bool, bool, bool] = (False, False, False, False)
    mask: tuple[bool, bool, bool, bool] | None = None

    def build(self, isa: Isa, name: str) -> Any:
        """The PrimFunc; batch, S and T are symbolic."""
        return _Builder(self, isa).build(name)


class _Builder:
    def __init__(self, attention: Attention, isa: Isa) -> None:
        self.a, self.isa = attention, isa
        self.rows = ROWS
        self.vectors = 2

    def build(self, name: str) -> Any:
        a = self.a
        b, s, t = size("b"), size("s"), size("t")
        with kernel_named(name) as kernel:

            def operand(which: int, label: str, heads: int, length: Any, width: int) -> Any:
                shape = (b, length, heads, width) if a.by_rows[which] else (b, heads, length, width)
                return kernel.argument(label, shape)

            self.q = operand(0, "q", a.heads, s, a.width)
            self.k = operand(1, "k", a.key_heads, t, a.width)
            self.v = operand(2, "v", a.key_heads, t, a.value_width)
            self.mask: Any = None
            if a.mask is not None:
                sizes = zip((b, a.heads, s, t), a.mask, strict=True)
                self.mask = kernel.argument("mask", [1 if broadcast else full for full, broadcast in sizes])
            self.y = operand(3, "y", a.heads, s, a.value_width)
            with T.parallel(0, b * a.heads) as task:
                self._head(task // a.heads, task % a.heads, s, t)
        return kernel.function

    def at(self, which: int, batch: Any, head: Any, row: Any, column: Any) -> Sequence[Any]:
        """Indices into q, k, v or y."""
        return [batch, row, head, column] if self.a.by_rows[which] else [batch, head, row, column]

    def _head(self, batch: Any, head: Any, s: Any, t: Any) -> None:
        a, lanes = self.a, self.isa.lanes
        self.batch, self.head, self.key_head = batch, head, head // (a.heads // a.key_heads)
        panel = lanes * self.vectors
        # k transposed, its length rounded up to whole tiles: [T / panel][D][panel]
        self.blocks = (t + panel - 1) // panel
        self.keys = T.alloc_buffer((self.blocks * a.width * panel,), "float32")
        with T.serial(0, t) as row, T.serial(0, a.width) as column:
            store(
                self.keys,
                [(row // panel * a.width + column) * panel + row % panel],
                self.k[tuple(self.at(1, batch, self.key_head, row, column))],
            )
        with T.serial(0, self.blocks * panel - t) as rest, T.serial(0, a.width) as column:
            row = t + rest
            store(self.keys, [(row // panel * a.width + column) * panel + row % panel], f32(0.0))
        self.stride = self.blocks * panel
        self.scores = T.alloc_buffer((self.rows * self.stride,), "float32")
        row_tiles(s, self.rows, lambda first, height: self._rows(first, height, t))

    def _rows(self, first: Any, height: int, t: Any) -> None:
        self._products(first, height)
        inverse = local(height)
        for r in range(height):
            self._softmax(first + r, r, t, inverse)
        self._values(first, height, t, inverse)

    def _products(self, first: Any, height: int) -> None:
        """scores[r, :] = q[first + r] · kᵀ."""
        a, lanes, vectors = self.a, self.isa.lanes, self.vectors
        with T.serial(0, self.blocks) as block:
            sums = zeros(height * vectors, lanes)
            with T.serial(0, a.width) as d:
                start = (block * a.width + d) * (lanes * vectors)
                keys = [self.keys[at(start + j * lanes, lanes)] for j in range(vectors)]
                for r in range(height):
                    q = spread(self.q[tuple(self.at(0, self.batch, self.head, first + r, d))], lanes)
                    for j in range(vectors):
                        here = at((r * vectors + j) * lanes, lanes)
                        store(sums, [here], sums[here] + q * keys[j])
            for r in range(height):
                for j in range(vectors):
                    column = r * self.stride + (block * vectors + j) * lanes
                    store(self.scores, [at(column, lanes)], sums[at((r * vectors + j) * lanes, lanes)])

    def _softmax(self, row: Any, r: int, t: Any, inverse: Any) -> None:
        """Exponentials in place; ``inverse[r]`` is one over their sum, or 0 where all are 0.

        What was stored is read back: an expression is evaluated wherever it stands.
        """
        lanes, base = self.isa.lanes, r * self.stride
        largest, total = local(lanes), local(lanes)
        store(largest, [at(0, lanes)], f32(float("-inf"), lanes))
        store(total, [at(0, lanes)], f32(0.0, lanes))

        def masked(c: Any, w: int) -> None:
            value = self.scores[at(base + c, w)] * f32(self.a.scale, w)
            if self.mask is not None:
                value = value + self._mask(row, c, w)
            store(self.scores, [at(base + c, w)], value)
            store(largest, [at(0, w)], tirx.max(largest[at(0, w)], self.scores[at(base + c, w)]))

        columns(t, lanes, masked)
        top = local(1)
        store(top, [0], horizontal(largest, lanes, tirx.max))
        store(top, [0], tirx.Select(top[0] > f32(float("-inf")), top[0], f32(0.0)))

        def exponential(c: Any, w: int) -> None:
            value = exp(self.scores[at(base + c, w)] - spread(top[0], w))
            store(self.scores, [at(base + c, w)], value)
            store(total, [at(0, w)], total[at(0, w)] + self.scores[at(base + c, w)])

        columns(t, lanes, exponential)
        store(top, [0], horizontal(total, lanes, lambda x, y: x + y))
        store(inverse, [r], tirx.Select(top[0] > f32(0.0), f32(1.0) / top[0], f32(0.0)))

    def _mask(self, row: Any, column: Any, lanes: int) -> Any:
        assert self.a.mask is not None
        places = (self.batch, self.head, row)
        index = [0 if broadcast else place for place, broadcast in zip(places, self.a.mask, strict=False)]
        if self.a.mask[3]:
            return spread(self.mask[(*index, 0)], lanes)
        return self.mask[(*index, at(column, lanes))]

    def _values(self, first: Any, height: int, t: Any, inverse: Any) -> None:
        """y[first + r] = scores[r, :] · v · inverse[r]: whole tiles of columns, then vectors, then what is left."""
        a, lanes = self.a, self.isa.lanes
        column = 0
        for width, vectors in ((lanes, self.vectors), (lanes, 1), (1, 1)):
            tiles = (a.value_width - column) // (width * vectors)
            if tiles:
                with T.serial(0, tiles) as tile:
                    self._value_tile(first, height, t, inverse, column + tile * (width * vectors), width, vectors)
            column += tiles * width * vectors

    def _value_tile(self, first: Any, height: int, t: Any, inverse: Any, column: Any, lanes: int, vectors: int) -> None:
        sums = zeros(height * vectors, lanes)
        with T.serial(0, t) as row:
            values = [
                self.v[tuple(self.at(2, self.batch, self.key_head, row, at(column + j * lanes, lanes)))]
                for j in range(vectors)
            ]
            for r in range(height):
                p = spread(self.scores[r * self.stride + row], lanes)
                for j in range(vectors):
                    here = at((r * vectors + j) * lanes, lanes)
                    store(sums, [here], sums[here] + p * values[j])
        for r in range(height):
            for j in range(vectors):
                value = sums[at((r * vectors + j) * lanes, lanes)] * spread(inverse[r], lanes)
                place = self.at(3, self.batch, self.head, first + r, at(column + j * lanes, lanes))
                store(self.y, place, value)
