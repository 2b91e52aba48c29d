"""What the search for a site's scale and shift knows of its channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.site_judge import Reader

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """What is known of a site's channels, from one fold of the samples or from all.

    Attributes:
        low, high, mean: float32 [channels] of the activation.
        weight: float32 [channels], max|W| over all Linears that read the channel; 0 where the scale must stay 1.
        weight_rms: float32 [channels], root of the mean square of the same weights; 0 as above.
        magnitude: float32 [channels], mean|x|.
        fixed: bool [channels], where the shift must stay 0.
        samples: rows of the activation, each [n, K] with the channel of each of its features [K] (-1: none).
    """

    low: Vector
    high: Vector
    mean: Vector
    weight: Vector
    weight_rms: Vector
    magnitude: Vector
    fixed: npt.NDArray[np.bool_]
    samples: tuple[tuple[Array, Array], ...] = ()

    def absmax(self, shift: Vector | None) -> Vector:
        """max|x - shift|, float32 [channels]."""
        low, high = (self.low, self.high) if shift is None else (self.low - shift, self.high - shift)
        return np.maximum(np.abs(low), np.abs(high))

    def fourth_moment(self, shift: Vector | None) -> Vector:
        """Fourth root of the mean of (x - shift)^4 over the sample, float32 [channels]: between spread and maximum."""
        total, count = np.zeros(len(self.low)), np.zeros(len(self.low))
        for rows, columns in self.samples:
            carried = columns >= 0
            x = rows[:, carried] if shift is None else rows[:, carried] - shift[columns[carried]]
            x = np.square(x)
            np.add.at(total, columns[carried], np.einsum("nk,nk->k", x, x, dtype=np.float64))
            np.add.at(count, columns[carried], len(rows))
        return ((total / np.maximum(count, 1)) ** 0.25).astype(np.float32)


def channels_of(
    readers: Sequence[Reader], fold: int | None, channels: int, blocked: Array | None, fixed: Array | None
) -> Channels:
    low, high = np.full(channels, np.inf, np.float32), np.full(channels, -np.inf, np.float32)
    weight, total, absolute, count = (np.zeros(channels, t) for t in (np.float32, float, float, float))
    squares, weights = np.zeros(channels), np.zeros(channels)
    samples: list[tuple[Array, Array]] = []
    for reader in readers:
        carried = reader.columns >= 0
        columns = reader.columns[carried]
        lowest, highest = (reader.low, reader.high) if fold is None else (reader.low[[fold]], reader.high[[fold]])
        np.minimum.at(low, columns, lowest.min(0)[carried])
        np.maximum.at(high, columns, highest.max(0)[carried])
        np.maximum.at(weight, columns, np.abs(reader.weight).max(1)[carried])
        np.add.at(squares, columns, np.einsum("kn,kn->k", reader.weight, reader.weight)[carried])
        np.add.at(weights, columns, reader.weight.shape[1])
        rows = reader.rows if fold is None else reader.rows[reader.fold == fold]
        if len(rows) == 0:  # a fold that no sampled row is of
            rows = reader.rows
        np.add.at(total, columns, rows.sum(0, dtype=np.float64)[carried])
        np.add.at(absolute, columns, np.abs(rows).sum(0, dtype=np.float64)[carried])
        np.add.at(count, columns, len(rows))
        samples.append((rows, reader.columns))
    unread = low > high
    low[unread] = high[unread] = 0
    if blocked is not None:
        weight[blocked] = 0  # as a dead channel: its scale is 1
    weight_rms = np.where(weight > 0, np.sqrt(squares / np.maximum(weights, 1)), 0).astype(np.float32)
    mean, magnitude = ((sums / np.maximum(count, 1)).astype(np.float32) for sums in (total, absolute))
    fixed = np.zeros(channels, bool) if fixed is None else fixed
    return Channels(low, high, mean, weight, weight_rms, magnitude, fixed, tuple(samples))
