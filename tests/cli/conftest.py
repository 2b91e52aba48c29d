"""A small model, data for it, and what became of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.cli.calls import compile_model
from tests.graphs_int8 import feeds, float_mlp


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


@pytest.fixture
def out(model: Path, data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "out"
    assert compile_model(model, path, data, "--target", "onnx", "--quiet") == 0
    return path
