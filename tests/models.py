"""Where real models and data lie, if they are on this machine; tests that need one skip with a reason without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
"""What a development checkout may have beside it: small models and data sets."""


def roots() -> list[Path]:
    """Folders that may hold models, in the order of preference."""
    chosen = os.environ.get("QCOMPILER_MODELS")
    return [*([Path(chosen)] if chosen else []), Path.home() / ".cache/qcompiler/models", SHARED / "models"]


def model(name: str) -> Path:
    """The Hugging Face folder of a real model; skips the test where there is none."""
    found = next((root / name for root in roots() if (root / name / "model.safetensors").is_file()), None)
    if found is None:
        pytest.skip(f"model {name} is not on this machine: run examples/fetch_models.py")
    return found


def data(name: str) -> Path:
    """A file of the shared data, e.g. ``wikitext2/test.txt``; skips the test where there is none."""
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"data {name} is not on this machine: it lies beside a development checkout only")
    return path
