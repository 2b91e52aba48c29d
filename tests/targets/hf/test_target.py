"""Target hf: folders that transformers loads, with the very numbers of our other targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler import quantize
from qcompiler.core import ArtefactError, TargetError
from qcompiler.graph.linear import linears
from qcompiler.graph.weights import folded_grid
from tests import families
from tests.targets.hf.folders import check_same, compiled, load, open_once, outputs, tiny, tiny_llama

safetensors = pytest.importorskip("safetensors.numpy")
CALIBRATION = [families.feeds("llama", seed=seed) for seed in range(3)]
AWQ = "awq,annotate,insert,clip_weights,gptq,fold"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "open_source", open_once)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 48 channels, which are no whole groups of 32, and in bfloat16."""
    return tiny_llama(tmp_path_factory.mktemp("odd"), "bfloat16", hidden_size=48, intermediate_size=64)


def config_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "hf" / "config.json").read_text())
    return found


def tensors_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = safetensors.load_file(output / "hf" / "model.safetensors")
    return found


def weights(source: Path, scheme: str) -> dict[str, Any]:
    """The dequantized weights [out, in] that target onnx makes of the same source."""
    made = qcompiler.compile(source, scheme=scheme, target="onnx", progress=False)
    found = {}
    for linear in linears(made.model):
        assert linear.weight_quant is not None
        grid = folded_grid(linear.weight_quant)
        assert grid is not None
        assert linear.weight.const_value is not None
        found[linear.name] = grid.dequantized(linear.weight.const_value.numpy().astype(np.int32)).T
    return found


@pytest.mark.parametrize("scheme", ["w4a16{group_size=16}", "w8a16{group_size=none}", "w4a16{symmetric=false}"])
def test_transformers_loads_the_numbers_of_the_other_targets(llama: Path, tmp_path: Path, scheme: str) -> None:
    made = compiled(llama, tmp_path / "out", scheme)
    model = load(tmp_path / "out" / "hf")
    check_same(model, made)
    for name, want in weights(llama, scheme).items():
        assert np.array_equal(model.get_submodule(name).weight.detach().numpy(), want), name
    assert {row.kernel for row in made.report.rows} == {"pack-quantized"}


