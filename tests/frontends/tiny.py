"""Tiny graphs, sources and tokenizers for the front door's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qcompiler.frontends.source import Source, guess_kind

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "cat", "sat", "on", "a", "mat", "dog", "ran"]


def proto(opset: int = 21, width: int = 4) -> onnx.ModelProto:
    """y = x @ w, w [width, width] inside the protobuf."""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> tiny (float[n, {width}] x) => (float[n, {width}] y) '
        "{ y = MatMul(x, w) }"
    )
    weight = np.arange(width * width, dtype=np.float32).reshape(width, width)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return model


def source(inputs: str, folder: Path | None = None, outputs: str = "float[b, s, 8] y") -> Source:
    """A source with the given inputs in ONNX text form, e.g. ``int64[b, s] input_ids``; its graph computes nothing."""
    body = f"{outputs.split()[-1]} = Constant<value_float = 0.0>()"
    text = f'<ir_version: 8, opset_import: ["": 21]> tiny ({inputs}) => ({outputs}) {{ {body} }}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    return Source(model, "tiny", guess_kind(model), "0" * 64, folder)


def write_tokenizer(folder: Path, *, special: str = "[CLS] $A [SEP]", pad: str | None = "[PAD]") -> Path:
    """A word-level tokenizer of :data:`WORDS`; ids are positions in that list."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        ids = [(word, WORDS.index(word)) for word in special.split() if word in WORDS]
        tokenizer.post_processor = processors.TemplateProcessing(single=special, special_tokens=ids)
    if pad is not None:
        # What many published files hold: a fixed length that the reader must not obey.
        tokenizer.enable_padding(pad_id=WORDS.index(pad), pad_token=pad, length=64)
        tokenizer.enable_truncation(2)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path
