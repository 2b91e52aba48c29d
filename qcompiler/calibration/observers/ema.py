"""ema: exponential moving average of each step's min and max (Jacob et al. 2018, section 3.1)."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.observers.base import Observer, Rows, Samples
from qcompiler.calibration.observers.minmax import extremes
from qcompiler.core import OptionError


@dataclasses.dataclass(eq=False)
class Ema(Observer):
    """(min, max) m_n = momentum · m_(n-1) + (1 - momentum) · x_n over steps (batches), with m_1 = x_1; float32.

    Kept as m_n = momentum^n · x_1 + d_n with d_n the decayed sum of all steps, the first included: then the steps of a
    shard act on what came before as one affine map, and merging composes the maps. Merging is ordered (this shard, then
    the other) and equals observing both in that order within float64 rounding.
    """

    momentum: float = 0.9
    first: npt.NDArray[np.float64] = dataclasses.field(init=False, repr=False)
    decayed: npt.NDArray[np.float64] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise OptionError(f"ema needs 0 <= momentum < 1, not {self.momentum}.")

    def _observe(self, rows: Rows, samples: Samples) -> None:
        step = np.stack(extremes(rows, self.axis)).astype(np.float64)
        if not self.steps:
            self.first, self.decayed = step, np.zeros_like(step)
        self.decayed = self.momentum * self.decayed + (1 - self.momentum) * step

    def _merge(self, other: Self) -> None:
        self.decayed = self.momentum**other.steps * self.decayed + other.decayed

    def _result(self) -> tuple[Any, Any]:
        low, high = (self.momentum**self.steps * self.first + self.decayed).astype(np.float32)
        return low, high
