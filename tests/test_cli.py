import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler import cli
from tests.graphs_int8 import K, feeds, float_mlp


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "mlp.onnx"
    ir.save(float_mlp(), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, **feeds(batch=16, sequence=6))
    return path


def _run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def _compile(model: Path, out: Path, data: Path, *more: object) -> int:
    return _run("compile", model, "-o", out, "--calibration", data, *more)


def _json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    capsys.readouterr()
    assert _run(*arguments, "--json") == 0
    result: dict = json.loads(capsys.readouterr().out)
    return result


@pytest.fixture
def out(model: Path, data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "out"
    assert _compile(model, path, data, "--target", "onnx", "--quiet") == 0
    return path


def test_compile_inspect_evaluate_bench(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    told = _json(capsys, "compile", model, "-o", out, "--calibration", data, "--limit", 8, "--quiet")
    assert told["output"] == str(out)
    assert told["report"]["samples"] == 8
    assert (out / "model.onnx").is_file()

    inspected = _json(capsys, "inspect", out)
    assert inspected["recipe"]["calibration"] == {"samples": 8}
    assert {row["weight"] for row in inspected["report"]["rows"]} == {"int8 per_channel static"}

    metrics = _json(capsys, "evaluate", out, "--reference", model, "--data", data)
    assert metrics["samples"] == 16
    assert 20 < metrics["outputs"]["y"]["sqnr_db"] < 70

    timed = _json(capsys, "bench", out, "--reference", model, "--shape", "4x8", "--repeats", 3)
    assert timed["timings"][0]["shape"] == [4, 8]
    assert timed["threads"] == 1


def test_analyze_writes_a_page_and_json_and_prints_a_table(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, file = tmp_path / "report.html", tmp_path / "report.json"
    command = ["analyze", model, "--calibration", data, "--quiet", "--html", page, "--json", file]
    assert _run(*command) == 0
    captured = capsys.readouterr()
    assert "worst Linears by SQNR in dB, alone" in captured.out
    assert "2 of 2 Linears" in captured.out
    assert captured.err == ""
    found = json.loads(file.read_text())
    assert found["version"] == 1
    assert [layer["weight_bits"] for layer in found["layers"]] == [8, 8]
    assert page.read_text().count("<svg") == 3

    assert _run(*command) == 2
    assert "--force" in capsys.readouterr().err
    before = page.read_bytes(), file.read_bytes()
    assert _run(*command, "--force") == 0
    assert (page.read_bytes(), file.read_bytes()) == before  # the same input, the same bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "mlp.onnx", "report.html", "report.json"]

    told = _json(capsys, "analyze", model, "--data", data, "--scheme", "w8a8-dynamic", "--metric", "mse", "--quiet")
    assert told["metric"] == "mse"
    assert [layer["activation"] for layer in told["layers"]] == ["uint8 per_token dynamic"] * 2
    assert told["samples"] == 16


def test_tables_for_people(model: Path, data: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for words, arguments in (
        (["int8 per_channel", "Linears in integers", "2 of 2"], ["inspect", out]),
        ([f"{K}x24", "float32[batch, sequence, 16]"], ["inspect", model]),
        (["SQNR", "dB, cosine 0.9"], ["evaluate", out, "--reference", model, "--data", data]),
        (["1 thread, CPU time", "of the reference's latency"], ["bench", out, "--reference", model, "--repeats", 2]),
    ):
        assert _run(*arguments) == 0
        text = capsys.readouterr().out
        for word in words:
            assert word in text, (arguments, text)


def test_inspect_describes_a_source(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, "inspect", model)
    assert [(row["in_features"], row["out_features"], row["bias"]) for row in found["linears"]] == [
        (16, 24, True),
        (24, 16, True),
    ]
    assert [row["head"] for row in found["linears"]] == [False, True]
    (site,) = found["sites"]
    assert (site["kind"], site["free"], site["sinks"]) == ("linear", 24, [found["linears"][1]["name"]])  # through Relu
    assert found["norms"] == {}
    assert found["inputs"] == {"x": "float32[batch, sequence, 16]", "attention_mask": "int64[batch, sequence]"}


def test_dump_keeps_every_stage(model: Path, data: Path, tmp_path: Path) -> None:
    stages = tmp_path / "stages"
    assert _compile(model, tmp_path / "out", data, "--passes", "annotate,insert,fold", "--dump", stages, "--quiet") == 0
    assert sorted(path.name for path in stages.iterdir()) == ["00-normalise", "01-annotate", "02-insert", "03-fold"]
    for stage in stages.iterdir():
        onnx.checker.check_model(str(stage / "model.onnx"))


def test_ignored_linears_say_so(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = _json(capsys, "inspect", model)["linears"][0]["name"]
    assert _compile(model, tmp_path / "out", data, "--ignore", first, "--quiet") == 0
    rows = {row["name"]: row for row in _json(capsys, "inspect", tmp_path / "out")["report"]["rows"]}
    assert rows[first]["weight"] == "float"
    assert first in rows[first]["reason"]


def test_progress_goes_to_stderr(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _compile(model, tmp_path / "out", data, "--json") == 0
    captured = capsys.readouterr()
    json.loads(captured.out)
    assert "normalise" in captured.err
    assert _compile(model, tmp_path / "out2", data, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_help_says_what_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (
        ("compile", ["w8a8-dynamic", "ort-cpu", "smooth", "--force", "examples:"]),
        ("analyze", ["--metric", "cosine", "--html", "alone", "examples:"]),
        ("inspect", ["SRC|OUT"]),
        ("evaluate", ["--reference", "perplexity", "examples:"]),
        ("bench", ["--shape", "--threads", "8x128"]),
    ):
        with pytest.raises(SystemExit) as ended:
            _run(command, "--help")
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words), text


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
    assert _run(*arguments, *quiet) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"qcompiler: [^\n]+\n", captured.err), captured.err
    assert words in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_external_data_is_one_sentence(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "external.onnx"
    ir.save(float_mlp(), path, external_data="external.data", size_threshold_bytes=0)
    (tmp_path / "external.data").unlink()
    assert _compile(path, tmp_path / "o", data, "--quiet") == 2
    assert re.fullmatch(r"qcompiler: [^\n]*external\.data[^\n]*\n", capsys.readouterr().err)


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
        assert _run(*arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_max_drop(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _compile(model, tmp_path / "out", data, "--quiet", "--max-drop", "sqnr=20") == 0
    text = capsys.readouterr().out
    assert "sqnr=20 holds" in text
    assert "samples that the search did not see" in " ".join(text.split())
    for given, words in (("sqnr", "write METRIC=LIMIT"), ("sqnr=x", "write METRIC=LIMIT"), ("snr=2", "'sqnr'")):
        assert _compile(model, tmp_path / "none", data, "--quiet", "--max-drop", given) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
