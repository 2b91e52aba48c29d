"""Hugging Face models and folders of tiny configs: heads, inputs, outputs, pooling, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.core import ModelError
from qcompiler.frontends import open_source
from qcompiler.graph.run import Runner
from tests import families

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def _pretrained(name: str) -> Any:
    with families.quiet():
        return families.FAMILIES[name]().model


def _saved(model: Any, folder: Path) -> Path:
    with families.quiet():
        model.save_pretrained(folder)
    return folder


def _tiny_bert(cls: str, **options: Any) -> Any:
    with families.quiet():
        config = transformers.BertConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, **options
        )
        torch.manual_seed(0)
        return getattr(transformers, cls)(config).eval()


def _difference(model: Any, source: Any, output: str, batch: int = 3, seq: int = 7) -> float:
    rng = np.random.default_rng(0)
    mask = (np.arange(seq)[None] < np.array([seq, seq - 2, seq - 3])[:batch, None]).astype(np.int64)
    feeds = {"input_ids": rng.integers(3, 32, (batch, seq)), "attention_mask": mask, "token_type_ids": mask}
    runner = Runner(source.model)
    feeds = {name: feeds[name] for name in runner.inputs}
    with torch.no_grad():
        want = model(**{name: torch.from_numpy(array) for name, array in feeds.items()})[output].numpy()
    got = runner(feeds)[output]
    rows = mask == 1 if want.ndim == 3 else slice(None)
    return float(np.abs(got[rows] - want[rows]).max() / np.abs(want[rows]).max())


def test_pretrained_needs_no_examples_and_is_left_alone() -> None:
    model = _pretrained("mixtral").train()
    model.set_experts_implementation("eager")
    before = (model.get_experts_implementation(), model.config._attn_implementation, model.config.use_cache)
    source = open_source(model)
    assert (model.get_experts_implementation(), model.config._attn_implementation, model.config.use_cache) == before
    assert all(module.training for module in model.modules())
    assert source.kind == "causal-lm"
    assert [value.name for value in source.model.graph.outputs] == ["logits"]
    assert [list(map(str, value.shape)) for value in source.model.graph.inputs] == [["batch", "sequence"]] * 2
    assert "model.layers.0.self_attn.q_proj.weight" in source.model.graph.initializers
    assert _difference(model.eval(), source, "logits") < 5e-6


def test_attention_that_does_not_export_falls_back_to_eager_with_a_note() -> None:
    with families.quiet():
        model = transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=32, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
        ).eval()
        model.set_attn_implementation("sdpa")
    source = open_source(model)
    assert model.config._attn_implementation == "sdpa"
    if source.notes:  # a later torch may learn to export it
        assert source.notes[0].what == "exported with eager attention"
    assert _difference(model, source, "last_hidden_state") < 5e-6


def test_given_examples_choose_the_inputs() -> None:
    model = _tiny_bert("BertModel")
    ids = torch.ones((2, 6), dtype=torch.int64)
    source = open_source(model, example_inputs={"input_ids": ids, "attention_mask": ids})
    assert Runner(source.model).inputs == ["input_ids", "attention_mask"]


def test_given_dynamic_shapes_by_name() -> None:
    ids = torch.ones((2, 6), dtype=torch.int64)
    source = open_source(
        _tiny_bert("BertModel"),
        example_inputs={"input_ids": ids, "attention_mask": ids},
        dynamic_shapes={"input_ids": {0: torch.export.Dim.AUTO}, "attention_mask": {0: torch.export.Dim.AUTO}},
    )
    assert [list(map(str, value.shape)) for value in source.model.graph.inputs] == [["batch", "6"]] * 2


def test_inputs_that_the_model_does_not_run_on() -> None:
    with pytest.raises(
        ModelError, match=r"BertModel does not run on attention_mask: .*pass example_inputs that it runs on"
    ):
        open_source(_tiny_bert("BertModel"), example_inputs={"attention_mask": torch.ones((2, 6), dtype=torch.int64)})


@pytest.mark.parametrize(
    ("cls", "output", "kind"),
    [
        ("BertModel", "last_hidden_state", "encoder"),
        ("BertForSequenceClassification", "logits", "encoder"),
        ("BertForMaskedLM", "logits", "encoder"),
    ],
)
def test_folder_takes_the_head_from_architectures(tmp_path: Path, cls: str, output: str, kind: str) -> None:
    model = _tiny_bert(cls)
    source = open_source(_saved(model, tmp_path / "tiny-bert"))
    assert (source.name, source.kind, source.folder) == ("tiny-bert", kind, tmp_path / "tiny-bert")
    assert [value.name for value in source.model.graph.outputs] == [output]
    assert [value.name for value in source.model.graph.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert _difference(model, source, output) < 5e-6


def test_folder_in_half_precision_opens_in_float32(tmp_path: Path) -> None:
    source = open_source(_saved(_tiny_bert("BertModel").to(torch.bfloat16), tmp_path))
    assert {str(v.dtype) for v in source.model.graph.initializers.values()} <= {"FLOAT", "INT64", "BOOL"}


def test_sentence_transformers_pooling_is_an_output(tmp_path: Path) -> None:
    model = _tiny_bert("BertModel")
    _saved(model, tmp_path)
    types = ["Transformer", "Pooling", "Normalize"]
    modules = [{"path": "" if t == "Transformer" else t, "type": f"sentence_transformers.models.{t}"} for t in types]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    source = open_source(tmp_path)
    ids = np.random.default_rng(0).integers(3, 32, (2, 5))
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    got = Runner(source.model)({"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids})
    assert list(got) == ["last_hidden_state", "sentence_embedding"]
    mean = (got["last_hidden_state"] * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    want = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    assert np.abs(got["sentence_embedding"] - want).max() < 1e-6


@pytest.mark.parametrize("name", ["whisper_encoder", "vit"])
def test_folders_without_tokens(tmp_path: Path, name: str) -> None:
    model = _pretrained(name)
    source = open_source(_saved(model, tmp_path))
    feeds = families.feeds(name, batch=3)
    with torch.no_grad():
        want = model(*map(torch.from_numpy, feeds.values())).last_hidden_state.numpy()
    got = Runner(source.model)(feeds)["last_hidden_state"]
    assert np.abs(got - want).max() < 5e-6 * np.abs(want).max()
    assert source.kind == ("vision" if name == "vit" else "graph")


def test_encoder_of_an_encoder_decoder_is_taken_with_a_note(tmp_path: Path) -> None:
    with families.quiet():
        config = transformers.T5Config(vocab_size=32, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
        model = transformers.T5ForConditionalGeneration(config).eval()
    source = open_source(_saved(model, tmp_path))
    assert source.notes[0].what == "the encoder is taken"
    assert source.kind == "encoder"
    assert _difference(model.get_encoder(), source, "last_hidden_state") < 5e-6


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not a Hugging Face folder: it has no config\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not valid JSON"),
        (
            '{"architectures": ["GrokForCausalLM"], "model_type": "grok9"}',
            "'GrokForCausalLM', which transformers .* lacks",
        ),
        ('{"model_type": "grok9"}', "names no architectures and has model_type 'grok9'"),
        (
            '{"architectures": ["OddModel"], "model_type": "odd", "auto_map": {"AutoModel": "modeling_odd.OddModel"}}',
            r"needs its own Python code \(modeling_odd.OddModel\): pass trust_remote_code=True",
        ),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=message):
        open_source(tmp_path)


def test_remote_code_runs_when_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = _saved(_tiny_bert("BertModel"), tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["OddModel"], "auto_map": {"AutoModel": "modeling_odd.OddModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_odd.py").write_text(
        "from transformers import BertModel\n\n\nclass OddModel(BertModel):\n    pass\n"
    )
    source = open_source(folder, trust_remote_code=True)
    assert [value.name for value in source.model.graph.outputs] == ["last_hidden_state"]


def test_folder_without_or_with_incomplete_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = _saved(_tiny_bert("BertModel"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.0.output.dense" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 2 weights of BertModel, among them 'encoder.layer.0.output.dense.bias'"
    ):
        open_source(folder)
    (folder / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_source(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds a config\.json but no weights"):
        open_source(folder)
