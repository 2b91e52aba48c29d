"""Text to token ids: a sample a line for encoders, windows of a running text for causal language models."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from qcompiler.core import DataError
from qcompiler.frontends.batches import Batches, from_reader
from qcompiler.frontends.inputs import Inputs
from qcompiler.frontends.source import Source

SEQ_LEN = {"encoder": 128, "causal-lm": 512}
"""Tokens in a sample at most (encoder) or exactly (causal LM), where the caller does not say."""

_POSITIONS = ("max_position_embeddings", "n_positions")
_MARGIN = 64  # tokens before a cut through running text that the cut may have changed
_CHARACTERS = 8  # of text for a token, as a first guess


def from_text(
    data: Path | Sequence[str],
    source: Source,
    inputs: Inputs,
    *,
    limit: int | None,
    seq_len: int | None,
    batch_size: int,
) -> Batches:
    """Tokenize a file or a list of texts with the model's ``tokenizer.json``.

    An encoder takes every non-empty line as a sample, with special tokens, cut after ``seq_len`` tokens; a batch is
    padded to its longest sample, with ``attention_mask`` 0 there. A causal LM takes the whole text as it is, spaces and
    newlines included (list items are joined by newlines), behind the tokenizer's leading special tokens if it has any,
    and cuts it into windows of exactly ``seq_len`` tokens; a shorter rest is dropped, unless it is all there is.

    Raises:
        DataError: no tokenizer, a model without ``input_ids``, no text, or a file that is not UTF-8.
    """
    if "input_ids" not in inputs:
        raise DataError(
            f"text cannot be fed to {source.name}, which has no input 'input_ids' but {', '.join(inputs.by_name)}."
        )
    if source.tokenizer is None:
        raise DataError(f"text needs a tokenizer, and there is no tokenizer.json beside {source.name}: pass token ids.")
    tokenizer = Tokenizer.from_file(str(source.tokenizer))
    padding = tokenizer.padding or {}
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = _config(source)
    length = _length(source, config, inputs, seq_len)
    if source.kind == "causal-lm":
        samples = _windows(tokenizer, _whole_text(data), length, limit)
    else:
        tokenizer.enable_truncation(length)
        samples = _lines(tokenizer, data, limit)
    if not samples:
        raise DataError(f"there is no text in {data if isinstance(data, Path) else 'the list of texts'}.")
    pad = padding.get("pad_id", config.get("pad_token_id")) or 0
    width = inputs.fixed("input_ids", 1)
    size = inputs.fixed("input_ids", 0) or batch_size
    if inputs.fixed("input_ids", 0) is not None:
        samples = samples[: len(samples) // size * size]
        if not samples:
            raise DataError(f"the model's batch is fixed to {size} samples, and the text has fewer.")
    return from_reader(lambda: _padded(samples, size, pad, width, inputs), inputs)


Sample = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]  # ids and token types of one sample


def _lines(tokenizer: Any, data: Path | Sequence[str], limit: int | None) -> list[Sample]:
    samples: list[Sample] = []
    for line in _read_lines(data) if isinstance(data, Path) else data:
        if line.strip():
            encoding = tokenizer.encode(line.strip())
            samples.append((np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int32)))
            if limit is not None and len(samples) == limit:
                break
    return samples


def _windows(tokenizer: Any, text: str, length: int, limit: int | None) -> list[Sample]:
    probe = tokenizer.encode("a")
    leading = probe.special_tokens_mask.index(0) if 0 in probe.special_tokens_mask else 0
    ids = probe.ids[:leading] + _tokens(tokenizer, text, None if limit is None else limit * length)
    if len(ids) == leading:
        return []
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:limit]
    arrays = (np.array(window, np.int32) for window in windows or [ids])
    return [(array, np.zeros_like(array)) for array in arrays]


def _tokens(tokenizer: Any, text: str, need: int | None) -> list[int]:
    """The first ``need`` tokens of the text, without tokenizing a long rest of it."""
    size = len(text) if need is None else (need + _MARGIN) * _CHARACTERS
    while True:
        ids: list[int] = tokenizer.encode(text[:size], add_special_tokens=False).ids
        if size >= len(text) or need is None:
            return ids
        if len(ids) >= need + _MARGIN:
            return ids[:need]
        size *= 2


def _padded(
    samples: Sequence[Sample], batch_size: int, pad: int, width: int | None, inputs: Inputs
) -> Generator[dict[str, npt.NDArray[np.int64]], None, None]:
    for start in range(0, len(samples), batch_size):
        rows = samples[start : start + batch_size]
        shape = len(rows), width or max(len(ids) for ids, _ in rows)
        feeds = {
            "input_ids": np.full(shape, pad, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
            "token_type_ids": np.zeros(shape, np.int64),
        }
        for i, (ids, types) in enumerate(rows):
            feeds["input_ids"][i, : len(ids)] = ids
            feeds["attention_mask"][i, : len(ids)] = 1
            feeds["token_type_ids"][i, : len(ids)] = types
        yield {name: array for name, array in feeds.items() if name in inputs}


def _length(source: Source, config: dict[str, Any], inputs: Inputs, seq_len: int | None) -> int:
    if seq_len is not None and seq_len < 1:
        raise DataError(f"seq_len is {seq_len}, but a sample has at least one token.")
    bounds = [seq_len or SEQ_LEN.get(source.kind, SEQ_LEN["encoder"]), inputs.fixed("input_ids", 1)]
    bounds += [config.get(key) for key in _POSITIONS]
    return min(bound for bound in bounds if isinstance(bound, int))


def _config(source: Source) -> dict[str, Any]:
    path = source.folder / "config.json" if source.folder is not None else None
    if path is None or not path.is_file():
        return {}
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _whole_text(data: Path | Sequence[str]) -> str:
    return "".join(_read_lines(data, keep=True)) if isinstance(data, Path) else "\n".join(data)


def _read_lines(path: Path, keep: bool = False) -> Iterable[str]:
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield line if keep else line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
