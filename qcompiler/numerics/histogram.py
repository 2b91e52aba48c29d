"""A histogram over zero-anchored bins of width 2^k, whose merging is exact.

Bin i >= 0 covers [i · 2^k, (i + 1) · 2^k), the bins of negative numbers mirror these, and k depends on nothing but
the largest magnitude seen: the larger side of zero always spans 2,048 to 4,096 bins. Larger numbers widen the bins by
merging neighbours, which moves no count across an edge. So observing shards and merging them, in any order, gives the
same counts bit for bit as observing the whole.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

SIDE = 4096  # bins on each side of zero
_LEVELS = SIDE.bit_length() - 1
_FINEST = -112  # exponent of the finest bin: 2^112 is still a float32, so that one multiplication finds the bin
_CHUNK = 1 << 16  # numbers binned at a time: their temporaries stay in cache


class Histogram:
    """Counts of float32 numbers, with their exact extremes.

    Attributes:
        counts: int64 [2 · SIDE]; bin i of the module's docstring is at SIDE + i, its mirror image at SIDE - 1 - i.
        exponent: k, the bins are 2^k wide.
        low, high: the smallest and the largest number seen; (inf, -inf) before any.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(2 * SIDE, np.int64)
        self.exponent = _FINEST
        self.low = math.inf
        self.high = -math.inf

    def add(self, x: npt.NDArray[np.float32]) -> None:
        """Count every number of a finite float32 array."""
        if not x.size:
            return
        low, high = float(x.min()), float(x.max())
        self._extend(low, high)
        factor = np.float32(2.0**-self.exponent)
        flat = x.reshape(-1)
        scaled = np.empty(min(_CHUNK, flat.size), np.float32)
        index = np.empty(scaled.size, np.int64)
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            bins, places = scaled[: part.size], index[: part.size]
            np.multiply(part, factor, out=bins)  # exact: a power of two
            places[:] = bins  # towards zero
            places -= part < 0  # of the number itself: a faint one may have become zero just now
            places += SIDE
            self.counts += np.bincount(places, minlength=2 * SIDE)

    def merge(self, other: Histogram) -> None:
        """Take in another histogram's counts, bit-exactly."""
        self._extend(other.low, other.high)
        self.counts += _coarsened(other.counts, self.exponent - other.exponent)

    def _extend(self, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        # frexp: |x| < 2^e strictly, so SIDE bins of width 2^(e - log2 SIDE) hold it on either side.
        reach = max(-self.low, self.high, 0.0)
        exponent = math.frexp(reach)[1] - _LEVELS
        if reach and exponent > self.exponent:
            self.counts = _coarsened(self.counts, exponent - self.exponent)
            self.exponent = exponent

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    def quantile(self, fraction: float) -> float:
        """The number below which ``fraction`` of all numbers lie, linear within its bin and exact at 0 and 1."""
        total = np.cumsum(self.counts)
        target = fraction * total[-1]
        place = min(int(np.searchsorted(total, target)), 2 * SIDE - 1)
        count = int(self.counts[place])
        within = (target - (total[place] - count)) / count if count else 0.0
        return float(np.clip((place - SIDE + within) * self.width, self.low, self.high))


def _coarsened(counts: npt.NDArray[Any], halvings: int) -> npt.NDArray[Any]:
    """Counts in bins 2^halvings times as wide; at the most one bin on each side of zero remains."""
    if halvings <= 0:
        return counts
    factor = 1 << min(halvings, _LEVELS)
    reduced = counts.reshape(-1, factor).sum(axis=1)
    wide = np.zeros_like(counts)
    start = SIDE - SIDE // factor
    wide[start : start + reduced.size] = reduced
    return wide
