"""More samples where there are few: the calibration samples with other tokens in their places.

A few thousand rows leave many directions of a Linear's input unseen, and a method that takes from the unseen to serve
the seen fails on other data. Any tokens show what a layer's inputs look like in general, and they cost nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.collect import MASK
from qcompiler.graph.run import Feeds
from qcompiler.graph.tables import rows_indexed

_LEAST = 256  # rows of a vocabulary; tables of token types and of small enumerations have fewer


def token_input(model: ir.Model, batches: Sequence[Feeds]) -> tuple[str, int] | None:
    """The input that holds token ids, and how many ids there are; None where no input indexes a table."""
    tables = {
        name: rows_indexed(name, model)
        for name, array in (batches[0] if batches else {}).items()
        if np.issubdtype(np.asarray(array).dtype, np.integer) and np.ndim(array) == 2
    }
    name = max(tables, key=lambda key: tables[key], default=None)
    return (name, tables[name]) if name is not None and tables[name] >= _LEAST else None


def substituted(model: ir.Model, batches: Iterable[Feeds], copies: int, seed: int) -> Iterator[Feeds]:
    """``copies`` of the batches with random tokens; the masks, and tokens that most samples hold ([CLS], BOS), stay.

    Nothing comes out where the model takes no token ids.
    """
    kept = list(batches)
    found = token_input(model, kept)
    if found is None:
        return
    name, size = found
    common = _common([np.asarray(feeds[name]) for feeds in kept])
    rng = np.random.default_rng(seed)
    for _ in range(copies):
        for feeds in kept:
            ids = np.asarray(feeds[name])
            stays = np.isin(ids, common) | (np.asarray(feeds.get(MASK, np.ones_like(ids))) == 0)
            yield {**feeds, name: np.where(stays, ids, rng.integers(0, size, ids.shape)).astype(ids.dtype)}


def _common(arrays: Sequence[npt.NDArray[np.integer]]) -> npt.NDArray[np.int64]:
    """Tokens that more than half of all samples hold."""
    samples = [row for array in arrays for row in array]
    counts = Counter(token for row in samples for token in np.unique(row).tolist())
    return np.array([token for token, count in counts.items() if 2 * count > len(samples)], np.int64)


def tokens_in(batches: Iterable[Feeds]) -> int:
    """Tokens of the data that are no padding; rows of its first input where it has no mask."""
    return sum(
        int(np.count_nonzero(feeds[MASK])) if MASK in feeds else int(np.prod(np.shape(next(iter(feeds.values())))[:2]))
        for feeds in batches
    )
