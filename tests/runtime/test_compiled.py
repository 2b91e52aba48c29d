import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from qcompiler.core import ArtefactError, DataError, FoldPlan, QCompilerError
from qcompiler.report import build
from qcompiler.runtime.compiled import CompiledModel, refuse_existing
from qcompiler.runtime.load import is_compiled, load
from qcompiler.runtime.recipe import RECIPE_VERSION, migrate
from qcompiler.targets.portable import Portable
from tests.graphs_int8 import K, feeds, float_mlp, quantized_mlp

SENTENCE = r"^[^\n]+\.?$"


def compiled(activation: str = "FakeQuant", tokenizer: Path | None = None, seed: int = 0) -> CompiledModel:
    lowered = quantized_mlp(activation, seed)
    notes = Portable().lower(lowered).notes
    report = build(
        float_model=float_mlp(seed),
        quantized_model=quantized_mlp(activation, seed),
        lowered_model=lowered,
        notes=notes,
        batches=[feeds()],
    )
    recipe = {"version": RECIPE_VERSION, "source": {"name": "mlp", "kind": "graph"}, "target": "onnx", "seed": seed}
    plans = (
        FoldPlan("fold", "ln", ("fc1",), np.linspace(0.5, 2, K, dtype=np.float32), None, 3e-8),
        FoldPlan("insert", "h2", ("fc2",), None, np.ones(24, np.float32), why="smooth alpha=0.8"),
    )
    return CompiledModel(lowered, recipe, report, plans, tokenizer)


