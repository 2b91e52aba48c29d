"""max_drop on real models: the limit holds on data that neither search nor validation saw, and cost follows it.

Calibration and test data are alike, as the promise is meant: a margin covers chance, not another kind of data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import qcompiler
from benchmarks import protocol
from qcompiler.frontends import open_data, open_source
from qcompiler.frontends.source import Source
from qcompiler.graph.run import Runner
from qcompiler.runtime.evaluate import Metrics, evaluate
from tests import models
from tests.test_real_models import SMILES

pytestmark = pytest.mark.slow


def compiled(source: Source, calibration: Any, **max_drop: float) -> qcompiler.CompiledModel:
    return qcompiler.compile(source.model, calibration=calibration, max_drop=max_drop, progress=False)


def told(model: qcompiler.CompiledModel, what: str) -> str:
    return next(note.why for note in model.report.notes if note.node == "max_drop" and note.what.startswith(what))


def predicted(model: qcompiler.CompiledModel) -> float:
    """Microseconds of the Linears, as the report tells them."""
    return float(told(model, "predicted").split()[0])


def compare(
    source: Source, calibration: Any, test: Any, metric: str, limits: Sequence[float]
) -> list[tuple[qcompiler.CompiledModel, Metrics]]:
    """One compile for each limit, from loose to strict, each measured on the test data; costs may not fall."""
    results = []
    for limit in limits:
        model = compiled(source, calibration, **{metric: limit})
        results.append((model, evaluate(model, source.model, test)))
        print(metric, limit, told(model, metric), "|", predicted(model), told(model, "sites"), "|", results[-1][1])
    costs = [predicted(model) for model, _ in results]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]
    return results


def test_minilm_holds_its_sqnr(minilm: Path) -> None:
    """All genres of STS-B dev for the search, other sentences of STS-B test for the proof."""
    models.data("stsb/dev.csv")
    calibration = protocol.encode(minilm, protocol.stsb("dev", 0)[::11][:128])
    test = protocol.encode(minilm, protocol.minilm_evaluation())
    limits = (20, 25, 29)
    for limit, (_, metrics) in zip(
        limits, compare(open_source(minilm), calibration, test, "sqnr", limits), strict=True
    ):
        assert min(output.sqnr_db for output in metrics.outputs.values()) >= limit


def stories(source: Source, count: int, length: int, seed: int) -> list[dict[str, npt.NDArray[np.int64]]]:
    """Batches of what the model tells by itself: sampled token by token from its own probabilities."""
    runner, random = Runner(source.model, threads=1), np.random.default_rng(seed)
    ids = np.full((count, 1), 1, np.int64)
    while ids.shape[1] < length:
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        logits = runner({name: feeds[name] for name in runner.inputs})["logits"][:, -1]
        # Gumbel's trick: the largest of logits + Gumbel noise is a sample of their softmax.
        ids = np.append(ids, (logits + random.gumbel(size=logits.shape)).argmax(-1)[:, None], axis=1)
    return [{"input_ids": ids[i : i + 4]} for i in range(0, count, 4)]


def test_stories260k_holds_its_perplexity(stories260k: Path, tmp_path: Path) -> None:
    """The model's own samples for the search, the five real stories for the proof."""
    source = open_source(stories260k)
    calibration = stories(source, count=64, length=128, seed=0)
    test = open_data(models.data("tinystories/sample.txt"), source, seq_len=128)
    limits = (0.02, 0.005, 0.002)
    for limit, (_, metrics) in zip(limits, compare(source, calibration, test, "perplexity", limits), strict=True):
        assert metrics.perplexity <= (1 + limit) * metrics.reference_perplexity


def reactions(molecules: Sequence[str], count: int, seed: int) -> list[str]:
    """Strings of the form that the model knows: two reactants and a product, of these molecules."""
    random = np.random.default_rng(seed)
    return ["{}.{}>>{}".format(*random.choice(molecules, 3)) for _ in range(count)]


def test_rxnmapper_holds_its_cosine(rxnmapper: Path) -> None:
    """Other reactions of the same molecules for the proof."""
    source = open_source(rxnmapper)
    calibration = open_data(reactions(SMILES, 96, seed=0), source)
    test = open_data(reactions(SMILES, 96, seed=1), source)
    limits = (1e-3, 3e-4, 1e-4)
    for limit, (_, metrics) in zip(limits, compare(source, calibration, test, "cosine", limits), strict=True):
        assert 1 - metrics.outputs["logits"].cosine <= limit
