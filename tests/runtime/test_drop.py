"""max_drop: what may be written, what fits which model, and the figures of hand-made outputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from qcompiler.core import DataError, OptionError
from qcompiler.numerics.metrics import PerplexityMeter, cosine, kl_divergence, sqnr_db
from qcompiler.runtime.drop import Drop, MaxDrop

RNG = np.random.default_rng(0)


def worst(want: Any, have: Any, feeds: Any) -> float:
    return float(max(np.abs(want[name] - have[name]).max() for name in want))


def logits(batch: int = 4, length: int = 6, noise: float = 0.1) -> tuple[Any, Any, Any]:
    want = RNG.standard_normal((batch, length, 11)).astype(np.float32)
    have = want + noise * RNG.standard_normal(want.shape).astype(np.float32)
    return {"logits": want}, {"logits": have}, {"input_ids": RNG.integers(0, 11, (batch, length))}


def measured(allowed: MaxDrop, *batches: tuple[Any, Any, Any]) -> Drop:
    drop = Drop(allowed)
    for batch in batches:
        drop.update(*batch)
    return drop


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (26.0, "write one metric"),
        ({}, "write one metric"),
        ({"sqnr": 26, "kl": 0.1}, "write one metric"),
        ((worst,), "write one metric"),
        (("sqnr", 26), "write one metric"),
        ({"snqr": 26}, "did you mean 'sqnr'"),
        ({"sqnr": math.nan}, "a finite number is wanted"),
        ({"kl": math.inf}, "a finite number is wanted"),
        ({"kl": "0.1"}, "a finite number is wanted"),
        ({"kl": True}, "a finite number is wanted"),
        ({"cosine": -0.1}, "not negative"),
        ((worst, math.nan), "a finite number is wanted"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        MaxDrop.parse(given)


def test_what_is_written_is_read() -> None:
    assert MaxDrop.parse({"sqnr": np.float32(26)}) == MaxDrop("sqnr", 26.0)
    allowed = MaxDrop.parse((worst, -1))
    assert (allowed.name, allowed.limit, allowed.compare) == (f"{__name__}.worst", -1.0, worst)


@pytest.mark.parametrize(
    ("name", "kind", "outputs", "words"),
    [
        ("perplexity", "encoder", ["logits"], "needs a causal language model"),
        ("perplexity", "causal-lm", ["hidden"], "needs a causal language model"),
        ("kl", "encoder", ["last_hidden_state"], "needs an output named like 'logits'"),
        ("sqnr", "graph", [], "needs one"),
    ],
)
def test_a_metric_that_does_not_fit_the_model_is_refused(name: str, kind: str, outputs: list[str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        MaxDrop(name, 1.0).check(kind, outputs)
    MaxDrop(name, 1.0).check("causal-lm", ["logits"])


def test_figures_are_those_of_the_meters() -> None:
    batches = [logits(), logits(batch=3)]
    want = np.concatenate([b[0]["logits"].reshape(-1, 11) for b in batches])
    have = np.concatenate([b[1]["logits"].reshape(-1, 11) for b in batches])
    found = {name: measured(MaxDrop(name, 1.0), *batches).verdict() for name in ("sqnr", "cosine", "kl", "perplexity")}
    assert -10 * math.log10(found["sqnr"].ratio) == pytest.approx(sqnr_db(want, have), abs=1e-6)
    assert found["cosine"].ratio == pytest.approx(1 - cosine(want, have), abs=1e-9)
    assert found["kl"].ratio == pytest.approx(kl_divergence(want, have), rel=1e-9)
    meters = PerplexityMeter(), PerplexityMeter()
    for batch in batches:
        for meter, outputs in zip(meters, batch[:2], strict=True):
            meter.update(outputs["logits"], batch[2]["input_ids"])
    assert math.exp(found["perplexity"].ratio) == pytest.approx(meters[1].value / meters[0].value, rel=1e-9)
    assert all(verdict.samples == 7 and verdict.bound > verdict.ratio for verdict in found.values())


def test_padding_does_not_count() -> None:
    want, have, feeds = logits()
    mask = np.ones((4, 6), np.int64)
    mask[1, 3:] = 0
    spoilt = {"logits": np.where(mask[..., None] == 1, have["logits"], 100).astype(np.float32)}
    for name in ("sqnr", "cosine", "kl", "perplexity"):
        verdicts = [
            measured(MaxDrop(name, 1.0), (want, each, {**feeds, "attention_mask": mask})).verdict()
            for each in (have, spoilt)
        ]
        assert verdicts[0] == verdicts[1]
        assert verdicts[0] != measured(MaxDrop(name, 1.0), (want, have, feeds)).verdict()


def test_the_worst_output_counts() -> None:
    want, have, feeds = logits()
    pair = {**want, "pooled": want["logits"][:, 0]}, {**have, "pooled": 2 * want["logits"][:, 0]}, feeds
    verdict = measured(MaxDrop("sqnr", 10.0), pair).verdict()
    assert (verdict.output, verdict.ratio) == ("pooled", pytest.approx(1.0))
    assert not verdict.holds(MaxDrop("sqnr", 10.0))
    integers = {**want, "ids": feeds["input_ids"]}, {**have, "ids": feeds["input_ids"] + 1}, feeds
    assert measured(MaxDrop("sqnr", 10.0), integers).verdict().output == "logits"


def test_the_limit_is_in_the_users_units() -> None:
    """20 dB of noise: holds at 18, not at 22; 3 % of perplexity likewise."""
    batches = [logits(noise=0.1) for _ in range(8)]
    verdict = measured(MaxDrop("sqnr", 0.0), *batches).verdict()
    assert verdict.holds(MaxDrop("sqnr", 18.0))
    assert not verdict.holds(MaxDrop("sqnr", 22.0))
    assert MaxDrop("perplexity", 0.03).ratio == pytest.approx(math.log(1.03))
    assert MaxDrop("perplexity", 0.03).text(math.log(1.03)) == "+3.000%"
    assert MaxDrop("sqnr", 20.0).text(0.01) == "20.00 dB"


def test_a_callable_is_averaged_over_batches() -> None:
    allowed = MaxDrop.parse((lambda want, have, feeds: len(feeds["input_ids"]) / 10, 0.5))
    verdict = measured(allowed, logits(batch=2), logits(batch=6)).verdict()
    assert verdict.ratio == pytest.approx((2 * 0.2 + 6 * 0.6) / 8)
    assert verdict.samples == 2


@pytest.mark.parametrize("value", [math.nan, None, "0", [1.0]])
def test_a_callable_that_returns_no_number_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match="returned"):
        measured(MaxDrop.parse((lambda *_: value, 1.0)), logits())


def test_outputs_that_are_not_finite_never_hold() -> None:
    want, have, feeds = logits()
    have["logits"][0, 0, 0] = np.nan
    for name in ("sqnr", "cosine", "kl", "perplexity"):
        assert not measured(MaxDrop(name, 1e9), (want, have, feeds)).verdict().holds(MaxDrop(name, 1.0))


def test_one_sample_has_no_spread() -> None:
    with pytest.raises(DataError, match="two validation samples"):
        measured(MaxDrop("sqnr", 1.0), logits(batch=1)).verdict()


def test_what_orders_the_sites_adds_up() -> None:
    assert MaxDrop("perplexity", 0.1).ordering().name == "kl"
    assert MaxDrop.parse((worst, 1.0)).ordering().name == "sqnr"
    assert MaxDrop("cosine", 0.1).ordering().name == "cosine"
