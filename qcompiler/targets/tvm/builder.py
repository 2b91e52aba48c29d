"""A PrimFunc written as Python: arguments, vector loads and stores, and loops over a last axis with its remainder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

Index = Any
"""An int, a PrimExpr, or a ramp of either."""


_OPAQUE = 8
"""Relax's pattern of what it must not fuse with anything."""


class Kernel:
    """Collects one PrimFunc; ``function`` is it when the ``with kernel_named(...)`` block has ended."""

    function: Any = None

    def argument(self, name: str, shape: Sequence[Any], dtype: str = "float32") -> Any:
        """A buffer argument; symbolic sizes are bound by the first argument that has them."""
        return IRBuilder.name(name, T.match_buffer(T.arg(name, T.handle()), tuple(shape), dtype))


@contextlib.contextmanager
def kernel_named(name: str) -> Iterator[Kernel]:
    """The body of the ``with`` becomes the PrimFunc of that name."""
    kernel = Kernel()
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"tirx.noalias": True, "global_symbol": name, "op_pattern": _OPAQUE})
            yield kernel
        kernel.function = builder.get()


def size(name: str) -> Any:
    """A symbolic size."""
    return tirx.Var(name, "int64")


def local(count: Any, dtype: str = "float32") -> Any:
    """A small array that LLVM keeps in registers where it is indexed by constants.

    (On a CPU, TVM puts less than 1024 bytes of scope "global" on the stack; the rest, and scope "local", comes from a
    pool, at a cost that a product of one row feels.)
    """
    return T.alloc_buffer((count,), dtype)


def f32(number: float, lanes: int = 1) -> Any:
    """A constant, in every lane."""
    value = tirx.const(np.float32(number), "float32")
    return T.broadcast(value, lanes) if lanes > 1 else value


def i32(number: int, lanes: int = 1) -> Any:
    """A constant, in every lane."""
    value = tirx.const(number, "int32")
    return T.broadcast(value, lanes) if lanes > 1 else value


def typed(dtype: str, lanes: int) -> str:
    """TVM's name of a vector type; of one lane, the scalar's."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def cast(value: Any, dtype: str) -> Any:
    """The same numbers in another type."""
    return T.cast(value, typed(dtype, lanes_of(value)))


def lanes_of(value: Any) -> int:
    """How many numbers an expression holds."""
    return int(value.ty.dtype.lanes)


def spread(value: Any, lanes: int) -> Any:
    """One number in every lane."""
    return T.broadcast(value, lanes) if lanes > 1 else value


def at(start: Any, lanes: int) -> Index:
    """Indices start … start + lanes - 1."""
    return T.ramp(start, 1, lanes) if lanes > 1 else start


def store(buffer: Any, indices: Sequence[Index], value: Any) -> None:
    """buffer[indices] = value."""
    T.buffer_store(buffer, value, list(indices))


def columns(length: Any, lanes: int, body: Callable[[Any, int], None]) -> None:
    """``body(start, lanes)`` over 0 … length in vectors, and ``body(start, 1)`` over what is left."""
    whole = length // lanes
    with T.serial(0, whole) as step:
        body(step * lanes, lanes)
    if isinstance(length, int) and length % lanes == 0:
        return
    with T.serial(0, length % lanes) as step:
        body(whole * lanes + step, 1)


def horizontal(buffer: Any, lanes: int, combine: Callable[[Any, Any], Any]) -> Any:
    """All ``lanes`` numbers of a local vector combined to its first one, by halves; the others are spent."""
    half = lanes // 2
    while half:
        store(buffer, [at(0, half)], combine(buffer[at(0, half)], buffer[at(half, half)]))
        half //= 2
    return buffer[0]


def parallel_rows(count: Any, body: Callable[[Any], None]) -> None:
    """``body(row)`` for all rows; threads share them, but a single row does not wake any."""
    with T.If(count > 1):
        with T.Then(), T.parallel(0, count) as row:
            body(row)
        with T.Else():
            body(tirx.IntImm("int64", 0))


def row_tiles(count: Any, height: int, body: Callable[[Any, int], None]) -> None:
    """``body(first, rows)`` over 0 … count in tiles of ``height`` rows, the rest in tiles of 4, 2 and 1."""
    done: Any = 0
    for rows in sorted({height, 4, 2, 1}, reverse=True):
        tiles = (count - done) // rows
        with T.serial(0, tiles) as step:
            body(done + step * rows, rows)
        done = done + tiles * rows


def zeros(vectors: int, lanes: int, dtype: str = "float32") -> Any:
    """Local accumulators."""
    sums = local(vectors * lanes, dtype)
    zero = tirx.const(0, dtype)
    for index in range(vectors):
        store(sums, [at(index * lanes, lanes)], spread(zero, lanes))
    return sums
