"""Tiny Hugging Face folders, and transformers' view of what was compiled from them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import qcompiler
from qcompiler.frontends import Source, open_source
from tests import families

Array = npt.NDArray[Any]
HIDDEN = 64


def tiny_llama(folder: Path, dtype: str = "float32", family: str = "Llama", **options: Any) -> Path:
    """A llama (or another causal language model) of one layer and ``options``, saved there."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    sizes = {
        "vocab_size": families.VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    with families.quiet():
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**{**sizes, **options})
        model = transformers.AutoModelForCausalLM.from_config(config)
        families._randomize(model, 1)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def tiny(name: str, folder: Path) -> Path:
    """The model of a family, saved there."""
    with families.quiet():
        families.FAMILIES[name]().model.save_pretrained(folder)
    return folder


@functools.cache
def _traced(folder: Path) -> Source:
    return open_source(folder)


def open_once(folder: Path, **options: Any) -> Source:
    """:func:`qcompiler.frontends.open_source` of a folder that no test changes; it is traced once."""
    source = _traced(folder)
    return dataclasses.replace(source, model=source.model.clone())


def load(folder: Path, **options: Any) -> Any:
    """What from_pretrained makes of a folder, by its architecture; every parameter is in the files and none is over."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: qcompiler[hf]")
    config = transformers.AutoConfig.from_pretrained(folder)
    with families.quiet():
        cls = getattr(transformers, config.architectures[0])
        model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def outputs(model: Any, feeds: dict[str, Array]) -> Array:
    """Logits or hidden states of a transformers model."""
    import torch

    with torch.no_grad(), families.quiet():
        result = model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    found: Array = (result.logits if "logits" in result else result.last_hidden_state).numpy()
    return found


def compiled(source: Path, output: Path, scheme: str = "w4a16", **options: Any) -> qcompiler.CompiledModel:
    return qcompiler.compile(source, scheme=scheme, target="hf", output=output, progress=False, **options)


def check_same(model: Any, made: qcompiler.CompiledModel, family: str = "llama") -> None:
    """transformers computes what model.onnx does, but for the order of float32 sums."""
    feeds = families.feeds(family)
    more = {name: np.zeros_like(feeds["input_ids"]) for name in made.inputs if name not in feeds}
    want = made.run({**feeds, **more}, threads=1)[families.OUTPUT[family]]
    got = outputs(model, feeds)
    real = feeds["attention_mask"].astype(bool)
    assert np.abs(got - want)[real].max() < 5e-6 * np.abs(want).max()
