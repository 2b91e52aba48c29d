"""What the observers of a mean have in common: a sum in float64, merged by adding."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.observers.base import Observer, Rows, Samples


@dataclasses.dataclass(eq=False)
class Mean(Observer):
    """The mean over rows of what :meth:`_sum` adds up, float64; a scalar or [channels]. Sums are float64: merges within
    rounding (1e-12) in any order."""

    total: npt.NDArray[np.float64] = dataclasses.field(init=False, repr=False)
    channels: int = dataclasses.field(default=0, init=False)

    @abc.abstractmethod
    def _sum(self, rows: Rows) -> npt.ArrayLike:
        """Float64, of a batch's rows [channels], or of all its numbers where there is no axis."""

    def _observe(self, rows: Rows, samples: Samples) -> None:
        self.channels = rows.shape[1]
        self._add(np.asarray(self._sum(rows), np.float64))

    def _merge(self, other: Self) -> None:
        self._add(other.total)

    def _add(self, total: npt.NDArray[np.float64]) -> None:
        self.total = self.total + total if self.seen else total

    def _result(self) -> Any:
        return np.asarray(self.total / (self.seen * (self.channels if self.axis is None else 1)))
