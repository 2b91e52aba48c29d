"""The text that comes with qcompiler, as inputs of models that read words, and of no others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from qcompiler.frontends.builtin import builtin_text, sentences
from qcompiler.frontends.source import Source
from tests.graph.tiny import tiny

WORDS = sorted({word for line in sentences() for word in line.lower().split()})


def source(folder: Path, vocabulary: list[str], inputs: str = "int64[B,S] input_ids", kind: str = "encoder") -> Source:
    table = {"[UNK]": 0, **{word: i for i, word in enumerate(vocabulary, start=1)}}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({}))
    first = inputs.split()[-1]
    model = tiny(f"g ({inputs}) => (float[B,S,4] y) {{ y = Gather(table, {first}) }}",
                 {"table": np.zeros((len(table), 4), np.float32)})  # fmt: skip
    return Source(model, "tiny", kind, "", folder)


def test_an_encoder_gets_a_sentence_a_sample(tmp_path: Path) -> None:
    batches = builtin_text(source(tmp_path, WORDS), batch_size=16)
    assert batches is not None
    assert batches.samples == len(sentences())
    assert {len(feeds["input_ids"]) for feeds in batches} == {16, len(sentences()) % 16}


def test_a_causal_lm_gets_windows(tmp_path: Path) -> None:
    batches = builtin_text(source(tmp_path, WORDS, kind="causal-lm"), seq_len=64, batch_size=1)
    assert batches is not None
    assert {feeds["input_ids"].shape for feeds in batches} == {(1, 64)}


@pytest.mark.parametrize("inputs", ["int64[B,S] ids", "int64[B,S] input_ids, float[B,S] weights"])
def test_models_that_take_other_things_get_nothing(tmp_path: Path, inputs: str) -> None:
    assert builtin_text(source(tmp_path, WORDS, inputs)) is None


def test_a_vocabulary_without_words_gets_nothing(tmp_path: Path) -> None:
    """Such as that of chemical formulas: all would be unknown."""
    assert builtin_text(source(tmp_path, ["C", "N", "(=O)"])) is None


def test_without_a_tokenizer_there_is_nothing(tmp_path: Path) -> None:
    given = source(tmp_path, WORDS)
    (tmp_path / "tokenizer.json").unlink()
    assert builtin_text(given) is None


def test_the_sentences_are_many_and_each_is_one_line() -> None:
    assert len(set(sentences())) == len(sentences()) > 200
    assert all(line == line.strip() and len(line) > 20 for line in sentences())
