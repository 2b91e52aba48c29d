"""Zipf's law of token ids, from a few of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.numerics.zipf import zipf

SIZE = 5000


def text(start: int, words: int, seed: int = 0) -> np.ndarray:
    """Tokens of a text whose words begin at ``start``, each as frequent as Zipf's law says."""
    law = 1 / (np.arange(SIZE - start) + 10)
    return start + np.random.default_rng(seed).choice(SIZE - start, words, p=law / law.sum())


@settings(max_examples=20)
@given(st.integers(1, 3000), st.integers(0, 9))
def test_the_words_begin_where_the_text_says(start: int, seed: int) -> None:
    likely = zipf(text(start, 1500, seed), SIZE)
    found = int(np.argmax(likely))
    assert start <= found <= start + 20
    assert np.all(likely > 0)
    np.testing.assert_allclose(likely.sum(), 1, rtol=1e-4)
    assert np.all(np.diff(likely[found:]) < 0)


def test_frequent_marks_do_not_move_the_beginning() -> None:
    words = text(2000, 1500)
    marks = np.repeat([7, 12], 500)
    assert np.argmax(zipf(np.concatenate([words, marks]), SIZE)) >= 2000


def test_without_tokens_they_begin_at_zero() -> None:
    assert np.argmax(zipf(np.array([], np.int64), SIZE)) == 0
