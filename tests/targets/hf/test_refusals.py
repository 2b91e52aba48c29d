"""What target hf says no to, in one sentence, and leaves no folder of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import quantize
from qcompiler.core import OptionError, QCompilerError, TargetError
from qcompiler.frontends.origin import leave_origin, origin_of
from qcompiler.graph.edit import add_initializer, insert_node, write_input
from qcompiler.graph.linear import linears
from qcompiler.graph.rules import canonicalise
from qcompiler.presets import resolve
from qcompiler.targets import make_target
from qcompiler.targets.hf.writeback import Before, write_back
from tests.graphs_int8 import float_mlp
from tests.targets.hf.folders import compiled, open_once, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def llama(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(quantize, "open_source", open_once)
    return folder


def refused(error: type[QCompilerError], words: str, output: Path, source: Any, **options: Any) -> None:
    with pytest.raises(error, match=words) as caught:
        compiled(source, output, **options)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert not output.exists()
    assert not list(output.parent.glob(f"{output.name}.partial*"))


def test_a_model_that_came_from_no_folder(tmp_path: Path) -> None:
    refused(TargetError, "this model came from none", tmp_path / "out", float_mlp())
    ir.save(float_mlp(), tmp_path / "model.onnx")
    refused(TargetError, "this model came from none", tmp_path / "out", tmp_path / "model.onnx")


def test_a_folder_that_is_quantized_already(llama: Path, tmp_path: Path) -> None:
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": []}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    source = open_once(llama)
    canonicalise(source.model)
    origin = origin_of(source.model.graph)
    assert origin is not None
    leave_origin(source.model.graph, dataclasses.replace(origin, folder=tmp_path))
    with pytest.raises(TargetError, match="says it is quantized already"):
        make_target("hf").prepare(source.model, resolve("w4a16"))


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a8", "nf4", "w4a16{embedding=4}", "fp16"])
def test_schemes_that_are_no_packed_integers(llama: Path, tmp_path: Path, scheme: str) -> None:
    refused(TargetError, "target 'hf'", tmp_path / "out", llama, scheme=scheme)


def test_nothing_to_pack(llama: Path, tmp_path: Path) -> None:
    refused(TargetError, "nothing to pack", tmp_path / "out", llama, ignore=["*"])
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    gpt2 = tiny_llama(tmp_path / "gpt2", family="GPT2", **sizes)  # its Linears are Conv1D
    refused(TargetError, "packs torch.nn.Linear", tmp_path / "out", gpt2, scheme="w4a16{head=false}")


def test_zero_points_of_several_kinds(llama: Path, tmp_path: Path) -> None:
    options = {"scheme": "w4a16{symmetric=false}", "bits": {"*down_proj*": 8}}
    refused(TargetError, "zero points in models of one kind only", tmp_path / "out", llama, **options)


def test_max_size_counts_one_file(llama: Path, tmp_path: Path) -> None:
    options = {"max_size": "1MB", "calibration": [{}]}
    refused(OptionError, "saves more than that", tmp_path / "out", llama, **options)


def test_max_drop_has_nothing_to_choose(llama: Path, tmp_path: Path) -> None:
    options = {"max_drop": {"sqnr": 20}, "calibration": [{}]}
    refused(OptionError, "scheme 'w4a16' leaves them in float", tmp_path / "out", llama, **options)
    refused(TargetError, "cannot run scheme 'w8a8'", tmp_path / "out", llama, scheme="w8a8", **options)


# --- what passes may have left in the graph ---


@pytest.fixture
def graph(llama: Path) -> ir.Model:
    model = open_once(llama).model
    canonicalise(model)
    Before.leave(model.graph)
    return model


def written(model: ir.Model) -> set[str]:
    origin = origin_of(model.graph)
    assert origin is not None
    return set(write_back(model.clone(), origin).tensors)


def test_an_untouched_graph_is_its_files(graph: ir.Model) -> None:
    origin = origin_of(graph.graph)
    assert origin is not None
    assert written(graph) == set(origin.entries)


def test_an_operator_that_a_pass_inserted(graph: ir.Model) -> None:
    q = linears(graph)[0]
    factor = add_initializer(graph.graph, "factor", np.float32(2))
    scaled = insert_node(graph.graph, q.matmul, "Mul", [q.x, factor], name="q.scaled", like=q.x)
    q.matmul.replace_input_with(0, scaled.outputs[0])
    with pytest.raises(TargetError, match=r"no place for Mul 'q\.scaled', which was added"):
        written(graph)


def test_an_operator_that_a_pass_removed(graph: ir.Model) -> None:
    residual = next(node for node in graph.graph if node.op_type == "Add" and node.inputs[1].producer() is not None)
    residual.outputs[0].replace_all_uses_with(residual.inputs[0])
    graph.graph.remove(residual, safe=True)
    with pytest.raises(TargetError, match="cannot do without Add"):
        written(graph)


def test_a_number_that_is_no_parameter(graph: ir.Model) -> None:
    name = next(n for n in graph.graph.initializers if n.endswith("inv_freq"))
    value = graph.graph.initializers[name]
    (node, index) = value.uses()[0]
    write_input(node, index, value.const_value.numpy() * 2)
    with pytest.raises(TargetError, match=r"no parameter to write 'model\.rotary_emb\.inv_freq' to"):
        written(graph)


def test_a_rearrangement_without_an_inverse(graph: ir.Model) -> None:
    norm = graph.graph.initializers["model.norm.weight"]
    (node, index) = norm.uses()[0]
    write_input(node, index, norm.const_value.numpy() * 2).metadata_props["qcompiler.map"] = "slice:0:0:64"
    with pytest.raises(TargetError, match=r"cannot write 'model\.norm\.weight': the graph has it as slice"):
        written(graph)
