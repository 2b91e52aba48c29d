"""folds: what a search needs to be judged on data that it did not see (cross-validation)."""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.observers.base import Rows, Samples
from qcompiler.calibration.observers.rows import RowSample
from qcompiler.core import OptionError

Extremes = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, eq=False)
class FoldSample:
    """Samples are dealt to folds by their number, sample i to fold i mod F; folds that no row fell into are left out.

    Attributes:
        rows: float32 [n, channels], a row sample of all folds.
        fold: int64 [n], the fold of each row.
        low, high: float32 [folds, channels], the exact extremes of each fold.
    """

    rows: Rows
    fold: npt.NDArray[np.int64]
    low: Extremes
    high: Extremes


@dataclasses.dataclass(eq=False)
class Folds(RowSample):
    """A :class:`FoldSample`: a RowSample, and the extremes of each channel in each fold. Merges as RowSample does."""

    folds: int = 4
    lows: Extremes = dataclasses.field(init=False, repr=False)
    highs: Extremes = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds < 1:
            raise OptionError(f"folds needs at least one fold, not {self.folds}.")

    def _observe(self, rows: Rows, samples: Samples) -> None:
        super()._observe(rows, samples)
        if not self.seen:
            self.lows = np.full((self.folds, rows.shape[1]), np.inf, np.float32)
            self.highs = -self.lows
        fold = samples % self.folds
        # Rows of a sample lie together, so there are few runs of one fold, and no row is copied.
        edges = np.flatnonzero(np.diff(fold, prepend=-1))
        for start, stop in zip(edges, [*edges[1:], len(fold)], strict=True):
            f, part = fold[start], rows[start:stop]
            self.lows[f] = np.minimum(self.lows[f], part.min(0))
            self.highs[f] = np.maximum(self.highs[f], part.max(0))

    def _merge(self, other: Self) -> None:
        super()._merge(other)
        self.lows = np.minimum(self.lows, other.lows)
        self.highs = np.maximum(self.highs, other.highs)

    def _options(self) -> tuple[object, ...]:
        return (*super()._options(), self.folds)

    def _result(self) -> FoldSample:
        filled = np.flatnonzero((self.lows <= self.highs).all(axis=1))
        place = np.full(self.folds, -1)
        place[filled] = np.arange(len(filled))
        return FoldSample(self.sample, place[self.origin % self.folds], self.lows[filled], self.highs[filled])
