"""cli: the commands one after the other, for people and as JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.calls import run, told_as_json
from tests.graphs_int8 import K


def test_compile_inspect_evaluate_bench(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    told = told_as_json(capsys, "compile", model, "-o", out, "--calibration", data, "--limit", 8, "--quiet")
    assert told["output"] == str(out)
    assert told["report"]["samples"] == 8
    assert (out / "model.onnx").is_file()

    inspected = told_as_json(capsys, "inspect", out)
    assert inspected["recipe"]["calibration"] == {"samples": 8}
    assert {row["weight"] for row in inspected["report"]["rows"]} == {"int8 per_channel static"}

    metrics = told_as_json(capsys, "evaluate", out, "--reference", model, "--data", data)
    assert metrics["samples"] == 16
    assert 20 < metrics["outputs"]["y"]["sqnr_db"] < 70

    timed = told_as_json(capsys, "bench", out, "--reference", model, "--shape", "4x8", "--repeats", 3)
    assert timed["timings"][0]["shape"] == [4, 8]
    assert timed["threads"] == 1


def test_tables_for_people(model: Path, data: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for words, arguments in (
        (["int8 per_channel", "Linears quantized", "2 of 2"], ["inspect", out]),
        ([f"{K}x24", "float32[batch, sequence, 16]"], ["inspect", model]),
        (["SQNR", "dB, cosine 0.9"], ["evaluate", out, "--reference", model, "--data", data]),
        (["1 thread, CPU time", "of the reference's latency"], ["bench", out, "--reference", model, "--repeats", 2]),
    ):
        assert run(*arguments) == 0
        text = capsys.readouterr().out
        for word in words:
            assert word in text, (arguments, text)


def test_help_says_what_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (
        ("compile", ["w8a8-dynamic", "ort-cpu", "smooth", "--force", "examples:"]),
        ("analyze", ["--metric", "cosine", "--html", "alone", "examples:"]),
        ("inspect", ["SRC|OUT"]),
        ("evaluate", ["--reference", "perplexity", "examples:"]),
        ("bench", ["--shape", "--threads", "8x128"]),
    ):
        with pytest.raises(SystemExit) as ended:
            run(command, "--help")
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words), text
