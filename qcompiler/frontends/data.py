"""Calibration and evaluation data of every kind, as :class:`Batches`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.core import DataError
from qcompiler.frontends import arrays, images, text
from qcompiler.frontends.batches import Batches, from_reader, from_sequence, from_stream
from qcompiler.frontends.inputs import Inputs
from qcompiler.frontends.source import Source

__all__ = ["Batches", "open_data"]

_TABLES = {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".npy", ".pt"}


def open_data(
    data: Any,
    source: Source,
    *,
    limit: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
) -> Batches:
    """Make model inputs of data.

    Args:
        data: an iterable of batches (each a dict by input name, a tuple in the order of the inputs, or one array or
            tensor; a torch DataLoader is one); a dict of arrays or an ``.npz`` (first axis: samples); a text file or a
            list of texts; a folder of images.
        source: the model.
        limit: how many samples to take at most.
        seq_len: tokens in a sample, for text; default 128 for an encoder, 512 for a causal LM.
        batch_size: samples in a batch, where the data is not in batches already; None: 1 for a causal LM, whose logits
            are large, else 8.

    Returns:
        Batches that can be iterated as often as needed. What can be read only once, or may differ the next time (a
        generator, a DataLoader), is spooled to a temporary folder.

    Raises:
        DataError: no data, or data that does not fit the model; the sentence names the input and what it should be.
    """
    if isinstance(data, Batches):
        return data
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}, but at least one sample is needed.")
    if batch_size is None:
        batch_size = 1 if source.kind == "causal-lm" else 8
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}, but a batch has at least one sample.")
    inputs = Inputs(source.model)
    size = next((item.batch for item in inputs.all if item.batch is not None), batch_size)
    if isinstance(data, str | os.PathLike):
        return _open_path(Path(data), source, inputs, limit, seq_len, size)
    if isinstance(data, np.ndarray) or hasattr(data, "detach"):
        if len(inputs.all) != 1 and "input_ids" not in inputs:
            raise DataError(f"one array cannot feed the {len(inputs.all)} inputs {', '.join(inputs.by_name)}.")
        data = {"input_ids" if "input_ids" in inputs else inputs.all[0].name: data}
    if isinstance(data, Mapping) or hasattr(data, "keys"):
        return from_reader(lambda: arrays.batches_of(data, size), inputs, limit)
    if isinstance(data, list | tuple):
        if data and all(isinstance(item, str) for item in data):
            return text.from_text(data, source, inputs, limit=limit, seq_len=seq_len, batch_size=batch_size)
        return from_sequence(data, inputs, limit)
    if isinstance(data, Iterable):
        return from_stream(data, inputs, limit)
    raise DataError(
        f"cannot read data from a {type(data).__name__}: pass an iterable of dicts, tuples or arrays, a dict of "
        "arrays, an .npz, a text file, a list of texts or a folder of images."
    )


def _open_path(
    path: Path, source: Source, inputs: Inputs, limit: int | None, seq_len: int | None, batch_size: int
) -> Batches:
    if path.is_dir():
        return images.from_folder(path, source, inputs, limit=limit, batch_size=batch_size)
    if not path.is_file():
        raise DataError(f"there is no file or folder {path}.")
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return from_reader(lambda: arrays.batches_of_npz(path, batch_size), inputs, limit)
    if suffix in _TABLES | images.SUFFIXES:
        raise DataError(
            f"{path} is no text file, .npz or folder of images: read it, and pass its batches or its texts."
        )
    return text.from_text(path, source, inputs, limit=limit, seq_len=seq_len, batch_size=batch_size)
