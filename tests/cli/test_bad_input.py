"""cli: what cannot be used is one sentence and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.cli.calls import run
from tests.graphs_int8 import K, feeds


def _truncated(model: Path, data: Path, tmp_path: Path) -> list[object]:
    path = tmp_path / "short.onnx"
    path.write_bytes(model.read_bytes()[:200])
    return ["compile", path, "-o", tmp_path / "o", "--calibration", data]


def _text(model: Path, data: Path, tmp_path: Path) -> list[object]:
    path = tmp_path / "text.onnx"
    path.write_text("this is not a model")
    return ["compile", path, "-o", tmp_path / "o", "--calibration", data]


def _no_linear(model: Path, data: Path, tmp_path: Path) -> list[object]:
    path = tmp_path / "relu.onnx"
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), path)
    np.savez(tmp_path / "x.npz", x=np.ones((2, 4), np.float32))
    return ["compile", path, "-o", tmp_path / "o", "--calibration", tmp_path / "x.npz"]


def _bad_data(**arrays: np.ndarray):  # type: ignore[no-untyped-def]
    def make(model: Path, data: Path, tmp_path: Path) -> list[object]:
        np.savez(tmp_path / "bad.npz", **arrays)
        return ["compile", model, "-o", tmp_path / "o", "--calibration", tmp_path / "bad.npz"]

    return make


def _options(*more: object):  # type: ignore[no-untyped-def]
    return lambda model, data, tmp_path: ["compile", model, "-o", tmp_path / "o", "--calibration", data, *more]


def _existing(model: Path, data: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "o").mkdir()
    return ["compile", model, "-o", tmp_path / "o", "--calibration", data]


def _analyze(*more: object):  # type: ignore[no-untyped-def]
    return lambda model, data, tmp_path: [
        "analyze",
        model,
        "--calibration",
        data,
        *(tmp_path / m if isinstance(m, Path) else m for m in more),
    ]


_NAN = {**feeds(), "x": np.full((2, 5, K), np.nan, np.float32)}
_BAD = {
    "not onnx": (_text, "text.onnx"),
    "truncated": (_truncated, "short.onnx"),
    "no such file": (lambda m, d, t: ["inspect", t / "nowhere.onnx"], "nowhere.onnx"),
    "no linear": (_no_linear, "Linear"),
    "nan": (_bad_data(**_NAN), "NaN"),
    "empty": (_bad_data(), ""),
    "wrong name": (_bad_data(z=np.zeros(3, np.float32)), "'z'"),
    "wrong rank": (_bad_data(**{**feeds(), "x": np.zeros((2, K), np.float32)}), "rank 2"),
    "wrong dtype": (_bad_data(**{**feeds(), "attention_mask": np.ones((2, 5), np.float32)}), "dtype float32"),
    "scheme": (_options("--scheme", "w8a9"), "did you mean 'w8a8'"),
    "target": (_options("--target", "ort-gpu"), "did you mean 'ort-cpu'"),
    "target option": (_options("--target", "onnx{from=qdq}"), "did you mean 'form'"),
    "pass": (_options("--passes", "smoth,insert"), "did you mean 'smooth'"),
    "pass option": (_options("--passes", "smooth{alfa=0.5}"), "did you mean 'alpha'"),
    "ignore": (_options("--ignore", "nothing.*"), "matches no Linear"),
    "bits": (_options("--bits", "nothing.*=16"), "matches no Linear"),
    "size": (_options("--max-size", "much"), "write bytes, or a text like '40MB'"),
    "bits without a number": (_options("--bits", "*down*"), "write GLOB=BITS"),
    "limit": (_options("--limit", "0"), "limit is 0"),
    "existing": (_existing, "--force"),
    "no calibration": (lambda m, d, t: ["compile", m, "-o", t / "o"], "calibration"),
    "metric": (_analyze("--metric", "sqnrr"), "did you mean 'sqnr'"),
    "top": (_analyze("--top", "0"), "top is 0"),
    "nothing to measure on": (lambda m, d, t: ["analyze", m, "--scheme", "w8a8-dynamic"], "--data"),
    "no folder for the page": (_analyze("--html", Path("nowhere/report.html")), "there is no folder"),
    "a folder for a page": (_analyze("--html", Path(".")), "is a folder"),
    "existing page": (_analyze("--html", Path("data.npz")), "--force"),
    "existing json": (_analyze("--json", Path("data.npz")), "--force"),
    "not compiled": (lambda m, d, t: ["evaluate", t, "--reference", m, "--data", d], "recipe.json"),
}


@pytest.mark.parametrize("case", _BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    case: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = _BAD[case]
    arguments = make(model, data, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    quiet = ["--quiet"] if arguments[0] in ("compile", "analyze") else []
    assert run(*arguments, *quiet) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"qcompiler: [^\n]+\n", captured.err), captured.err
    assert words in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_options_of_the_other_commands(
    model: Path, data: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, arguments in (
        ("write BATCHxSEQUENCE", ["bench", out, "--reference", model, "--shape", "8by4"]),
        ("is a compiled model", ["bench", out, "--reference", out]),
        ("repeats=0", ["bench", out, "--reference", model, "--repeats", 0]),
        ("there is no file or folder", ["evaluate", out, "--reference", model, "--data", "nothing.npz"]),
    ):
        capsys.readouterr()
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
