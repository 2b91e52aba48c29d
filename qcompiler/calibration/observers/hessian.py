"""hessian: XᵀX of a Linear's input, the Hessian of its output error (Frantar et al. 2023, GPTQ, section 3)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.observers.base import Observer, Rows, Samples

_ROWS = 1024  # converted to float64 at a time


@dataclasses.dataclass(eq=False)
class Hessian(Observer):
    """float64 [channels, channels] 2/n · sum of xᵀx over n rows. Merges within 1e-12 relative in any order."""

    axes: ClassVar[tuple[int | None, ...]] = (None, -1)

    gram: npt.NDArray[np.float64] = dataclasses.field(init=False, repr=False)

    def _observe(self, rows: Rows, samples: Samples) -> None:
        if not self.seen:
            self.gram = np.zeros((rows.shape[1], rows.shape[1]))
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS].astype(np.float64)
            self.gram += part.T @ part

    def _merge(self, other: Self) -> None:
        self.gram = self.gram + other.gram

    def _result(self) -> npt.NDArray[np.float64]:
        return self.gram * (2 / self.seen)
