"""Folders traced without their weights: the same outputs as torch's, weights left on disk, and when that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.frontends import open_source
from qcompiler.frontends.source import Source
from qcompiler.graph.run import Runner
from qcompiler.graph.stored import Stored
from tests import families

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def saved(model: Any, folder: Path, **options: Any) -> Path:
    with families.quiet():
        model.save_pretrained(folder, **options)
    return folder


def pretrained(name: str) -> Any:
    with families.quiet():
        return families.FAMILIES[name]().model


def stored(source: Source) -> set[str]:
    return {name for name, v in source.model.graph.initializers.items() if isinstance(v.const_value, Stored)}


def check_logits(model: Any, source: Source) -> None:
    ids = np.random.default_rng(0).integers(3, 100, (2, 9))
    with torch.no_grad():
        want = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    got = Runner(source.model)({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
    assert np.abs(got - want).max() < 5e-6 * np.abs(want).max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2"])
def test_parameters_stay_in_their_files(tmp_path: Path, name: str) -> None:
    model = pretrained(name)
    source = open_source(saved(model, tmp_path, max_shard_size="100KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert not [note for note in source.notes if note.what == "loaded whole"]
    assert stored(source) <= {parameter_name for parameter_name, _ in model.named_parameters(remove_duplicate=False)}
    assert len(stored(source)) == len(list(model.parameters()))
    check_logits(model, source)


def test_a_tied_head_is_one_parameter(tmp_path: Path) -> None:
    with families.quiet():
        config = transformers.LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
    source = open_source(saved(model, tmp_path))
    assert len(stored(source) & {"model.embed_tokens.weight", "lm_head.weight"}) == 1
    check_logits(model, source)


def test_a_head_that_is_said_to_be_tied_and_is_not(tmp_path: Path) -> None:
    model = pretrained("llama")
    saved(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    check_logits(model, open_source(tmp_path))  # as transformers, which goes by the numbers


def test_a_bare_model_opens_a_file_of_one_with_a_head(tmp_path: Path) -> None:
    model = pretrained("llama")
    saved(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    source = open_source(tmp_path)
    assert "embed_tokens.weight" in stored(source)
    ids = np.arange(3, 12)[None]
    with torch.no_grad():
        want = model.model(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()
    got = Runner(source.model)({"input_ids": ids, "attention_mask": np.ones_like(ids)})["last_hidden_state"]
    assert np.abs(got - want).max() < 5e-6 * np.abs(want).max()


def test_what_is_loaded_whole_says_why(tmp_path: Path) -> None:
    model = pretrained("llama")
    folder = saved(model, tmp_path)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    source = open_source(folder)
    (note,) = [note for note in source.notes if note.what == "loaded whole"]
    assert note.why == "it cannot be traced without its weights: its weights are in no safetensors file"
    check_logits(model, source)
