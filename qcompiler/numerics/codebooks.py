"""4-bit floats by table: NF4 and FP4 in blocks, their scales in 8 bits (QLoRA, Dettmers et al. 2023, section 3).

A weight [in, out] is laid out as [out, in], flattened and cut into blocks; w ≈ values[q] · scale of the block, where
the scale is max|w| of the block. So blocks run on from one output channel into the next where in is no multiple of
their size, as in bitsandbytes and in ONNX Runtime's MatMulBnb4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.core import unknown

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_BELOW = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
_BELOW += [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495]
_ABOVE = [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
_ABOVE += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
NF4 = np.array([*_BELOW, 0.0, *_ABOVE], np.float32)
"""Quantiles of the normal distribution, scaled to [-1, 1], zero among them (appendix E)."""
_HALF_FP4 = np.array([0.0, 0.0625 / 12, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0], np.float32)
FP4 = np.concatenate([-_HALF_FP4[::-1], _HALF_FP4])
"""bitsandbytes' 4-bit float over its largest number, 12: sign, two bits of exponent, one of mantissa; two zeros."""
CODEBOOKS: Mapping[str, Floats] = {"nf4": NF4, "fp4": FP4}
SCALES_TOGETHER = 256
"""Scales of blocks that share a scale of their own where they are quantized too."""


@dataclasses.dataclass(frozen=True, eq=False)
class CodebookGrid:
    """The numbers a weight [in, out] is rounded to.

    Attributes:
        values: float32 [16], ascending.
        block_size: consecutive weights of the flattened [out, in] that share a scale; the last block may be short.
        scale: float32 [ceil(in · out / block_size)].
    """

    values: Floats
    block_size: int
    scale: Floats

    def nearest(self, weight: Array) -> npt.NDArray[np.uint8]:
        """Places in ``values`` [in, out] of what is nearest to a weight, of two as near ones the lower."""
        scale = np.where(self.scale == 0, np.float32(1), self.scale)
        middles = (self.values[1:] + self.values[:-1]) * np.float32(0.5)
        blocks = _blocks(np.asarray(weight, np.float32), self.block_size) / scale[:, None]
        return _weight(np.searchsorted(middles, blocks, side="left").astype(np.uint8), weight.shape)

    def dequantized(self, q: Array) -> Floats:
        """values[q] · scale, [in, out]."""
        return _weight(_blocks(self.values[q], self.block_size) * self.scale[:, None], q.shape)

    def rounded(self, weight: Array) -> Floats:
        """The values on the grid that are nearest to a weight."""
        return self.dequantized(self.nearest(weight))


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedScales:
    """Scales of blocks in 8 bits: scale = q · step + mean.

    Attributes:
        q: int8 [ceil(count / 256), 256], filled up with 0.
        step: float32 [ceil(count / 256)].
        mean: float32 scalar, of all scales.
        count: how many scales there are.
    """

    q: npt.NDArray[np.int8]
    step: Floats
    mean: Floats
    count: int

    def expanded(self) -> Floats:
        """The scales, float32 [count]."""
        return np.asarray(self.q.astype(np.float32) * self.step[:, None] + self.mean).reshape(-1)[: self.count]


def codebook(name: str) -> Floats:
    """The table of that name.

    Raises:
        OptionError: there is none.
    """
    if name not in CODEBOOKS:
        raise unknown("codebook", name, CODEBOOKS)
    return CODEBOOKS[name]


def block_absmax(weight: Array, block_size: int) -> Floats:
    """max|w| of each block of a weight [in, out], float32 [ceil(in · out / block_size)]."""
    return np.asarray(np.abs(_blocks(np.asarray(weight, np.float32), block_size)).max(1, initial=0.0))


def quantize_scales(scale: Floats) -> QuantizedScales:
    """Double quantization: symmetric int8 about the mean of all scales [count], with one step for 256 of them."""
    mean = np.asarray(scale.mean(dtype=np.float64), np.float32)
    centred = _padded(scale - mean, SCALES_TOGETHER)
    reach = np.abs(centred).max(1)
    step = np.where(reach > 0, reach / np.float32(127), np.float32(1))
    q = np.clip(np.rint(centred / step[:, None]), -127, 127).astype(np.int8)
    return QuantizedScales(q, step, mean, len(scale))


def _blocks(weight: Array, block_size: int) -> Array:
    """[in, out] -> [blocks, block_size], the last one filled up with zeros."""
    return _padded(np.ascontiguousarray(weight.T).reshape(-1), block_size)


def _padded(flat: Array, size: int) -> Array:
    short = -len(flat) % size
    return (np.concatenate([flat, np.zeros(short, flat.dtype)]) if short else flat).reshape(-1, size)


def _weight(blocks: Array, shape: tuple[int, ...]) -> Array:
    """What :func:`_blocks` made, back as [in, out]."""
    rows, columns = shape
    return np.ascontiguousarray(blocks.reshape(-1)[: rows * columns].reshape(columns, rows).T)
