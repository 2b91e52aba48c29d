"""cli.analyze: page, JSON, table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.calls import run, told_as_json


def test_analyze_writes_a_page_and_json_and_prints_a_table(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, file = tmp_path / "report.html", tmp_path / "report.json"
    command = ["analyze", model, "--calibration", data, "--quiet", "--html", page, "--json", file]
    assert run(*command) == 0
    captured = capsys.readouterr()
    assert "worst Linears by SQNR in dB, alone" in captured.out
    assert "2 of 2 Linears" in captured.out
    assert captured.err == ""
    found = json.loads(file.read_text())
    assert found["version"] == 1
    assert [layer["weight_bits"] for layer in found["layers"]] == [8, 8]
    assert page.read_text().count("<svg") == 3

    assert run(*command) == 2
    assert "--force" in capsys.readouterr().err
    before = page.read_bytes(), file.read_bytes()
    assert run(*command, "--force") == 0
    assert (page.read_bytes(), file.read_bytes()) == before  # the same input, the same bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "mlp.onnx", "report.html", "report.json"]

    told = told_as_json(
        capsys, "analyze", model, "--data", data, "--scheme", "w8a8-dynamic", "--metric", "mse", "--quiet"
    )
    assert told["metric"] == "mse"
    assert [layer["activation"] for layer in told["layers"]] == ["uint8 per_token dynamic"] * 2
    assert told["samples"] == 16
