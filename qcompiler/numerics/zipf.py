"""How likely each token of a vocabulary is, judged by a few tokens of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_OFFSETS = (1, 3, 10, 30, 100, 300, 1000, 3000)
_STARTS = 500  # of the least ids, one of which the words begin with
_ANY = 0.1  # share of tokens that lie anywhere in the vocabulary: single characters, marks, rare words
_MANDELBROT = 10  # the offset of word frequencies in a text


def zipf(ids: npt.ArrayLike, size: int) -> npt.NDArray[np.float64]:
    """Zipf's law of token ids that ascend from frequent to rare, float64 [size]: 0.9 / (id - start + 10), up to a
    factor, from ``start`` on, and a tenth spread over all ids.

    Vocabularies begin with marks and single characters. Where their words begin is what makes the *different* tokens of
    the text most likely: a law with an offset, for a frequent word counts once among them.

    Args:
        ids: tokens of a text, integers in [0, size).
        size: number of tokens in the vocabulary.
    """
    seen = np.unique(ids)
    starts = seen[:_STARTS]
    if not len(starts):
        return _likelihood(np.arange(size), size, np.array([0]), _MANDELBROT)[0]
    fits = [np.log(_likelihood(seen, size, starts, offset)).sum(1) for offset in _OFFSETS]
    start = starts[np.argmax(np.max(fits, axis=0))]
    return _likelihood(np.arange(size), size, np.array([start]), _MANDELBROT)[0]


def _likelihood(ids: Array, size: int, starts: Array, offset: int) -> npt.NDArray[np.float64]:
    """Of each id under the law of each start, float64 [starts, ids]."""
    totals = _harmonic(size - starts + offset - 1) - _harmonic(np.array([offset - 1]))
    rank = ids[None] - starts[:, None]
    law = np.where(rank < 0, 0, 1 / np.maximum(rank + offset, 1))
    return np.asarray((1 - _ANY) * law / totals[:, None] + _ANY / size)


def _harmonic(n: Array) -> npt.NDArray[np.float64]:
    """1 + 1/2 + ... + 1/n."""
    m = np.maximum(n, 1)
    series = np.euler_gamma + np.log(m) + 1 / (2 * m) - 1 / (12 * m**2) + 1 / (120 * m**4)
    return np.where(n > 0, series, 0.0)
