"""mse: the range of least squared error."""

from __future__ import annotations

import dataclasses

from qcompiler.calibration.observers.counted import Counted, check_bits
from qcompiler.numerics.clipping import mse_range


@dataclasses.dataclass(eq=False)
class MSE(Counted):
    """(min, max) that minimise the mean squared error of uniform quantization."""

    bits: int = 8
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_bits("mse", self.bits)

    def _result(self) -> tuple[float, float]:
        return mse_range(self.histogram, self.bits, self.symmetric)
