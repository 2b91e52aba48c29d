"""minmax: the smallest and the largest number."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.observers.base import Observer, Rows, Samples
from qcompiler.core import OptionError


@dataclasses.dataclass(eq=False)
class MinMax(Observer):
    """(min, max) float32, scalars or [channels]. Merges bit-exactly in any order.

    ``margin`` multiplies both, to leave room for what calibration did not see (above 1) or to saturate (below).
    """

    margin: float = 1.0
    low: npt.NDArray[np.float32] = dataclasses.field(init=False, repr=False)
    high: npt.NDArray[np.float32] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.margin < np.inf:
            raise OptionError(f"the margin of a range must be positive, not {self.margin}.")

    def _observe(self, rows: Rows, samples: Samples) -> None:
        self._widen(*extremes(rows, self.axis))

    def _merge(self, other: Self) -> None:
        self._widen(other.low, other.high)

    def _widen(self, low: npt.NDArray[np.float32], high: npt.NDArray[np.float32]) -> None:
        self.low = np.minimum(self.low, low) if self.seen else low
        self.high = np.maximum(self.high, high) if self.seen else high

    def _result(self) -> tuple[Any, Any]:
        margin = np.float32(self.margin)
        return self.low * margin, self.high * margin


def extremes(rows: Rows, axis: int | None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """min and max of [rows, channels]: of each channel (axis -1), or of all (axis None)."""
    over = None if axis is None else 0
    return np.asarray(rows.min(over)), np.asarray(rows.max(over))
