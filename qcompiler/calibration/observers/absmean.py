"""absmean: the mean magnitude, of each channel for AWQ (Lin et al. 2024, section 3.2)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.observers.base import Rows
from qcompiler.calibration.observers.mean import Mean


@dataclasses.dataclass(eq=False)
class AbsMean(Mean):
    """mean|x| float32, a scalar or [channels]."""

    def _sum(self, rows: Rows) -> npt.ArrayLike:
        return np.abs(rows).sum(None if self.axis is None else 0, dtype=np.float64)

    def _result(self) -> Any:
        return np.asarray(super()._result(), np.float32)
