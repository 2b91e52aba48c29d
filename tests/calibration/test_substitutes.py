"""Copies of token samples: other tokens, the same masks, the same marks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from qcompiler.calibration.substitutes import substituted, token_input, tokens_in, training_batches
from tests.graph.tiny import tiny

MODEL = tiny(
    """g (int64[B,S] ids, int64[B,S] kinds, int64[B,S] attention_mask) => (float[B,S,4] y) {
    a = Gather(table, ids)  b = Gather(types, kinds)  y = Add(a, b)
}""",
    {"table": (1000, 4), "types": (2, 4)},
)


def batch(seed: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(300, 900, (8, 20))
    ids[:, 0], ids[:, 12] = 101, 102
    mask = np.ones_like(ids)
    mask[:, 13:] = ids[:, 13:] = 0
    return {"ids": ids, "kinds": np.zeros_like(ids), "attention_mask": mask}


def test_only_tokens_change_that_are_neither_marks_nor_padding() -> None:
    data = [batch(0), batch(1)]
    copies = list(substituted(MODEL, data, 3, seed=0))
    assert len(copies) == 6
    for copy, source in zip(copies, data * 3, strict=True):
        np.testing.assert_array_equal(copy["ids"][:, [0, *range(12, 20)]], source["ids"][:, [0, *range(12, 20)]])
        assert (copy["ids"][:, 1:12] != source["ids"][:, 1:12]).mean() > 0.9
        assert copy["ids"].min() >= 0
        assert copy["ids"].max() < 1000
        np.testing.assert_array_equal(copy["attention_mask"], source["attention_mask"])
        np.testing.assert_array_equal(copy["kinds"], source["kinds"])
    assert (copies[0]["ids"] != copies[2]["ids"]).any()
    again = list(substituted(MODEL, data, 3, seed=0))
    for first, second in zip(copies, again, strict=True):
        np.testing.assert_array_equal(first["ids"], second["ids"])


def test_frequent_tokens_are_replaced_too_and_by_frequent_ones() -> None:
    """Only what every sample holds is a mark; the words of this text begin at 300."""
    data = [batch(0), batch(1)]
    data[0]["ids"][1:, 5] = data[1]["ids"][:, 5] = 300
    copies = np.concatenate([copy["ids"][:, 1:12].ravel() for copy in substituted(MODEL, data, 50, seed=0)])
    counts = np.bincount(copies, minlength=1000)
    assert counts[300:350].sum() > 1.5 * counts[950:1000].sum()
    replaced = next(substituted(MODEL, data, 1, seed=0))
    assert (replaced["ids"][1:, 5] != 300).any()


def test_training_batches_are_real_in_part_and_never_end() -> None:
    data = [batch(0), batch(1)]

    def real(feeds: Mapping[str, np.ndarray]) -> bool:
        return any(np.array_equal(feeds["ids"], source["ids"]) for source in data)

    drawn = list(itertools.islice(training_batches(MODEL, data, 0.25, seed=0), 200))
    assert 30 <= sum(map(real, drawn)) <= 70
    changed = np.concatenate([(d["ids"] != s["ids"])[:, 1:12].mean(1) for d in drawn for s in data if not real(d)])
    assert len(np.unique(changed)) > 5  # some samples keep a part of their tokens
    again = itertools.islice(training_batches(MODEL, data, 0.25, seed=0), 200)
    assert all(np.array_equal(a["ids"], b["ids"]) for a, b in zip(drawn, again, strict=True))
    assert all(map(real, itertools.islice(training_batches(MODEL, data, 1.0, seed=0), 20)))


def test_models_without_tokens_have_none() -> None:
    model = tiny("g (float[B,S,4] x) => (float[B,S,4] y) { y = Relu(x) }", {})
    data = [{"x": np.ones((2, 3, 4), np.float32)}]
    assert token_input(model, data) is None
    assert list(substituted(model, data, 3, seed=0)) == []
    assert list(substituted(MODEL, [], 3, seed=0)) == []
    assert next(training_batches(model, data, 0.0, seed=0)) is data[0]


def test_tokens_are_counted_without_padding() -> None:
    assert tokens_in([batch(0), batch(1)]) == 2 * 8 * 13
    assert tokens_in([{"x": np.ones((2, 3, 4))}]) == 6
