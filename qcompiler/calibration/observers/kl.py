"""kl: the range of least information loss, TensorRT's entropy calibration."""

from __future__ import annotations

import dataclasses

from qcompiler.calibration.observers.counted import Counted, check_bits
from qcompiler.numerics.kl import kl_range


@dataclasses.dataclass(eq=False)
class KL(Counted):
    """(min, max) that minimise the Kullback-Leibler divergence of the quantized distribution."""

    bits: int = 8
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_bits("kl", self.bits)

    def _result(self) -> tuple[float, float]:
        return kl_range(self.histogram, self.bits, self.symmetric)