def test_dequantized_at_once(llama: Path, tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    made = compiled(llama, tmp_path / "out", "w2a16{group_size=16}")
    check_same(load(tmp_path / "out" / "hf", quantization_config=CompressedTensorsConfig(dequantize=True)), made)


def test_bert_keeps_what_the_graph_leaves_out(tmp_path: Path) -> None:
    source = tiny("bert", tmp_path / "bert")
    (source / "tokenizer.json").write_text("{}")
    (source / "vocab.txt").write_text("[PAD]")
    made = compiled(source, tmp_path / "out")
    quantization = config_of(tmp_path / "out")["quantization_config"]
    assert quantization["ignore"] == ["pooler.dense"]
    check_same(load(tmp_path / "out" / "hf"), made, "bert")
    before = safetensors.load_file(source / "model.safetensors")
    after = tensors_of(tmp_path / "out")
    assert np.array_equal(after["pooler.dense.weight"], before["pooler.dense.weight"])
    assert (tmp_path / "out" / "hf" / "vocab.txt").read_text() == "[PAD]"


def test_a_quantized_head_is_no_longer_tied(tied: Path, tmp_path: Path) -> None:
    made = compiled(tied, tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    found, before = tensors_of(tmp_path / "out"), safetensors.load_file(tied / "model.safetensors")
    assert "lm_head.weight_packed" in found
    assert np.array_equal(found["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    check_same(load(tmp_path / "out" / "hf"), made)


def test_a_head_in_float_stays_tied(tied: Path, tmp_path: Path) -> None:
    made = compiled(tied, tmp_path / "out", "w4a16{head=false}")
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is True
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert not [name for name in tensors_of(tmp_path / "out") if name.startswith("lm_head")]
    check_same(load(tmp_path / "out" / "hf"), made)


def test_bits_by_layer_are_groups_of_modules(llama: Path, tmp_path: Path) -> None:
    made = compiled(llama, tmp_path / "out", bits={"*down_proj*": 8, "lm_head": "float"})
    quantization = config_of(tmp_path / "out")["quantization_config"]
    groups = [(g["targets"], g["weights"]["num_bits"]) for g in quantization["config_groups"].values()]
    assert groups == [(["Linear"], 4), (["model.layers.0.mlp.down_proj"], 8)]
    assert quantization["ignore"] == ["lm_head"]
    check_same(load(tmp_path / "out" / "hf"), made)


def test_what_awq_folded_is_written(llama: Path, tmp_path: Path) -> None:
    made = compiled(llama, tmp_path / "out", passes=AWQ, calibration=CALIBRATION)
    assert {plan.kind for plan in made.plans} == {"fold"}  # the source's modules have no place for an inserted Mul
    found, before = tensors_of(tmp_path / "out"), safetensors.load_file(llama / "model.safetensors")
    norms = [name for name in before if "layernorm" in name]
    assert any(not np.array_equal(found[name], before[name]) for name in norms)
    check_same(load(tmp_path / "out" / "hf"), made)


def test_hidden_units_are_written_in_their_order(llama: Path, tmp_path: Path) -> None:
    ordered = "reorder{gain=0},annotate,insert,fold"
    made = compiled(llama, tmp_path / "out", passes=ordered, calibration=CALIBRATION, ignore=["*up_proj"])
    (plan,) = made.plans
    assert plan.sinks == ("model.layers.0.mlp.down_proj",)  # the stream stays as it was
    found, before = tensors_of(tmp_path / "out"), safetensors.load_file(llama / "model.safetensors")
    up = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(found[up], before[up][plan.order])
    check_same(load(tmp_path / "out" / "hf"), made)


def test_gemma_norms_are_written_without_their_one(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "gemma", family="Gemma2", head_dim=16, query_pre_attn_scalar=16)
    made = compiled(source, tmp_path / "out", passes="awq{alpha=0.5},annotate,insert,fold", calibration=CALIBRATION)
    found, before = tensors_of(tmp_path / "out"), safetensors.load_file(source / "model.safetensors")
    changed = {name for name in before if "norm" in name and not np.array_equal(found[name], before[name])}
    assert "model.layers.0.input_layernorm.weight" in changed
    assert "model.layers.0.post_attention_layernorm.weight" not in changed  # 1 + w - 1 would not give w again
    check_same(load(tmp_path / "out" / "hf"), made, "gemma2")


def test_linears_of_a_subclass_are_dequantized_at_once(tmp_path: Path) -> None:
    """FalconLinear's own code, and that which initializes it, looks for the weight that packing would take away."""
    falcon = tiny_llama(tmp_path / "falcon", family="Falcon")
    made = compiled(falcon, tmp_path / "out")
    assert all(row.quantized for row in made.report.rows)
    assert config_of(tmp_path / "out")["quantization_config"]["dequantize"]
    check_same(load(tmp_path / "out" / "hf"), made)
    with pytest.raises(TargetError, match="of a class of the model's own in models of one kind only"):
        compiled(falcon, tmp_path / "mixed", bits={"*h_to_4h*": 8})
    ignored = compiled(falcon, tmp_path / "head", ignore=["*transformer*"])  # the head is a plain Linear
    assert [row.name for row in ignored.report.rows if row.quantized] == ["lm_head"]
    assert "dequantize" not in config_of(tmp_path / "head")["quantization_config"]


def test_parameters_keep_the_type_of_their_file(odd: Path, tmp_path: Path) -> None:
    made = compiled(odd, tmp_path / "out", "w4a16{group_size=16}")
    with (tmp_path / "out" / "hf" / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    types = {name.rpartition(".")[2]: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    assert types == {"weight": "BF16", "weight_packed": "I32", "weight_scale": "F32", "weight_shape": "I64"}
    import torch

    check_same(load(tmp_path / "out" / "hf", dtype=torch.float32), made)
    half = load(tmp_path / "out" / "hf")
    assert half.lm_head.weight_scale.dtype == torch.bfloat16


def test_groups_that_do_not_divide_the_inputs_stay_in_float(odd: Path, tmp_path: Path) -> None:
    made = compiled(odd, tmp_path / "out")
    assert {row.name for row in made.report.rows if row.quantized} == {"model.layers.0.mlp.down_proj"}
    assert "do not divide the 48 inputs" in made.report.rows[0].reason
    assert "model.layers.0.self_attn.q_proj" in config_of(tmp_path / "out")["quantization_config"]["ignore"]
    load(tmp_path / "out" / "hf")


def test_weight_by_weight_gives_the_bytes_of_all_at_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(llama, tmp_path / "streamed", "w4a16{symmetric=false}")
    monkeypatch.setattr(quantize, "weight_passes", lambda passes: None)
    compiled(llama, tmp_path / "whole", "w4a16{symmetric=false}")
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "hf").iterdir()]
    assert len(files) == 3
    for path in files:
        assert (tmp_path / "streamed" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


def test_a_loaded_model_saves_the_folder_again(llama: Path, tmp_path: Path) -> None:
    compiled(llama, tmp_path / "out")
    qcompiler.load(tmp_path / "out").save(tmp_path / "again")
    for path in (tmp_path / "out" / "hf").iterdir():
        assert (tmp_path / "again" / "hf" / path.name).read_bytes() == path.read_bytes()
    (tmp_path / "again" / "hf" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ArtefactError, match=r"hf/model\.safetensors has 7 bytes instead of"):
        qcompiler.load(tmp_path / "again")


@pytest.mark.slow
def test_minilm(minilm: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    made = compiled(minilm, tmp_path / "out", "w4a16{symmetric=false}")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: qcompiler[hf]")
    sentences = ["A man is playing a guitar.", "Two dogs run across a field of grass."]
    with families.quiet():
        tokens = AutoTokenizer.from_pretrained(tmp_path / "out" / "hf")(sentences, padding=True, return_tensors="np")
        model, reference = (AutoModel.from_pretrained(path) for path in (tmp_path / "out" / "hf", minilm))
    feeds = {name: np.asarray(array, np.int64) for name, array in tokens.items()}
    real = feeds["attention_mask"].astype(bool)
    got, exact = (outputs(each, feeds)[real] for each in (model, reference))
    want = made.run(feeds, threads=1)["last_hidden_state"][real]
    assert np.abs(got - want).max() < 5e-6 * np.abs(want).max()
    assert 10 * np.log10(np.square(exact).sum() / np.square(got - exact).sum()) > 12
    assert (tmp_path / "out" / "hf" / "model.safetensors").stat().st_size < 56e6  # 91 MB in float32
