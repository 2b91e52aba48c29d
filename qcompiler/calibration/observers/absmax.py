"""absmax: the largest magnitude, of each channel for SmoothQuant (Xiao et al. 2023, equation 4)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qcompiler.calibration.observers.minmax import MinMax


@dataclasses.dataclass(eq=False)
class AbsMax(MinMax):
    """max|x| float32, a scalar or [channels], times ``margin``. Merges bit-exactly in any order."""

    def _result(self) -> Any:
        low, high = super()._result()
        return np.maximum(np.abs(low), np.abs(high))
