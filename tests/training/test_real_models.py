"""MiniLM and stories260k in torch, rebuilt from their graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")
from tests.training.twins import canonical, nodes_apart, outputs_apart


def minilm_feeds() -> dict[str, npt.NDArray[Any]]:
    ids = np.random.default_rng(0).integers(1000, 20000, (4, 20))
    mask = (np.arange(20) < np.array([[20], [15], [7], [1]])).astype(np.int64)
    return {"input_ids": np.where(mask == 1, ids, 0), "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def story_feeds() -> dict[str, npt.NDArray[Any]]:
    ids = np.random.default_rng(0).integers(3, 512, (2, 40))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm", "stories260k"])
def test_a_real_model_computes_the_same(name: str, request: pytest.FixtureRequest) -> None:
    """Float: whole forwards. Fake-quantized: node by node, since a number that moves across the border between two
    integers moves others in every layer after it (MiniLM's outputs are 2 % apart in the end, less than int8 costs)."""
    folder: Path = request.getfixturevalue(name)
    feeds = minilm_feeds() if name == "minilm" else story_feeds()
    exact, quantized = canonical(folder, "w4a8")
    assert outputs_apart(exact, feeds) <= 1e-5
    apart = nodes_apart(quantized, feeds)
    assert max(apart.values()) <= 1e-5, max(apart, key=lambda value: apart[value])
