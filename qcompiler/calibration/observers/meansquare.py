"""meansquare: the mean square of each channel: by it, an error of a weight of that input counts at the output."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.observers.base import Observer, Rows, Samples


@dataclasses.dataclass(eq=False)
class MeanSquare(Observer):
    """mean x² float64, a scalar or [channels]. Sums are float64: merges within rounding (1e-12) in any order."""

    total: npt.NDArray[np.float64] = dataclasses.field(init=False, repr=False)
    channels: int = dataclasses.field(default=0, init=False)

    def _observe(self, rows: Rows, samples: Samples) -> None:
        self.channels = rows.shape[1]
        squares = np.einsum("nk,nk->k", rows, rows, dtype=np.float64)
        self._add(np.asarray(squares.sum() if self.axis is None else squares))

    def _merge(self, other: Self) -> None:
        self._add(other.total)

    def _add(self, total: npt.NDArray[np.float64]) -> None:
        self.total = self.total + total if self.seen else total

    def _result(self) -> Any:
        return np.asarray(self.total / (self.seen * (self.channels if self.axis is None else 1)))
