"""moving: the mean over steps of each step's min and max (multi-step calibration)."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.observers.base import Observer, Rows
from qcompiler.calibration.observers.minmax import extremes


@dataclasses.dataclass(eq=False)
class Moving(Observer):
    """(min, max) averaged over steps (batches), all with one weight: a single outlier step moves it by 1/n; float32.

    Sums are float64: merges within rounding (1e-12) in any order.
    """

    steps: int = dataclasses.field(default=0, init=False)
    total: npt.NDArray[np.float64] = dataclasses.field(init=False, repr=False)

    def _observe(self, rows: Rows) -> None:
        self._add(np.stack(extremes(rows, self.axis)).astype(np.float64), 1)

    def _merge(self, other: Self) -> None:
        self._add(other.total, other.steps)

    def _add(self, total: npt.NDArray[np.float64], steps: int) -> None:
        self.total = self.total + total if self.steps else total
        self.steps += steps

    def _result(self) -> tuple[Any, Any]:
        low, high = (self.total / self.steps).astype(np.float32)
        return low, high
