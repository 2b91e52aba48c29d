"""Running a stage: taps, what is left on disk and in the model, and one sentence for what ONNX Runtime refuses."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from qcompiler.core import ModelError
from qcompiler.graph.run import Runner, open_session, save_model, session_options
from tests.graph.tiny import tiny
from tests.graphs_int8 import feeds, float_mlp, weights


def test_taps_are_returned_beside_the_outputs_and_leave_no_trace() -> None:
    model = float_mlp()
    given = feeds()
    got = Runner(model, taps=["h2", "x", "y", "h2"], threads=1)(given)
    assert list(got) == ["y", "h2", "x"]
    np.testing.assert_array_equal(got["x"], given["x"])
    arrays = weights()
    hidden = np.maximum(given["x"] @ arrays["fc1.weight"] + arrays["fc1.bias"], 0)
    np.testing.assert_allclose(got["h2"], hidden, rtol=1e-5, atol=1e-6)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert not next(v for n in model.graph for v in n.outputs if v.name == "h2").is_graph_output()
    assert list(Runner(model, threads=1)(given)) == ["y"]


def test_an_unknown_tap_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(KeyError):
        Runner(float_mlp(), taps=["nothing"])


def test_surplus_feeds_are_left_out() -> None:
    given = feeds()
    runner = Runner(float_mlp(), threads=1)
    np.testing.assert_array_equal(runner({**given, "labels": np.zeros(3)})["y"], runner(given)["y"])


def test_what_fails_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="refuses the graph") as refused:
        Runner(tiny("g (float[B,4] x) => (float[B,4] y) { y = NoSuchOperator(x) }", {}))
    assert "\n" not in str(refused.value)
    with pytest.raises(ModelError, match="failed to run") as failed:
        Runner(float_mlp(), threads=1)({**feeds(), "x": np.zeros((2, 5, 3), np.float32)})
    assert "\n" not in str(failed.value)


def test_no_temporary_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    Runner(float_mlp(), threads=1)(feeds())
    with pytest.raises(ModelError):
        open_session(tiny("g (float[B,4] x) => (float[B,4] y) { y = NoSuchOperator(x) }", {}))
    assert list(tmp_path.iterdir()) == []


def test_save_puts_weights_beside_and_leaves_the_model_in_memory(tmp_path: Path) -> None:
    model = float_mlp()
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    save_model(model, tmp_path / "stage.onnx")
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before
    session = ort.InferenceSession(tmp_path / "stage.onnx", session_options(1))
    given = feeds()
    np.testing.assert_array_equal(
        session.run(["y"], {"x": given["x"], "attention_mask": given["attention_mask"]})[0],
        Runner(model, threads=1)(given)["y"],
    )


def test_a_stage_runs_in_float_arithmetic_and_not_as_onnx_runtime_would_fuse_it() -> None:
    """With its own fusions ONNX Runtime makes of this a MatMulNBits, which quantizes the float input."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.integers(-127, 128, (32, 32)).astype(np.int8),
        "s": rng.uniform(0.001, 0.002, 32).astype(np.float32),
        "z": np.zeros(32, np.int8),
    }
    text = """g (float[B,S,32] x) => (float[B,S,32] y) {
        r = Relu(x)
        d = DequantizeLinear<axis = 1>(w, s, z)
        y = MatMul(r, d)
    }"""
    model = tiny(text, arrays)
    x = rng.standard_normal((2, 16, 32)).astype(np.float32)
    exact = np.maximum(x, 0).astype(np.float64) @ (arrays["w"] * arrays["s"].astype(np.float64))
    staged, deployed = (
        np.abs(Runner(model, threads=1, as_deployed=fused)({"x": x})["y"] - exact).max() / np.abs(exact).max()
        for fused in (False, True)
    )
    assert staged < 1e-6
    assert deployed > 1e-4  # should this fail, ONNX Runtime has changed, and Runner needs no switch


def test_threads() -> None:
    assert session_options(3).intra_op_num_threads == 3
    assert session_options().intra_op_num_threads == 0
