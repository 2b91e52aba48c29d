"""A block of 256 threads that makes 64 x 64 numbers of a product, 32 of K at a time through shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import store

ROWS = COLUMNS = 64
DEPTH = 32
THREADS = 256
EACH = 4
"""Rows and columns of one thread's numbers."""

Load = Callable[[Any, Any, Any, Any], None]
"""(first row, first column, step of K, thread)"""
Multiply = Callable[[Any, Any], None]
"""(first row, first column of a thread's numbers within the tile)"""
Write = Callable[[Any, Any, int, int], None]
"""(row, column, i, j)"""


def up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def tiled(
    m: Any,
    padded: int,
    depth: int,
    begin: Callable[[], tuple[Load, Multiply, Write]],
) -> None:
    """The loops.

    Args:
        m: rows.
        padded: columns, a multiple of :data:`COLUMNS`.
        depth: K, a multiple of :data:`DEPTH`.
        begin: called within the kernel, where its memory belongs; gives what fills shared memory, what adds what is
            there, and what writes a thread's number i, j (of rows below m only).
    """
    with (
        T.thread_binding(0, (m + ROWS - 1) // ROWS, thread="blockIdx.y") as down,
        T.thread_binding(0, padded // COLUMNS, thread="blockIdx.x") as across,
        T.thread_binding(0, THREADS, thread="threadIdx.x") as thread,
    ):
        load, multiply, write = begin()
        row, column = thread // (COLUMNS // EACH) * EACH, thread % (COLUMNS // EACH) * EACH
        with T.serial(0, depth // DEPTH) as step:
            load(down * ROWS, across * COLUMNS, step, thread)
            T.evaluate(T.tvm_storage_sync("shared"))
            multiply(row, column)
            T.evaluate(T.tvm_storage_sync("shared"))
        for i in range(EACH):
            with T.If(down * ROWS + row + i < m), T.Then():
                for j in range(EACH):
                    write(down * ROWS + row + i, across * COLUMNS + column + j, i, j)


def shared(rows: int, width: int, dtype: str) -> Any:
    """A table in shared memory. (TVM takes away the padding of rows that would spread a column over the banks.)"""
    return T.alloc_buffer((rows, width), dtype, scope="shared")


def cleared(zero: Any) -> Any:
    """A thread's own sums."""
    sums = T.alloc_buffer((EACH * EACH,), str(zero.ty.dtype), scope="local")
    for index in range(EACH * EACH):
        store(sums, [index], zero)
    return sums
