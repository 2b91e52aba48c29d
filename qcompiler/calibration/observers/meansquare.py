"""meansquare: the mean square of each channel: by it, an error of a weight of that input counts at the output."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.observers.base import Rows
from qcompiler.calibration.observers.mean import Mean


@dataclasses.dataclass(eq=False)
class MeanSquare(Mean):
    """mean x² float64, a scalar or [channels]."""

    def _sum(self, rows: Rows) -> npt.ArrayLike:
        squares = np.einsum("nk,nk->k", rows, rows, dtype=np.float64)
        return squares.sum() if self.axis is None else squares
