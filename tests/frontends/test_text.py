"""Text: a line a sample for encoders, windows of running text for causal language models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qcompiler.core import DataError
from qcompiler.frontends import open_data
from qcompiler.frontends.text import _tokens
from tests.frontends import tiny

ENCODER = "int64[b, s] input_ids, int64[b, s] attention_mask, int64[b, s] token_type_ids"
CAUSAL = "int64[b, s] input_ids, int64[b, s] attention_mask"
LOGITS = "float[b, s, 12] logits"
CAT = [4, 5, 6]  # the cat sat


def test_encoder_takes_lines_padded_for_each_batch(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    file = tmp_path / "lines.txt"
    file.write_text("the cat sat\n\n  the cat sat on the mat  \n \nthe dog\n")
    batches = open_data(file, tiny.source(ENCODER, tmp_path), batch_size=2)
    assert (batches.samples, len(batches)) == (3, 2)
    first, second = batches
    assert first["input_ids"].tolist() == [[1, *CAT, 2, 0, 0, 0], [1, *CAT, 7, 4, 9, 2]]
    assert first["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 8]
    assert second["input_ids"].tolist() == [[1, 4, 10, 2]]
    assert list(first) == ["input_ids", "attention_mask", "token_type_ids"]
    assert not first["token_type_ids"].any()
    same = open_data(file.read_text().split("\n"), tiny.source(ENCODER, tmp_path), batch_size=2)
    assert all(np.array_equal(a[k], b[k]) for a, b in zip(batches, same, strict=True) for k in a)


def test_encoder_truncates_and_limits(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    batches = open_data(
        ["the cat sat on the mat"] * 5, tiny.source(ENCODER, tmp_path), limit=3, seq_len=4, batch_size=2
    )
    assert batches.samples == 3
    assert [batch["input_ids"].tolist() for batch in batches] == [[[1, 4, 5, 2]] * 2, [[1, 4, 5, 2]]]


def test_encoder_defaults_to_128_tokens_and_to_the_positions_there_are(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    (batch,) = open_data(["the " * 500], tiny.source(ENCODER, tmp_path))
    assert batch["input_ids"].shape == (1, 128)
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 32, "pad_token_id": 3}))
    (batch,) = open_data(["the " * 500], tiny.source(ENCODER, tmp_path))
    assert batch["input_ids"].shape == (1, 32)


def test_pad_id_comes_from_the_config_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path, pad=None)
    (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": 3}))
    (batch,) = open_data(["the cat", "the"], tiny.source(ENCODER, tmp_path))
    assert batch["input_ids"].tolist() == [[1, 4, 5, 2], [1, 4, 2, 3]]


def test_fixed_sequence_and_batch_of_the_model(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    source = tiny.source("int64[2, 6] input_ids", tmp_path)
    batches = open_data(["the cat", "the", "dog", "a", "mat"], source)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 6), (2, 6)]
    with pytest.raises(DataError, match="the model's batch is fixed to 2 samples, and the text has fewer"):
        open_data(["the cat"], source)


def test_causal_windows_of_running_text_behind_the_leading_token(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path, special="[CLS] $A")
    source = tiny.source(CAUSAL, tmp_path, outputs=LOGITS)
    assert source.kind == "causal-lm"
    file = tmp_path / "text.txt"
    file.write_text("the cat sat on\nthe mat\n\n a dog ran")
    batches = open_data(file, source, seq_len=3, batch_size=2)
    assert [batch["input_ids"].tolist() for batch in batches] == [[[1, 4, 5], [6, 7, 4]], [[9, 8, 10]]]  # ran is left
    assert all(batch["attention_mask"].all() for batch in batches)
    limited = open_data(file, source, seq_len=3, limit=2, batch_size=1)
    assert [batch["input_ids"].tolist() for batch in limited] == [[[1, 4, 5]], [[6, 7, 4]]]
    (short,) = open_data(["the cat"], source)
    assert short["input_ids"].tolist() == [[1, 4, 5]]


@given(st.text(alphabet=" \nabcé.", min_size=200, max_size=2000), st.integers(1, 60))
def test_a_part_of_the_text_gives_the_tokens_of_the_whole(text: str, need: int) -> None:
    tokenizer = Tokenizer(models.BPE(vocab=_bytes_and_merges()[0], merges=_bytes_and_merges()[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = tokenizer.encode(text).ids
    assert _tokens(tokenizer, text, need)[:need] == whole[:need]


def _bytes_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "a"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("b", "c")]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    return {symbol: i for i, symbol in enumerate(symbols)}, merges


def test_text_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no tokenizer\.json beside tiny"):
        open_data(["the cat"], tiny.source(ENCODER, tmp_path))
    tiny.write_tokenizer(tmp_path)
    source = tiny.source(ENCODER, tmp_path)
    (tmp_path / "binary.txt").write_bytes(b"the cat\n\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary\.txt is not UTF-8 text: invalid start byte at byte 8"):
        open_data(tmp_path / "binary.txt", source)
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"there is no text in .*blank\.txt"):
        open_data(tmp_path / "blank.txt", source)
    with pytest.raises(DataError, match="seq_len is 0"):
        open_data(["the cat"], source, seq_len=0)
    with pytest.raises(DataError, match="there is no text in the list of texts"):
        open_data([""], source)
