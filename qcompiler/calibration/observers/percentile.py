"""percentile: the range that holds a share of all numbers (McKinstry et al. 2018; Wu et al. 2020, section 3.2)."""

from __future__ import annotations

import dataclasses

from qcompiler.calibration.observers.counted import Counted
from qcompiler.core import OptionError


@dataclasses.dataclass(eq=False)
class Percentile(Counted):
    """(min, max) that hold ``percent`` % of the numbers; half of the rest lies beyond each end."""

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise OptionError(f"percentile needs 0 < percent <= 100, not {self.percent}.")

    def _result(self) -> tuple[float, float]:
        tail = (100 - self.percent) / 200
        return self.histogram.quantile(tail), self.histogram.quantile(1 - tail)
