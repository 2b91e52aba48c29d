"""More samples where there are few: the calibration samples with other tokens in their places.

A few thousand rows leave many directions of a Linear's input unseen, and a method that takes from the unseen to serve
the seen fails on other data. Any tokens show what a layer's inputs look like in general, and they cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.collect import MASK
from qcompiler.graph.run import Feeds
from qcompiler.graph.tables import rows_indexed
from qcompiler.numerics.zipf import zipf

_ROWS_PER_INPUT = 8
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
    """``copies`` of the batches with other tokens; the masks, and tokens that all samples hold ([CLS], BOS), stay.

    Nothing comes out where the model takes no token ids.
    """
    kept = list(batches)
    found = token_input(model, kept)
    if found is not None:
        tokens = _Tokens(kept, *found)
        rng = np.random.default_rng(seed)
        yield from (tokens.replaced(feeds, rng, 1.0) for _ in range(copies) for feeds in kept)


def training_batches(model: ir.Model, batches: Sequence[Feeds], real: float, seed: int) -> Iterator[Feeds]:
    """Batches without end, drawn at random: a share ``real`` of them as they are, the others with tokens replaced.

    Of the others' samples half have all of their tokens replaced, half a part of them. All batches come as they are
    where the model takes no token ids.
    """
    rng = np.random.default_rng(seed)
    found = token_input(model, batches)
    tokens = _Tokens(batches, *found) if found is not None else None
    while True:
        feeds = batches[int(rng.integers(len(batches)))]
        if tokens is None or rng.random() < real:
            yield feeds
        else:
            yield tokens.replaced(feeds, rng, np.minimum(1, rng.uniform(0, 2, (len(feeds[tokens.name]), 1))))


class _Tokens:
    """The token ids of some batches, and others in their places.

    Vocabularies ascend from frequent to rare words (WordPiece's lists, the merges of BPE), so tokens are drawn by
    Zipf's law: most of any text is function words, and the calibration samples may hold few of them.
    """

    def __init__(self, batches: Sequence[Feeds], name: str, size: int) -> None:
        self.name = name
        ids = [np.asarray(feeds[name]) for feeds in batches]
        self._stays = _in_all(ids)
        self._likely = zipf(np.setdiff1d(np.concatenate([array.reshape(-1) for array in ids]), self._stays), size)

    def replaced(self, feeds: Feeds, rng: np.random.Generator, share: float | npt.NDArray[np.float64]) -> Feeds:
        """The batch with that share of its tokens replaced; ``share`` may be [samples, 1]."""
        ids = np.asarray(feeds[self.name])
        stays = np.isin(ids, self._stays) | (np.asarray(feeds.get(MASK, np.ones_like(ids))) == 0)
        stays |= rng.random(ids.shape) >= share
        others = rng.choice(len(self._likely), ids.shape, p=self._likely)
        return {**feeds, self.name: np.where(stays, ids, others).astype(ids.dtype)}


def _in_all(arrays: Sequence[npt.NDArray[np.integer]]) -> npt.NDArray[np.int64]:
    """Tokens that every sample holds."""
    held = [set(np.unique(row).tolist()) for array in arrays for row in array]
    return np.array(sorted(set.intersection(*held)) if held else [], np.int64)


def few(batches: Iterable[Feeds], inputs: int) -> bool:
    """Whether the data leaves directions of a Linear's ``inputs`` unseen that other data will show."""
    return tokens_in(batches) < _ROWS_PER_INPUT * inputs


def tokens_in(batches: Iterable[Feeds]) -> int:
    """Tokens of the data that are no padding; rows of its first input where it has no mask."""
    return sum(
        int(np.count_nonzero(feeds[MASK])) if MASK in feeds else int(np.prod(np.shape(next(iter(feeds.values())))[:2]))
        for feeds in batches
    )
