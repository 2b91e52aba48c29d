"""rows: a seeded uniform sample of rows, on which searches judge (a RowSample)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.observers.base import Observer, Rows, Samples
from qcompiler.core import OptionError

Keys = npt.NDArray[np.uint64]


@dataclasses.dataclass(eq=False)
class RowSample(Observer):
    """float32 [min(rows, count), channels]: the rows with the ``count`` smallest keys, smallest first.

    The key of a row is a hash of the seed and of its position in the stream: a bottom-k sample (Cohen and Kaplan 2007),
    uniform without replacement. Values with equally many rows therefore sample the same tokens. Merging keeps the
    smallest keys of both, bit-exactly in any order, and equals the sample of the whole where each shard was given its
    position in the whole as ``start``. Shards that do not know it take different seeds; merged, they are uniform too.
    """

    axes: ClassVar[tuple[int | None, ...]] = (None, -1)

    count: int = 512
    start: int = 0
    sample: Rows = dataclasses.field(init=False, repr=False)
    keys: Keys = dataclasses.field(init=False, repr=False)
    origin: Samples = dataclasses.field(init=False, repr=False)
    spans: list[tuple[int, int, int]] = dataclasses.field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.count < 1 or self.start < 0:
            raise OptionError(f"rows needs count >= 1 and start >= 0, not count={self.count}, start={self.start}.")

    def _observe(self, rows: Rows, samples: Samples) -> None:
        keys = position_keys(self.seed, self._advance(len(rows)), len(rows))
        full = self.seen >= self.count
        chosen = np.flatnonzero(keys < self.keys[-1]) if full else np.arange(len(rows))
        if len(chosen) > self.count:
            chosen = chosen[np.argpartition(keys[chosen], self.count)[: self.count]]
        if len(chosen):
            self._keep(rows[chosen], keys[chosen], samples[chosen])

    def _advance(self, number: int) -> int:
        """The position of the next row, behind all that were seen with this seed; ``number`` positions are taken."""
        begin = max((stop for seed, _, stop in self.spans if seed == self.seed), default=self.start)
        first = self.spans.pop()[1] if self.spans and self.spans[-1][::2] == (self.seed, begin) else begin
        self.spans.append((self.seed, first, begin + number))
        return begin

    def _merge(self, other: Self) -> None:
        for seed, start, stop in other.spans:
            if any(s == seed and start < b and a < stop for s, a, b in self.spans):
                raise OptionError("row samples of shards at the same positions: give each its own seed or its start.")
        self._keep(other.sample, other.keys, other.origin)
        self.spans += other.spans

    def _keep(self, rows: Rows, keys: Keys, origin: Samples) -> None:
        if self.seen:
            rows = np.concatenate([self.sample, rows])
            keys, origin = np.concatenate([self.keys, keys]), np.concatenate([self.origin, origin])
        order = np.argsort(keys, kind="stable")[: self.count]
        self.sample, self.keys, self.origin = rows[order], keys[order], origin[order]

    def _options(self) -> tuple[object, ...]:
        return (self.axis, self.count)

    def _result(self) -> Any:
        return self.sample


def position_keys(seed: int, begin: int, number: int) -> Keys:
    """uint64 [number] keys of positions begin, begin + 1, …: SplitMix64 (Steele et al. 2014), a counter-based hash."""
    with np.errstate(over="ignore"):
        state = _mix(np.array([seed % 2**64], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        positions = np.arange(begin + 1, begin + 1 + number, dtype=np.uint64)
        return _mix(state + positions * np.uint64(0x9E3779B97F4A7C15))


def _mix(z: Keys) -> Keys:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
