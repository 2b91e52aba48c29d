"""Batches: calibration data as model inputs, readable as often as passes need it, never all in memory at once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.core import DataError
from qcompiler.frontends.inputs import Inputs
from qcompiler.frontends.source import Scratch

Feeds = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Batches:
    """A re-iterable of feeds (input name → array), each checked against the model's inputs.

    Attributes:
        samples: how many samples one iteration yields (rows of axis 0, summed over batches).
        count: how many batches.
    """

    samples: int
    count: int
    _open: Callable[[], Iterator[Feeds]] = dataclasses.field(repr=False)

    def __iter__(self) -> Iterator[Feeds]:
        return self._open()

    def __len__(self) -> int:
        return self.count


def from_sequence(items: list[Any] | tuple[Any, ...], inputs: Inputs, limit: int | None) -> Batches:
    """Batches that the caller holds in memory; all are checked now and converted again at each iteration."""

    def read() -> Iterator[Feeds]:
        return _limited((inputs.fit(item, f"batch {i}") for i, item in enumerate(items)), limit)

    return _counted(read)


def from_stream(items: Iterable[Any], inputs: Inputs, limit: int | None) -> Batches:
    """Batches of a generator or DataLoader, which may yield once only or differently each time: spooled to disk."""
    scratch = Scratch()
    samples = count = 0
    for feeds in _limited((inputs.fit(item, f"batch {i}") for i, item in enumerate(items)), limit):
        np.savez(scratch.path / f"{count}.npz", allow_pickle=False, **_by_position(feeds))
        names = list(feeds)
        samples += _rows(feeds)
        count += 1
    if not count:
        raise DataError("the calibration data is empty.")

    def read() -> Iterator[Feeds]:
        for i in range(count):
            with np.load(scratch.path / f"{i}.npz") as file:
                yield {name: file[str(k)] for k, name in enumerate(names)}

    return Batches(samples, count, read)


def from_reader(read: Callable[[], Generator[Any, None, None]], inputs: Inputs, limit: int | None = None) -> Batches:
    """Batches that ``read()`` makes anew at each call; the first pass, which counts and checks them, is made now."""

    def fitted() -> Iterator[Feeds]:
        with contextlib.closing(read()) as items:  # a file that it reads is closed too where a batch is refused
            for i, item in enumerate(items):
                yield inputs.fit(item, f"batch {i}")

    return _counted(lambda: _limited(fitted(), limit))


def _counted(read: Callable[[], Iterator[Feeds]]) -> Batches:
    samples = count = 0
    for feeds in read():
        samples += _rows(feeds)
        count += 1
    if not count:
        raise DataError("the calibration data is empty.")
    return Batches(samples, count, read)


def _limited(batches: Iterable[Feeds], limit: int | None) -> Iterator[Feeds]:
    """The first ``limit`` samples; the batch that crosses the limit is cut where all its arrays share axis 0."""
    left = limit
    for feeds in batches:
        rows = _rows(feeds)
        if left is not None and rows > left and all(array.ndim and len(array) == rows for array in feeds.values()):
            feeds, rows = {name: array[:left] for name, array in feeds.items()}, left
        yield feeds
        if left is not None:
            left -= rows
            if left <= 0:
                return


def _rows(feeds: Feeds) -> int:
    first = next(iter(feeds.values()))
    return len(first) if first.ndim else 1


def _by_position(feeds: Feeds) -> Feeds:
    """Input names may hold characters that a file name or a keyword must not."""
    return {str(k): array for k, array in enumerate(feeds.values())}