def test_run_takes_and_returns_arrays_by_name() -> None:
    model = compiled()
    data = feeds()
    result = model.run(data)
    assert list(result) == ["y"] == model.outputs
    assert result["y"].shape == data["x"].shape
    assert model.session() is model.session()
    assert model.session(1) is not model.session()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    np.testing.assert_array_equal(model.run(data, session_options=options)["y"], model.run(data, threads=1)["y"])
    assert model.session(options=options) is model.session(options=options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_mask": None}, "no attention_mask: the inputs are attention_mask, x"),
        ({"extra": np.zeros(1)}, "unknown extra"),
        ({"x": np.zeros((1, 2, K))}, "'x' is float64, and the model wants float32"),
        ({"x": np.zeros((1, K), np.float32)}, r"shape \[1, 16\], and the model wants \[batch, sequence, 16\]"),
        ({"x": np.zeros((1, 2, K + 1), np.float32)}, r"shape \[1, 2, 17\]"),
    ],
)
def test_wrong_feeds_are_refused_in_a_sentence(change: dict[str, object], words: str) -> None:
    data = {name: array for name, array in {**feeds(), **change}.items() if array is not None}
    with pytest.raises(DataError, match=words) as caught:
        compiled().run(data)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_saved_folder_loads_and_runs_the_same(tmp_path: Path) -> None:
    tokenizer = tmp_path / "source" / "tokenizer.json"
    tokenizer.parent.mkdir()
    tokenizer.write_text("{}")
    model = compiled(tokenizer=tokenizer)
    out = model.save(tmp_path / "deep" / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        "folds.safetensors",
        "model.onnx",
        "model.onnx.data",
        "recipe.json",
        "report.json",
        "report.md",
        "tokenizer.json",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert is_compiled(out)
    assert not is_compiled(tmp_path)
    again = load(out)
    np.testing.assert_array_equal(again.run(feeds())["y"], model.run(feeds())["y"])
    assert again.recipe == model.recipe
    assert again.report == model.report
    assert again.tokenizer == out / "tokenizer.json"
    for a, b in zip(again.plans, model.plans, strict=True):
        assert (a.kind, a.source, a.sinks, a.why) == (b.kind, b.source, b.sinks, b.why)
        np.testing.assert_equal((a.scale, a.shift, a.proof), (b.scale, b.shift, b.proof))
    assert repr(again) == "CompiledModel('mlp', target 'onnx', 2 of 2 Linears quantized)"
    again.save(out, force=True)  # onto itself, while its weights are still read from there
    np.testing.assert_array_equal(load(out).run(feeds())["y"], model.run(feeds())["y"])


def test_a_saved_model_opens_without_qcompiler(tmp_path: Path) -> None:
    out = compiled().save(tmp_path / "out")
    code = (
        "import sys, onnxruntime as ort\n"
        "s = ort.InferenceSession('model.onnx', providers=['CPUExecutionProvider'])\n"
        "assert not any(m.startswith('qcompiler') for m in sys.modules)\n"
        "print([o.name for o in s.get_outputs()])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['y']"


def test_the_same_compile_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = compiled().save(tmp_path / "one"), compiled().save(tmp_path / "two")
    loaded = load(one).save(tmp_path / "three")
    for name in ("model.onnx", "model.onnx.data", "recipe.json", "folds.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
        assert (one / name).read_bytes() == (loaded / name).read_bytes(), name
    assert (compiled(seed=5).save(tmp_path / "four") / "model.onnx.data").read_bytes() != (
        one / "model.onnx.data"
    ).read_bytes()


def test_an_existing_folder_is_refused_and_force_replaces_compiled_models_only(tmp_path: Path) -> None:
    out = compiled().save(tmp_path / "out")
    with pytest.raises(ArtefactError, match=r"exists: .*--force"):
        compiled().save(out)
    (out / "stale").write_text("")
    compiled(seed=1).save(out, force=True)
    assert not (out / "stale").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("")
    with pytest.raises(ArtefactError, match=r"holds no compiled model"):
        compiled().save(precious, force=True)
    assert (precious / "thesis.txt").exists()
    with pytest.raises(ArtefactError, match="not a folder"):
        refuse_existing(precious / "thesis.txt", True)
    refuse_existing(tmp_path / "new", False)


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    model = compiled(tokenizer=tmp_path / "gone.json")
    with pytest.raises(ArtefactError, match=r"cannot write .*gone\.json"):
        model.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "recipe.json", "report.json", "folds.safetensors"])
@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_damaged_folders_are_refused_in_a_sentence(tmp_path: Path, name: str, fault: str) -> None:
    out = compiled().save(tmp_path / "out")
    if fault == "missing":
        (out / name).unlink()
    else:
        (out / name).write_bytes((out / name).read_bytes()[:-7])
    with pytest.raises(ArtefactError, match=SENTENCE) as caught:
        load(out)
    assert name in str(caught.value)


def test_a_rewritten_model_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    out = compiled().save(tmp_path / "out")
    size = (out / "model.onnx").stat().st_size
    (out / "model.onnx").write_bytes(b"x" * size)
    with pytest.raises(ArtefactError, match=r"cannot be read as an ONNX model"):
        load(out)
    with pytest.raises(ArtefactError, match="there is no folder"):
        load(tmp_path / "nowhere")


def test_recipes_migrate_step_by_step() -> None:
    def to_two(recipe: dict) -> dict:
        recipe["target"] = {"name": recipe.pop("backend")}
        return recipe

    steps = {1: to_two, 2: lambda recipe: {**recipe, "seed": recipe.get("seed", 0)}}
    old = {"version": 1, "backend": "ort-cpu"}
    assert migrate(old, 3, steps) == {"version": 3, "target": {"name": "ort-cpu"}, "seed": 0}
    assert old == {"version": 1, "backend": "ort-cpu"}
    assert migrate({"version": 2, "target": {}, "seed": 7}, 3, steps) == {"version": 3, "target": {}, "seed": 7}
    with pytest.raises(
        ArtefactError, match=r"of version 1, which this qcompiler \(version 3\) cannot bring up to date"
    ):
        migrate(old, 3, {2: steps[2]})


@pytest.mark.parametrize("version", [None, "1", True, RECIPE_VERSION + 1, RECIPE_VERSION - 1])
def test_a_recipe_of_another_version_is_refused(tmp_path: Path, version: object) -> None:
    out = compiled().save(tmp_path / "out")
    recipe = json.loads((out / "recipe.json").read_text())
    (out / "recipe.json").write_text(json.dumps({**recipe, "version": version}))
    with pytest.raises(QCompilerError, match=r"^the recipe (is of|has no) version [^\n]+\.$"):
        load(out)
