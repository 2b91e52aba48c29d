"""Samples that a search may not see, held back to check what it found."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qcompiler.core import DataError
from qcompiler.frontends.batches import Batches, Feeds
from qcompiler.frontends.inputs import Inputs

SHARE = 4
"""One sample in that many is held back."""
FEWEST = 16
"""Samples to be divided, at least: the spread of fewer than four says little."""


def hold_back(batches: Batches, inputs: Inputs, seed: int = 0) -> tuple[Batches, Batches]:
    """Divide data into what a search sees and what is held back (a quarter), drawn by the seed.

    Batches are divided by their samples; whole ones are dealt out where the model takes one size of batch only.

    Args:
        batches: the data.
        inputs: the model's.
        seed: of the draw.

    Raises:
        DataError: too few samples (or batches, where they cannot be divided).
    """
    whole = any(item.shape is None or item.shape[:1] != (None,) for item in inputs.all)
    whole = whole or any(len({array.shape[:1] for array in feeds.values()}) > 1 for feeds in batches)
    units = batches.count if whole else batches.samples
    if units < FEWEST:
        raise DataError(
            f"max_drop holds back one calibration {'batch' if whole else 'sample'} in {SHARE} to check the model on, "
            f"and needs {FEWEST} at least: there are {units}."
        )
    held = np.zeros(units, bool)
    held[np.random.default_rng(seed).permutation(units)[: units // SHARE]] = True
    return _chosen(batches, ~held, whole), _chosen(batches, held, whole)


def _chosen(batches: Batches, keep: npt.NDArray[np.bool_], whole: bool) -> Batches:
    def read() -> Iterator[Feeds]:
        first = 0
        for feeds in batches:
            count = 1 if whole else _samples(feeds)
            kept = keep[first : first + count]
            first += count
            if kept.all():
                yield feeds
            elif kept.any():
                yield {name: array[kept] for name, array in feeds.items()}

    samples = count = 0
    for feeds in read():
        samples += _samples(feeds)
        count += 1
    return Batches(samples, count, read)


def _samples(feeds: Feeds) -> int:
    first = next(iter(feeds.values()))
    return len(first) if first.ndim else 1
