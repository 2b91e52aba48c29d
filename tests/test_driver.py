"""compile(): every stage is a valid model, refusals come before the work, the same input gives the same artefact."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import qcompiler
from qcompiler.core import ArtefactError, DataError, ModelError, OptionError, TargetError
from qcompiler.graph.edit import array_of, write_input
from qcompiler.graph.run import Runner, session_options
from qcompiler.passes import PASSES
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.presets import PRESETS, resolve
from qcompiler.quantize import default_passes
from tests import families
from tests.passes.blocks import HELD_OUT, batches, block, error
from tests.passes.blocks import outputs as outputs_of

NAMES = ("wq", "wk", "wu", "wd", "wp", "wh")
"""normalise names Linears after their weights."""
FULL_STAGES = ("smooth", "annotate", "insert", "fold")
STAGES = ("split", "adaptive", "annotate", "insert", "fold")  # of the default pipeline
FULL = "smooth{alpha=0.5},annotate,insert,fold"


def compiled(model: Any = None, **options: Any) -> qcompiler.CompiledModel:
    options = {"calibration": batches(), "progress": False, **options}
    return qcompiler.compile(model if model is not None else block(outliers=30), **options)


def held_out(model: qcompiler.CompiledModel) -> dict[str, np.ndarray]:
    results = [model.run(feeds, threads=1) for feeds in HELD_OUT]
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


@pytest.mark.parametrize("passes", [FULL, "smooth{alpha=0.5},annotate,insert,fold{bias=int32}"])
def test_every_stage_is_a_valid_model_that_runs(passes: str, tmp_path: Path) -> None:
    """Stop after any pass, save, look, run: in a plain session, without qcompiler, with all of its optimizations."""
    compiled(passes=passes, scheme="w8a8-o3", dump=tmp_path)
    stages = sorted(path.name for path in tmp_path.iterdir())
    assert stages == ["00-normalise", "01-smooth", "02-annotate", "03-insert", "04-fold"]
    reference = outputs_of(block(outliers=30))
    for stage in stages:
        path = tmp_path / stage / "model.onnx"
        onnx.checker.check_model(str(path))
        session = ort.InferenceSession(path, session_options(1))
        got = [session.run(list(reference), feeds) for feeds in HELD_OUT]
        for i, exact in enumerate(reference.values()):
            array = np.concatenate([result[i] for result in got])
            if stage < "03":
                assert np.abs(array - exact).max() <= 1e-5 * np.abs(exact).max(), stage
            else:
                assert 1e-6 < error(exact, array) < 1e-2, stage


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_every_stage_of_a_transformer_runs(name: str, tmp_path: Path) -> None:
    data = [families.feeds(name, batch=4, seq=16, seed=seed) for seed in range(2)]
    path, output, feeds = families.exported(name), families.OUTPUT[name], families.feeds(name, seed=9)
    compiled(path, calibration=data, passes=FULL, dump=tmp_path)
    reference = Runner(ir.load(path), threads=1)(feeds)[output]
    keep = feeds["attention_mask"] == 1 if "attention_mask" in feeds else np.ones(reference.shape[:-1], bool)
    errors = {}
    for stage in sorted(tmp_path.iterdir()):
        session = ort.InferenceSession(stage / "model.onnx", session_options(1))
        errors[stage.name[3:]] = error(reference[keep], session.run([output], feeds)[0][keep])
    assert list(errors) == ["normalise", "smooth", "annotate", "insert", "fold"]
    assert max(errors["normalise"], errors["smooth"], errors["annotate"]) < 1e-10
    assert 1e-6 < errors["insert"] < 2e-2
    assert 1e-6 < errors["fold"] < 2e-2


def test_the_model_that_came_in_is_not_changed() -> None:
    model = block(outliers=30)
    before = {name: array_of(value).copy() for name, value in model.graph.initializers.items()}
    operators = [node.op_type for node in model.graph]
    compiled(model)
    assert [node.op_type for node in model.graph] == operators
    assert not any("qcompiler.activation" in node.metadata_props for node in model.graph)
    for name, array in before.items():
        np.testing.assert_array_equal(array_of(model.graph.initializers[name]), array)


@pytest.mark.parametrize("target", ["ort-cpu", "onnx{reduce_range=true}", "onnx{form=qoperator,reduce_range=true}"])
@pytest.mark.parametrize("scheme", PRESETS)
def test_every_scheme_runs_on_every_target(scheme: str, target: str) -> None:
    if scheme == "w4a8" and target != "ort-cpu":  # standard ONNX has no product of the two
        with pytest.raises(TargetError, match=r"takes weight int4 .* with activation int8 per_group"):
            compiled(scheme=scheme, target=target)
        return
    model = compiled(scheme=scheme, target=target)
    reference = outputs_of(block(outliers=30))
    got = held_out(model)
    for name, exact in reference.items():
        low, high = {16: (1e-10, 1e-4), 8: (1e-6, 1e-2), 4: (1e-6, 0.05), 2: (1e-6, 2.0)}[PRESETS[scheme].weight.bits]
        assert low < error(exact, got[name]) < high
    rows = [row for row in model.report.rows if not row.name.endswith(".outliers")]
    assert {row.name for row in rows if not row.quantized} == ({"wh"} if scheme == "llm-int8" else set())
    assert [row.name for row in rows] == list(NAMES)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-o1", "w8a8-o2"])
def test_dynamic_schemes_run_without_data(scheme: str) -> None:
    model = compiled(scheme=scheme, calibration=None)
    assert model.recipe["passes"] == "annotate,insert,fold"
    assert model.recipe["calibration"] is None
    assert error(outputs_of(block(outliers=30))["y"], held_out(model)["y"]) < 1e-2


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-o3"])
def test_static_schemes_ask_for_data(scheme: str) -> None:
    with pytest.raises(DataError, match="needs activation statistics: give calibration data or choose a dynamic"):
        compiled(scheme=scheme, calibration=None)


def test_pipeline_of_a_scheme_and_the_recipe() -> None:
    model = compiled(seed=7, ignore=("wk",), limit=16, target="onnx{form=qdq}")
    recipe = json.loads(json.dumps(model.recipe))
    assert recipe["passes"] == default_passes(PRESETS["w8a8"], calibrated=True)
    assert recipe["passes"].endswith("adaptive,annotate,insert,fold")
    assert recipe["scheme"]["name"] == "w8a8"
    assert recipe["scheme"]["ignore"] == ["wk"]
    assert (recipe["target"], recipe["seed"], recipe["calibration"]) == ("onnx{form=qdq}", 7, {"samples": 16})
    assert len(recipe["source"]["sha256"]) == 64
    weights_only = dataclasses.replace(PRESETS["w8a8"], name="weights", activation=None, fallback=None)
    assert compiled(scheme=weights_only, target="onnx").recipe["passes"] == "annotate,insert,fold"


def test_bits_by_layer_reach_the_kernels_the_report_and_the_recipe() -> None:
    bits = {"w?": 8, "wu": 2, "wh": "float"}
    model = compiled(scheme="w4a16{group_size=16}", bits=bits, passes="awq,annotate,insert,clip_weights,gptq,fold")
    widths = {
        node.name: node.attributes["bits"].as_int() for node in model.model.graph if node.op_type == "MatMulNBits"
    }
    assert widths == {f"{name}.blocks": 2 if name == "wu" else 8 for name in NAMES if name != "wh"}
    rows = {row.name: row for row in model.report.rows}
    assert rows["wu"].weight == "int2 per_group(16) static"
    assert rows["wd"].weight == "int8 per_group(16) static"
    assert (rows["wh"].weight, rows["wh"].reason) == ("float", "bits='wh' leaves it")
    assert model.recipe["scheme"]["bits"] == (("w?", 8), ("wu", 2), ("wh", 16))
    mixed, four, eight = (
        sum(error(exact, held_out(each)[name]) for name, exact in outputs_of(block(outliers=30)).items())
        for each in (compiled(scheme="w4a16", bits={"w[dh]": 8}), compiled(scheme="w4a16"), compiled(scheme="w8a16"))
    )
    assert eight < mixed < four


def test_ignored_linears_stay_in_float_and_say_why() -> None:
    rows = {row.name: row for row in compiled(ignore=("wu", "*d")).report.rows}
    assert {name for name, row in rows.items() if not row.quantized} == {"wu", "wd"}
    assert "'wu'" in rows["wu"].reason
    assert "'*d'" in rows["wd"].reason


def test_a_head_in_float_says_why() -> None:
    report = compiled(scheme=dataclasses.replace(PRESETS["w8a8"], head=False)).report
    rows = {row.name: row for row in report.rows}
    assert [name for name, row in rows.items() if not row.quantized] == ["wh"]
    assert "head" in rows["wh"].reason
    assert (report.coverage_body, report.coverage_head) == (1.0, 0.0)


def test_outputs_are_compared_around_float_exact_passes() -> None:
    told = {note.node: note for note in compiled().report.notes if note.what == "outputs compared"}
    assert "adaptive" in told
    assert float(told["adaptive"].why.split()[2]) < 1e-5


@dataclasses.dataclass(frozen=True)
class Careless(Pass):
    """Claims to be exact and is not: it writes to a weight."""

    name: ClassVar[str] = "careless"
    float_exact: ClassVar[bool] = True
    by: float = 1.01

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        node = next(node for node in model.graph if node.op_type == "MatMul")
        write_input(node, 1, array_of(node.inputs[1]) * np.float32(self.by))
        return PassResult(True)


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("careless")
    module.Careless = Careless  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "careless", module)
    monkeypatch.setitem(PASSES, "careless", "careless:Careless")


@pytest.mark.usefixtures("careless")
def test_a_pass_that_breaks_its_promise_stops_the_compile(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"pass 'careless' changed the model's float outputs by .*e-0"):
        compiled(passes="careless,annotate,insert,fold", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ModelError, match=r"by inf|by nan"):
        compiled(passes="careless{by=inf},annotate,insert,fold")
    compiled(passes="careless{by=1},annotate,insert,fold")


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        compiled(output=tmp_path / name)
    for file in ("model.onnx", "model.onnx.data", "recipe.json", "folds.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_output_is_what_is_returned(tmp_path: Path) -> None:
    model = compiled(output=tmp_path / "new" / "out")
    loaded = qcompiler.load(tmp_path / "new" / "out")
    for name, array in held_out(model).items():
        np.testing.assert_array_equal(held_out(loaded)[name], array)
    assert loaded.report == model.report
    assert loaded.recipe == json.loads(json.dumps(model.recipe))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_options_are_refused_before_the_model_is_opened(tmp_path: Path) -> None:
    """The model does not exist: had it been looked at, ModelError would be raised."""
    nothing = tmp_path / "nothing.onnx"
    (tmp_path / "out").mkdir()
    per_group = dataclasses.replace(PRESETS["w8a8"].weight, granularity="per_group", group_size=32)
    for options, kind in (
        ({"scheme": "w8a9"}, OptionError),
        ({"target": "ort-gpu"}, OptionError),
        ({"passes": "smoth"}, OptionError),
        ({"scheme": dataclasses.replace(PRESETS["w8a8"], weight=per_group)}, TargetError),
        ({"output": tmp_path / "out"}, ArtefactError),
    ):
        with pytest.raises(kind):
            compiled(nothing, **options)
    with pytest.raises(ModelError):
        compiled(nothing)


def test_progress_is_shown_on_request(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    compiled()
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []  # Python prints warnings of libraries where nobody handles them
    compiled(progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert all(stage in err for stage in ("open", "normalise", *STAGES, "lower", "report"))


def test_seconds_of_every_stage_are_told() -> None:
    seconds = compiled(passes=FULL).report.seconds
    assert list(seconds) == ["open", "normalise", *FULL_STAGES, "lower"]
    assert all(value >= 0 for value in seconds.values())


def test_few_bits_with_data_are_clipped_and_rounded_by_gptq() -> None:
    quantize = "annotate,insert,clip_weights,gptq,fold"
    befores = {"w4a16": "reorder,", "w4a8": "split,adaptive,reorder,", "w2a16": "reorder,"}
    for name, before in {**befores, "w4a16{group_size=none}": ""}.items():
        assert default_passes(resolve(name), calibrated=True) == f"{before}{quantize}"
        assert default_passes(resolve(name), calibrated=False) == "annotate,insert,fold"
    assert "gptq" not in default_passes(PRESETS["nf4"], calibrated=True)
    assert "gptq" not in default_passes(PRESETS["w8a8"], calibrated=True)
