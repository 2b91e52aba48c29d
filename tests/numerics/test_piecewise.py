"""Piecewise scales: a smoothing scale by pieces, a search that never ends worse than where it began."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.core import OptionError
from qcompiler.numerics.affine import dequantize_weight, fake_quantize, quantize_weight, scale_zero_point
from qcompiler.numerics.piecewise import Piece, Piecewise, bounds_between, search_piecewise
from qcompiler.numerics.piecewise_judge import Methods, PieceJudge, cheap_error, thinned
from qcompiler.numerics.site_judge import Reader, Transform, held_out
from qcompiler.numerics.site_search import SiteSearch
from qcompiler.numerics.smoothing import smoothing_scale
from qcompiler.scheme import TensorSpec

STATIC = TensorSpec("uint8", symmetric=False)
PER_TOKEN = TensorSpec("uint8", True, "per_token", dynamic=True)
WEIGHT = TensorSpec("int8", granularity="per_channel")
CHANNELS = 48
LOUD = np.repeat([200.0, 20.0, 1.0], [3, 9, 36]).astype(np.float32)

absmaxes = hnp.arrays(np.float32, st.integers(2, 40), elements=st.floats(0, 1e4, width=32))


def site(seed: int = 0, n: int = 240) -> Reader:
    """Three kinds of channels, whose weights are as different."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, CHANNELS)) * LOUD).astype(np.float32)
    weight = (rng.normal(size=(CHANNELS, 24)) / np.sqrt(LOUD)[:, None]).astype(np.float32)
    fold = np.arange(n) // 5 % 4
    low, high = (np.stack([of(x[fold == f], axis=0) for f in range(4)]) for of in (np.min, np.max))
    return Reader(x, fold, low, high, weight, np.arange(CHANNELS))


def absmax(reader: Reader) -> np.ndarray:
    return np.abs(reader.rows).max(0)


def test_pieces_are_parted_where_loudness_jumps() -> None:
    first, second = bounds_between(LOUD, 3)
    assert 20 < first < 200
    assert 1 < second < 20
    assert bounds_between(LOUD, 1) == bounds_between(np.zeros(5), 3) == bounds_between(np.ones(5), 3) == ()


@given(absmaxes, st.integers(1, 5))
def test_bounds_fall_and_leave_no_piece_empty(x: np.ndarray, count: int) -> None:
    bounds = np.array(bounds_between(x, count))
    assert len(bounds) < count
    assert (np.diff(bounds) < 0).all()
    sizes = np.histogram(x[x > 0], np.concatenate([[0], bounds[::-1], [np.inf]]))[0]
    assert not len(bounds) or (sizes > 0).all()


@given(absmaxes, st.sampled_from([None, 0.0, 0.5, 1.0]), st.floats(0.1, 10))
def test_one_piece_is_smoothquant_times_a_factor(x: np.ndarray, alpha: float | None, factor: float) -> None:
    weight = np.linspace(0, 2, len(x), dtype=np.float32)
    scale = Piecewise((), (Piece(alpha, factor),), 2.0).scale(x, weight)
    live = (x > 0) & (weight > 0)
    smooth = np.ones(len(x)) if alpha is None else smoothing_scale(x, weight, alpha, floor=2.0)
    np.testing.assert_allclose(scale, np.where(live, smooth * factor, 1), rtol=1e-5)
    assert scale.dtype == np.float32
    assert (scale > 0).all()


def test_each_piece_has_its_own_rule() -> None:
    reader = site()
    x, w = absmax(reader), np.abs(reader.weight).max(1)
    scale = Piecewise((100.0, 10.0), (Piece(0.8), Piece(None, 3.0), Piece(0.5, 2.0))).scale(x, w)
    np.testing.assert_array_equal(scale[:3], smoothing_scale(x, w, 0.8)[:3])
    np.testing.assert_array_equal(scale[3:12], 3)
    np.testing.assert_array_equal(scale[12:], smoothing_scale(x, w, 0.5)[12:] * 2)


