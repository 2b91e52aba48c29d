"""How likely each token of a vocabulary is, judged by a few tokens of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_OFFSETS = (1, 3, 10, 30, 100, 300, 1000, 3000)
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
    fits = {
        (start, offset): float(np.log(_law(size, start, offset)[seen]).sum())
        for start in seen.tolist()
        for offset in _OFFSETS
    }
    start = max(fits, key=lambda key: fits[key])[0] if fits else 0
    return _law(size, start, _MANDELBROT)


def _law(size: int, start: int, offset: int) -> npt.NDArray[np.float64]:
    law = np.zeros(size)
    law[start:] = 1 / (np.arange(size - start) + offset)
    return np.asarray((1 - _ANY) * law / law.sum() + _ANY / size)
