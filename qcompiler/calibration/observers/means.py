"""means: the mean of each channel in each fold of the samples, for bias correction (Nagel et al. 2019, section 4.2)."""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.observers.base import Observer, Rows, Samples
from qcompiler.core import OptionError

Sums = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class FoldMeans:
    """Samples are dealt to folds by their number, sample i to fold i mod F; folds that no row fell into are left out.

    Attributes:
        mean: float64 [folds, channels].
        rows: int64 [folds], how many rows each mean is of.
    """

    mean: Sums
    rows: npt.NDArray[np.int64]

    @property
    def overall(self) -> Sums:
        """The mean over all folds, float64 [channels]."""
        return np.asarray(self.rows @ self.mean / self.rows.sum())


@dataclasses.dataclass(eq=False)
class Means(Observer):
    """:class:`FoldMeans`. Sums are float64: merges within rounding (1e-12) in any order."""

    folds: int = 4
    total: Sums = dataclasses.field(init=False, repr=False)
    rows: npt.NDArray[np.int64] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.folds < 1:
            raise OptionError(f"means needs at least one fold, not {self.folds}.")

    def _observe(self, rows: Rows, samples: Samples) -> None:
        if not self.seen:
            self.total = np.zeros((self.folds, rows.shape[1]))
            self.rows = np.zeros(self.folds, np.int64)
        fold = samples % self.folds
        # Rows of a sample lie together, so there are few runs of one fold, and no row is copied.
        starts = np.flatnonzero(np.diff(fold, prepend=-1))
        np.add.at(self.total, fold[starts], np.add.reduceat(rows, starts, axis=0, dtype=np.float64))
        self.rows += np.bincount(fold, minlength=self.folds)

    def _merge(self, other: Self) -> None:
        self.total = self.total + other.total
        self.rows = self.rows + other.rows

    def _result(self) -> FoldMeans:
        filled = self.rows > 0
        return FoldMeans(self.total[filled] / self.rows[filled, None], self.rows[filled])