def test_the_loudest_piece_comes_first_and_every_number_may_be_tried() -> None:
    """Judged by a made-up error, whose minimum is known."""
    wanted = (Piece(0.9, 2.0), Piece(None), Piece(0.5, 2.0))
    asked: list[Piecewise] = []

    def error(candidate: Piecewise) -> float:
        asked.append(candidate)
        if len(candidate.pieces) != 3:
            return 100.0
        pairs = zip(candidate.pieces, wanted, strict=True)
        return sum((a.alpha != b.alpha) + 0.1 * (a.factor != b.factor) for a, b in pairs)

    options = {"alphas": (0.5, 0.9), "factors": (2.0,)}
    assert search_piecewise(LOUD, error, pieces=3, **options).pieces == wanted
    changed = [next((i for i, p in enumerate(c.pieces) if p != c.pieces[-1]), None) for c in asked[3:6]]
    assert 0 in changed
    asked.clear()
    assert search_piecewise(LOUD, error, pieces=4, search_pieces=True, **options).pieces == wanted
    assert {len(candidate.pieces) for candidate in asked} == {1, 2, 3}  # LOUD has but three kinds of channels


@pytest.mark.parametrize("spec", [STATIC, PER_TOKEN], ids=str)
@pytest.mark.parametrize("loss", ["mse", "mae", "cosine"])
def test_pieces_beat_one_strength(spec: TensorSpec, loss: str) -> None:
    reader = site()
    search = SiteSearch([reader], spec, WEIGHT, channels=CHANNELS)
    error = cheap_error(search, Methods(loss), rows=240, outputs=24)
    one, three = (search_piecewise(absmax(reader), error, pieces=pieces) for pieces in (1, 3))
    plain = error(Piecewise((), (Piece(),)))
    assert error(three) <= error(one) < plain
    assert error(three) < error(one) or spec == PER_TOKEN
    assert three == search_piecewise(absmax(reader), error, pieces=3)


def test_the_judge_is_the_one_that_decides_in_the_end() -> None:
    """By mse, in ranges of the extremes and on everything, it says what SiteSearch says."""
    reader = site()
    search = SiteSearch([reader], STATIC, WEIGHT, channels=CHANNELS)
    error = cheap_error(search, Methods(), rows=1000, outputs=1000)
    for candidate in (Piecewise((), (Piece(),)), Piecewise((50.0,), (Piece(0.8), Piece(0.5, 2.0)))):
        assert error(candidate) == search.error(candidate)[0]


@pytest.mark.parametrize("weight", ["abs_max", "avg"])
@pytest.mark.parametrize("activation", ["abs_max", "avg"])
def test_ranges_are_what_the_methods_say(weight: str, activation: str) -> None:
    reader = site()
    search = SiteSearch([reader], STATIC, WEIGHT, channels=CHANNELS, margins=(1.0,))
    got, _ = PieceJudge(reader, search, Methods("mae", weight, activation))([Transform()] * 4)
    magnitude = np.abs(reader.weight)
    reach = magnitude.max() if weight == "abs_max" else magnitude.max(1).mean()
    per_tensor = TensorSpec("int8")
    w = dequantize_weight(*quantize_weight(reader.weight, per_tensor, scale=np.float32(reach / 127)), per_tensor)
    exact, error = reader.rows @ reader.weight, 0.0
    for f, held in enumerate(held_out(reader.fold, 4)):
        own = reader.rows[reader.fold == f]
        ends = (own.min(1).mean(), own.max(1).mean()) if activation == "avg" else (own.min(), own.max())
        error += np.abs(fake_quantize(reader.rows[held], *scale_zero_point(*ends, STATIC)) @ w - exact[held]).sum()
    assert got == pytest.approx(error / np.abs(exact).sum(), rel=1e-4)


def test_thinning_keeps_extremes_and_folds() -> None:
    few = thinned(site(), rows=60, outputs=7)
    assert few.rows.shape == (60, CHANNELS)
    assert few.weight.shape == (CHANNELS, 7)
    assert set(few.fold) == {0, 1, 2, 3}
    np.testing.assert_array_equal(few.high, site().high)
    assert thinned(site(), 1000, 1000).rows.shape == site().rows.shape


@pytest.mark.parametrize("names", [("rmse",), ("mse", "absmax"), ("mse", "avg", "max")])
def test_unknown_methods_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match=names[-1]):
        Methods(*names)
