"""What an observer is: a running statistic of one value, in constant memory, that can be merged with another's."""

from __future__ import annotations

import abc
import copy
import dataclasses
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from qcompiler.core import DataError, OptionError

Rows = npt.NDArray[np.float32]
"""A batch of one value: float32 [rows, channels]."""

Samples = npt.NDArray[np.int64]
"""The sample (sentence, window, image) that each row comes from: int64 [rows], counted over all data."""


@dataclasses.dataclass(eq=False)
class Observer(abc.ABC):
    """A statistic over rows. The fields that ``__init__`` takes are the options of its spelling.

    ``merge`` makes of two observers of two shards what one observer of both shards would be, so that data can be
    observed in parts. How exactly is stated by each class.

    Attributes:
        axes: the axes it knows: None (one result for the tensor), -1 (one for each channel).
        axis: the one in use.
        seed: of random choices.
        seen: rows observed.
        steps: batches observed.
    """

    axes: ClassVar[tuple[int | None, ...]] = (None, -1)

    axis: int | None = dataclasses.field(default=None, init=False)
    seed: int = dataclasses.field(default=0, init=False)
    seen: int = dataclasses.field(default=0, init=False)
    steps: int = dataclasses.field(default=0, init=False)

    def update(self, x: npt.NDArray[Any], samples: Samples | None = None) -> None:
        """Observe a batch [rows, channels]; one without rows changes nothing.

        ``samples`` [rows] says which sample each row comes from; without it every batch is one sample.

        Raises:
            DataError: a number is NaN or infinite, in float32.
        """
        rows = as_rows(x)
        if (fault := not_finite(rows)) is not None:
            raise DataError(f"an observed value holds {fault}.")
        self.observe(rows, np.full(len(rows), self.steps, np.int64) if samples is None else samples)

    def observe(self, rows: Rows, samples: Samples) -> None:
        """As ``update``, of float32 [rows, channels] known to be finite: observers of one value share the check."""
        if rows.size:
            self._observe(rows, samples)
            self.seen += len(rows)
            self.steps += 1

    @abc.abstractmethod
    def _observe(self, rows: Rows, samples: Samples) -> None:
        """Take in a batch of at least one row."""

    def merge(self, other: Self) -> Self:
        """A new observer of this shard followed by the other's; both stay as they are.

        Raises:
            OptionError: the two have different options.
        """
        if type(self) is not type(other) or self._options() != other._options():
            raise OptionError(f"observers of different options cannot be merged: {self} and {other}.")
        first, second = (self, other) if self.seen else (other, self)
        merged = copy.deepcopy(first)
        if second.seen:
            merged._merge(second)
            merged.seen += second.seen
            merged.steps += second.steps
        return merged

    @abc.abstractmethod
    def _merge(self, other: Self) -> None:
        """Take in another observer's rows behind one's own; both have seen at least one row."""

    def result(self) -> Any:
        """The statistic.

        Raises:
            DataError: nothing was observed.
        """
        if not self.seen:
            raise DataError("there is nothing to observe: no rows of data, or padding only.")
        return self._result()

    @abc.abstractmethod
    def _result(self) -> Any:
        """The statistic of at least one row."""

    def _options(self) -> tuple[Any, ...]:
        options = (getattr(self, field.name) for field in dataclasses.fields(self) if field.init)
        return (self.axis, *options)


def as_rows(x: npt.NDArray[Any]) -> Rows:
    """Any array as float32 [rows, channels]: the last axis are the channels; copies only where it must."""
    with np.errstate(over="ignore"):  # what does not fit float32 becomes inf and is refused as such
        x = np.asarray(x, np.float32)
    return x.reshape(-1, x.shape[-1]) if x.ndim and x.shape[-1] else x.reshape(-1, 1)


def not_finite(rows: Rows) -> str | None:
    """ "NaN" or "inf" if there is any, else None; two passes of min and max, no temporary array."""
    if not rows.size:
        return None
    low, high = rows.min(), rows.max()
    if np.isnan(low):
        return "NaN"
    return None if np.isfinite(low) and np.isfinite(high) else "inf"
