"""Integers of 2, 4 or 8 bits packed into bytes or words, the first in the lowest bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


def pack(q: Array, bits: int, fill: int = 0) -> Bytes:
    """Pack the last axis: unsigned [..., n] -> uint8 [..., ceil(n · bits / 8)], then ``fill`` to the byte's end."""
    per_byte = 8 // bits
    short = -q.shape[-1] % per_byte
    if short:
        q = np.concatenate([q, np.full((*q.shape[:-1], short), fill, q.dtype)], axis=-1)
    lanes = np.asarray(q, np.uint8).reshape(*q.shape[:-1], q.shape[-1] // per_byte, per_byte)
    packed = np.zeros(lanes.shape[:-1], np.uint8)
    for lane in range(per_byte):
        packed |= lanes[..., lane] << np.uint8(bits * lane)
    return packed


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """The first ``count`` numbers of each last axis that :func:`pack` packed."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return np.ascontiguousarray(numbers.reshape(*packed.shape[:-1], -1)[..., :count])


def pack_words(q: Array, bits: int) -> npt.NDArray[np.int32]:
    """Pack the last axis into 32-bit words: unsigned [..., n] -> int32 [..., ceil(n · bits / 32)], zeros to the end.

    What compressed-tensors calls pack-quantized (``pack_to_int32`` in its source).
    """
    packed = pack(q, bits)
    short = -packed.shape[-1] % 4
    padded = np.concatenate([packed, np.zeros((*packed.shape[:-1], short), np.uint8)], axis=-1)
    return np.ascontiguousarray(padded).view("<i4")


def pack_weight(q: Array, bits: int, block_size: int) -> Bytes:
    """A weight [in, out] of unsigned integers as MatMulNBits stores it: uint8 [out, blocks, block_size · bits / 8].

    The last block is filled up with the middle of the range; the operator reads nothing of it.
    """
    rows, columns = q.shape
    blocks = -(-rows // block_size)
    padded = np.full((columns, blocks * block_size), 1 << (bits - 1), np.uint8)
    padded[:, :rows] = q.T
    return pack(padded, bits).reshape(columns, blocks, block_size * bits // 8)
