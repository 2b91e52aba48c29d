"""cli.compile: what it writes and tells."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from tests.cli.calls import compile_model, told_as_json
from tests.graphs_int8 import float_mlp


def test_dump_keeps_every_stage(model: Path, data: Path, tmp_path: Path) -> None:
    stages = tmp_path / "stages"
    assert (
        compile_model(model, tmp_path / "out", data, "--passes", "annotate,insert,fold", "--dump", stages, "--quiet")
        == 0
    )
    assert sorted(path.name for path in stages.iterdir()) == ["00-normalise", "01-annotate", "02-insert", "03-fold"]
    for stage in stages.iterdir():
        onnx.checker.check_model(str(stage / "model.onnx"))


def test_ignored_linears_say_so(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = told_as_json(capsys, "inspect", model)["linears"][0]["name"]
    assert compile_model(model, tmp_path / "out", data, "--ignore", first, "--quiet") == 0
    rows = {row["name"]: row for row in told_as_json(capsys, "inspect", tmp_path / "out")["report"]["rows"]}
    assert rows[first]["weight"] == "float"
    assert first in rows[first]["reason"]


def test_progress_goes_to_stderr(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_model(model, tmp_path / "out", data, "--json") == 0
    captured = capsys.readouterr()
    json.loads(captured.out)
    assert "normalise" in captured.err
    assert compile_model(model, tmp_path / "out2", data, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_missing_external_data_is_one_sentence(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "external.onnx"
    ir.save(float_mlp(), path, external_data="external.data", size_threshold_bytes=0)
    (tmp_path / "external.data").unlink()
    assert compile_model(path, tmp_path / "o", data, "--quiet") == 2
    assert re.fullmatch(r"qcompiler: [^\n]*external\.data[^\n]*\n", capsys.readouterr().err)


def test_max_drop(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_model(model, tmp_path / "out", data, "--quiet", "--max-drop", "sqnr=20") == 0
    text = capsys.readouterr().out
    assert "sqnr=20 holds" in text
    assert "samples that the search did not see" in " ".join(text.split())
    for given, words in (("sqnr", "write METRIC=LIMIT"), ("sqnr=x", "write METRIC=LIMIT"), ("snr=2", "'sqnr'")):
        assert compile_model(model, tmp_path / "none", data, "--quiet", "--max-drop", given) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
