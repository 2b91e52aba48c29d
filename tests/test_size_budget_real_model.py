"""max_size on a real model: the size is kept, and the more of it, the less is lost."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

import qcompiler
from qcompiler.frontends import open_source
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.run import Feeds, Runner
from qcompiler.numerics.metrics import kl_divergence
from tests import models


@pytest.mark.slow
def test_sizes_are_kept_and_loss_falls_with_them(tmp_path: Path) -> None:
    """KL divergence in nats a token, on sequences that the model sampled itself and calibration did not see.

    Measured at the size of four bits everywhere: 0.083, and 0.072 with four bits everywhere: no gain there.
    """
    folder = models.model("stories260k")
    calibration, held_back = sampled(folder)

    def loss(name: str, **options: int) -> float:
        compiled = qcompiler.compile(
            folder,
            scheme="w4a16",
            passes="annotate,insert,clip_weights,fold",
            calibration=calibration,
            output=tmp_path / name,
            progress=False,
            **options,
        )
        runner = Runner(compiled.model, threads=1, as_deployed=True)
        reference = Runner(source.model, threads=1)
        return kl_divergence(reference(held_back)["logits"], runner(held_back)["logits"])

    source = open_source(folder)
    canonicalise(source.model)
    uniform = loss("uniform")
    size = saved(tmp_path / "uniform")
    losses = {}
    for budget in (size * 9 // 10, size, size * 12 // 10):
        losses[budget] = loss(str(budget), max_size=budget)
        assert saved(tmp_path / str(budget)) <= budget
    assert all(a > b for a, b in itertools.pairwise(losses.values()))
    assert losses[size] < 1.5 * uniform


def saved(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


def sampled(folder: Path, count: int = 48, length: int = 48) -> tuple[list[Feeds], Feeds]:
    """Sequences sampled from BOS on at temperature 1: five batches to calibrate on, one held back."""
    source = open_source(folder)
    canonicalise(source.model)
    exact, rng = Runner(source.model, threads=1), np.random.default_rng(0)
    ids = np.ones((count, 1), np.int64)
    while ids.shape[1] < length:
        logits = exact({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"][:, -1]
        ids = np.concatenate([ids, (logits + rng.gumbel(size=logits.shape)).argmax(-1)[:, None]], axis=1)
    feeds = [{"input_ids": part, "attention_mask": np.ones_like(part)} for part in np.split(ids, 6)]
    return feeds[:-1], feeds[-1]
