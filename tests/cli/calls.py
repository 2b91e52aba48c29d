"""Commands as the tests call them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcompiler import cli


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def compile_model(model: Path, out: Path, data: Path, *more: object) -> int:
    return run("compile", model, "-o", out, "--calibration", data, *more)


def told_as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    """What the command prints with --json."""
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    result: dict = json.loads(capsys.readouterr().out)
    return result
