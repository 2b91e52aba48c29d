"""Whole models: compiled, run, saved and loaded, and compared with the canonical quantized graph in ONNX Runtime."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.core import ArtefactError, DataError, OptionError, TargetError
from qcompiler.graph.run import Runner
from tests import families, graphs_int8, models
from tests.graphs_int8 import float_mlp

pytest.importorskip("tvm", reason="Apache TVM is not installed: pip install 'qcompiler[tvm]'")

from qcompiler.targets.tvm.emit.graph import emit
from qcompiler.targets.tvm.engine import Engine
from qcompiler.targets.tvm.isa import detect

PASSES = "annotate,insert,fold"
FAST = ("bert",)
SLOW = pytest.mark.slow


def compile_family(name: str, scheme: str = "w8a8") -> qcompiler.CompiledModel:
    data = [families.feeds(name, batch=4, seq=24, seed=seed) for seed in range(2)]
    return qcompiler.compile(
        families.exported(name), calibration=data, scheme=scheme, passes=PASSES, target="tvm-llvm", progress=False
    )


def check_outputs(name: str, compiled: qcompiler.CompiledModel) -> None:
    """Same numbers, but for integers that round the other way: those move an output by a step at most."""
    reference, output = Runner(compiled.model, threads=1), families.OUTPUT[name]
    signal = noise = 0.0
    for batch, seq in ((2, 16), (1, 1), (5, 19)):
        feeds = families.feeds(name, batch, seq, seed=9)
        want, got = reference(feeds)[output], compiled.run(feeds, threads=1)[output]
        mask = feeds.get("attention_mask")
        keep = mask == 1 if mask is not None else np.ones(want.shape[:-1], bool)
        want, got = want[keep].astype(np.float64), got[keep]
        signal, noise = signal + (want**2).sum(), noise + ((got - want) ** 2).sum()
    assert (
        10 * np.log10(signal / noise) > 45
    )  # pooled: one step at the head of a sequence moves all of it (41 dB, gpt2)


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in families.FAMILIES]
)
def test_families(name: str) -> None:
    compiled = compile_family(name)
    check_outputs(name, compiled)
    assert compiled.report.coverage_body == 1.0
    assert all(row.kernel == "int8 GEMM" for row in compiled.report.rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_dynamic_families(name: str) -> None:
    check_outputs(name, compile_family(name, "w8a8-dynamic"))


def test_max_drop_is_checked_on_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that computed something else would be found out."""

    def compiled() -> qcompiler.CompiledModel:
        return qcompiler.compile(
            float_mlp(),
            calibration=[graphs_int8.feeds(seed=seed) for seed in range(16)],
            target="tvm-llvm",
            max_drop={"sqnr": 20},
            progress=False,
        )

    assert {row.kernel for row in compiled().report.rows} == {"int8 GEMM"}
    real = Engine.run
    monkeypatch.setattr(Engine, "run", lambda *given: {name: 2 * y for name, y in real(*given).items()})
    with pytest.raises(OptionError, match="cannot be held: lowered, the model reaches"):
        compiled()


def test_save_and_load(tmp_path: Path) -> None:
    compiled = compile_family("distilbert")
    feeds = families.feeds("distilbert", 3, 11, seed=9)
    output = families.OUTPUT["distilbert"]
    got = compiled.run(feeds, threads=1)[output]
    np.testing.assert_array_equal(compiled.run(feeds, threads=2)[output], got)
    folder = compiled.save(tmp_path / "out")
    loaded = qcompiler.load(folder)
    np.testing.assert_array_equal(loaded.run(feeds)[output], got)

    with pytest.raises(DataError, match="differ in sequence: 11 and 10"):
        compiled.run({**feeds, "attention_mask": feeds["attention_mask"][:, :10]})
    with pytest.raises(DataError, match="sequence is 129, and the model has a table of 128"):
        compiled.run(families.feeds("distilbert", 1, 129))
    import onnxruntime as ort

    with pytest.raises(OptionError, match="session_options"):
        compiled.run(feeds, session_options=ort.SessionOptions())

    engine = folder / "engine.json"
    described = json.loads(engine.read_text())

    def saved(data: Any) -> None:
        engine.write_text(json.dumps(data))
        recipe = json.loads((folder / "recipe.json").read_text())
        recipe["files"]["engine.json"] = engine.stat().st_size
        (folder / "recipe.json").write_text(json.dumps(recipe))

    foreign = "znver4" if detect().lanes < 16 else "alderlake"
    saved({**described, "isa": {**described["isa"], "cpu": foreign}})
    with pytest.raises(ArtefactError, match=f"compiled for {foreign}"):
        qcompiler.load(folder)
    saved({**described, "outputs": None})
    with pytest.raises(ArtefactError, match=re.escape("engine.json cannot be read")):
        qcompiler.load(folder)
    (folder / "model.so").unlink()
    saved(described)
    with pytest.raises(ArtefactError, match=re.escape("model.so")):
        qcompiler.load(folder)


def test_what_is_not_understood_is_named() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[n, 4] x) => (float[n, 4] y) { y = Hardmax(x) }"""
    )
    model.graph.node(0).name = "the_node"
    with pytest.raises(TargetError, match="Hardmax 'the_node' cannot be compiled for tvm-llvm"):
        emit(model, detect())
    with pytest.raises(TargetError, match="LLVM knows no processor 'pentium9'"):
        detect("pentium9")


@pytest.mark.slow
def test_minilm_beside_ort_cpu(minilm: Path) -> None:
    """The whole default pipeline (split and smooth included): within 0.1 dB of ort-cpu, compiled within a minute."""
    data = models.data("wikitext2/valid.txt")
    loss = {}
    for target in ("ort-cpu", "tvm-llvm"):
        compiled = qcompiler.compile(minilm, calibration=data, limit=32, seq_len=64, target=target, progress=False)
        loss[target] = compiled.report.output_sqnr_db["last_hidden_state"]
        assert compiled.report.coverage_body >= 0.97  # split leaves a little in float
    assert loss["tvm-llvm"] > loss["ort-cpu"] - 0.1
    assert compiled.report.seconds["lower"] <= 60
