"""The common part of observers that choose a clip range from a histogram."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, Self

from qcompiler.calibration.observers.base import Observer, Rows, Samples
from qcompiler.core import OptionError
from qcompiler.numerics.histogram import Histogram


@dataclasses.dataclass(eq=False)
class Counted(Observer, abc.ABC):
    """(min, max) of a clip range of the whole tensor. It merges bit-exactly in any order."""

    axes: ClassVar[tuple[int | None, ...]] = (None,)

    histogram: Histogram = dataclasses.field(default_factory=Histogram, init=False, repr=False)

    def _observe(self, rows: Rows, samples: Samples) -> None:
        self.histogram.add(rows)

    def _merge(self, other: Self) -> None:
        self.histogram.merge(other.histogram)

    @abc.abstractmethod
    def _result(self) -> tuple[float, float]: ...


def check_bits(name: str, bits: int) -> None:
    """Refuse bits outside 2 to 8.

    Raises:
        OptionError: they are.
    """
    if not 2 <= bits <= 8:
        raise OptionError(f"{name} needs bits between 2 and 8, not {bits}.")
