"""Meters against their definitions, in one piece and streamed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.numerics.metrics import (
    CosineMeter,
    LogitsMeter,
    PerplexityMeter,
    RowSumsMeter,
    SqnrMeter,
    cosine,
    kl_divergence,
    log_softmax,
    sqnr_db,
    top1_agreement,
)

RNG = np.random.default_rng(0)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64))
    return e / e.sum(-1, keepdims=True)


def test_sqnr_is_pooled_over_updates() -> None:
    ref = RNG.normal(size=(700, 5)).astype(np.float32)
    got = ref + np.float32(0.1)
    expected = 10 * np.log10((ref.astype(np.float64) ** 2).sum() / ((got.astype(np.float64) - ref) ** 2).sum())
    assert sqnr_db(ref, got) == pytest.approx(expected, rel=1e-9)
    meter = SqnrMeter()
    for part in np.split(np.arange(700), [1, 300]):
        meter.update(ref[part], got[part])
    assert meter.db == pytest.approx(expected, rel=1e-9)


def test_sqnr_at_its_ends() -> None:
    assert sqnr_db(np.ones(3), np.ones(3)) == math.inf
    assert sqnr_db(np.zeros(3), np.ones(3)) == -math.inf
    assert sqnr_db(np.array(2.0), np.array(1.0)) == pytest.approx(20 * np.log10(2))


def test_cosine_is_the_mean_over_rows() -> None:
    ref = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    got = np.array([[0.0, 2.0], [3.0, 3.0], [0.0, 0.0], [1.0, 0.0]])
    assert cosine(ref, got) == pytest.approx((0 + 1 + 1 + 0) / 4)
    meter = CosineMeter()
    meter.update(ref[:1], got[:1])
    meter.update(ref[1:], got[1:])
    assert meter.mean == pytest.approx(0.5)


def test_kl_divergence_and_top1() -> None:
    ref, got = RNG.normal(size=(2, 300, 7)), RNG.normal(size=(2, 300, 7))
    p, q = softmax(ref), softmax(got)
    assert kl_divergence(ref, got) == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    assert kl_divergence(ref, ref + 5.0) == pytest.approx(0, abs=1e-12)
    assert top1_agreement(ref, got) == pytest.approx((ref.argmax(-1) == got.argmax(-1)).mean())
    meter = LogitsMeter()
    meter.update(ref[0], got[0])
    meter.update(ref[1], got[1])
    assert meter.kl == pytest.approx(kl_divergence(ref, got))


def test_a_masked_class_costs_nothing() -> None:
    ref = np.array([[0.0, 1.0, -np.inf]])
    assert kl_divergence(ref, np.array([[0.0, 1.0, -np.inf]])) == pytest.approx(0)


def test_log_softmax_is_stable() -> None:
    x = np.array([[1e4, 0.0, -1e4]], np.float32)
    np.testing.assert_allclose(log_softmax(x), [[0.0, -1e4, -2e4]])


def test_perplexity_predicts_each_next_token() -> None:
    logits = RNG.normal(size=(3, 600, 11)).astype(np.float32)
    ids = RNG.integers(0, 11, (3, 600))
    p = np.take_along_axis(softmax(logits)[:, :-1], ids[:, 1:, None], -1)[..., 0]
    meter = PerplexityMeter()
    meter.update(logits[:2], ids[:2])
    meter.update(logits[2:], ids[2:])
    assert meter.tokens == 3 * 599
    assert meter.value == pytest.approx(np.exp(-np.log(p).mean()))


def test_perplexity_leaves_padding_out_on_either_side() -> None:
    logits, ids = RNG.normal(size=(1, 6, 5)), RNG.integers(0, 5, (1, 6))
    plain, padded = PerplexityMeter(), PerplexityMeter()
    plain.update(logits[:, 1:4], ids[:, 1:4])
    padded.update(logits, ids, np.array([[0, 1, 1, 1, 0, 0]]))
    assert padded.tokens == 2
    assert padded.value == pytest.approx(plain.value)


def test_a_uniform_guess_has_the_perplexity_of_the_vocabulary() -> None:
    meter = PerplexityMeter()
    meter.update(np.zeros((1, 9, 49)), np.arange(9)[None])
    assert meter.value == pytest.approx(49)


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        sqnr_db(np.zeros(3), np.zeros((3, 1)))


def test_nothing_seen_is_not_a_number() -> None:
    assert all(
        math.isnan(x) for x in (CosineMeter().mean, LogitsMeter().kl, LogitsMeter().top1, PerplexityMeter().value)
    )


@given(data=st.data())
def test_row_sums_stream_to_the_figures_of_whole_arrays(data: st.DataObject) -> None:
    rows, channels = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    ref = rng.normal(0, data.draw(st.sampled_from([1e-3, 1.0, 1e3])), (rows, channels)).astype(np.float32)
    got = ref + ref.std() * data.draw(st.sampled_from([0.0, 1e-4, 0.1, 3.0])) * rng.normal(size=ref.shape)
    got = (got * data.draw(st.sampled_from([1, -1]))).astype(np.float32)
    ref[rng.random(rows) < 0.2] = 0
    got[rng.random(rows) < 0.2] = 0
    err = got - ref
    sums = [np.square(ref).sum(-1), np.square(err).sum(-1), (ref * err).sum(-1)]  # in float32, as the graph sums
    meter = RowSumsMeter(channels)
    cut = data.draw(st.integers(0, rows))
    for part in (slice(0, cut), slice(cut, rows)):
        meter.update(*(array[part] for array in sums))
    assert meter.mse == pytest.approx(np.square(err, dtype=np.float64).mean(), rel=1e-5)
    assert meter.db == pytest.approx(sqnr_db(ref, got), abs=1e-4)
    assert meter.cosine == pytest.approx(cosine(ref, got), abs=2e-6)


def test_row_sums_keep_a_cosine_near_one() -> None:
    rng = np.random.default_rng(0)
    ref = rng.normal(size=(50, 64)).astype(np.float32)
    got = ref + np.float32(1e-4) * rng.normal(size=ref.shape).astype(np.float32)
    err = got - ref
    meter = RowSumsMeter(64)
    meter.update(np.square(ref).sum(-1), np.square(err).sum(-1), (ref * err).sum(-1))
    exact = 1 - cosine(ref.astype(np.float64), got.astype(np.float64))
    assert 1e-9 < exact < 1e-8
    assert 1 - meter.cosine == pytest.approx(exact, rel=1e-3)


def test_row_sums_without_products_know_no_cosine() -> None:
    meter = RowSumsMeter(2)
    assert math.isnan(meter.mse)
    meter.update(np.ones(3), np.zeros(3))
    assert (meter.mse, meter.db) == (0.0, math.inf)
    assert math.isnan(meter.cosine)
