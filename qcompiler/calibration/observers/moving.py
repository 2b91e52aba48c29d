"""moving: the mean over steps of each step's min and max (multi-step calibration)."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.observers.base import Observer, Rows, Samples
from qcompiler.calibration.observers.minmax import extremes


@dataclasses.dataclass(eq=False)
class Moving(Observer):
    """(min, max) averaged over steps (batches), all with one weight: a single outlier step moves it by 1/n; float32.

    Sums are float64: merges within rounding (1e-12) in any order.
    """

    total: npt.NDArray[np.float64] = dataclasses.field(init=False, repr=False)

    def _observe(self, rows: Rows, samples: Samples) -> None:
        self._add(np.stack(extremes(rows, self.axis)).astype(np.float64))

    def _merge(self, other: Self) -> None:
        self._add(other.total)

    def _add(self, total: npt.NDArray[np.float64]) -> None:
        self.total = self.total + total if self.steps else total

    def _result(self) -> tuple[Any, Any]:
        low, high = (self.total / self.steps).astype(np.float32)
        return low, high
