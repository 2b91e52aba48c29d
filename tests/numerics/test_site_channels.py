"""What is known of a site's channels, against numpy written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.numerics.site_channels import Channels, channels_of
from qcompiler.numerics.site_judge import Reader

CHANNELS = 6


def reader(seed: int, columns: np.ndarray) -> Reader:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(40, len(columns))) * rng.uniform(0.1, 10, len(columns))).astype(np.float32)
    fold = np.arange(40) % 2
    low, high = (np.stack([fn(x[fold == f], axis=0) for f in (0, 1)]) for fn in (np.min, np.max))
    return Reader(x, fold, low, high, rng.normal(size=(len(columns), 3)).astype(np.float32), columns)


def of(readers: list[Reader], fold: int | None, blocked: np.ndarray | None = None) -> Channels:
    return channels_of(readers, fold, CHANNELS, blocked, None)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), fold=st.sampled_from([None, 0, 1]), shifted=st.booleans())
def test_moments_and_extremes_are_those_of_the_fold(seed: int, fold: int | None, shifted: bool) -> None:
    site = reader(seed, np.arange(CHANNELS))
    x = site.rows if fold is None else site.rows[site.fold == fold]
    shift = np.random.default_rng(seed).normal(size=CHANNELS).astype(np.float32) if shifted else None
    known = of([site], fold)
    off = x - (0 if shift is None else shift)
    np.testing.assert_allclose(known.absmax(shift), np.abs(off).max(0), rtol=1e-5)
    np.testing.assert_allclose(known.fourth_moment(shift), (off.astype(np.float64) ** 4).mean(0) ** 0.25, rtol=1e-5)
    np.testing.assert_allclose(known.weight_rms, np.sqrt((site.weight**2).mean(1)), rtol=1e-5)
    assert (known.fourth_moment(shift) <= known.absmax(shift) * 1.0001).all()


def test_features_and_readers_of_one_channel_are_pooled() -> None:
    """Grouped queries: features 0 to 5 and 6 to 11 carry channels 0 to 5, but the last, which carries none."""
    columns = np.arange(2 * CHANNELS) % CHANNELS
    columns[-1] = -1
    wide, narrow = reader(1, columns), reader(2, np.arange(CHANNELS))
    known = of([wide, narrow], None)
    x = np.concatenate([wide.rows[:, :CHANNELS], wide.rows[:, CHANNELS:], narrow.rows])[:, 0].astype(np.float64)
    assert known.fourth_moment(None)[0] == pytest.approx((x**4).mean() ** 0.25, rel=1e-5)
    weights = np.concatenate([wide.weight[0], wide.weight[CHANNELS], narrow.weight[0]])
    assert known.weight_rms[0] == pytest.approx(np.sqrt((weights**2).mean()), rel=1e-5)
    last = np.concatenate([wide.rows[:, CHANNELS - 1], narrow.rows[:, -1]]).astype(np.float64)
    assert known.fourth_moment(None)[-1] == pytest.approx((last**4).mean() ** 0.25, rel=1e-5)


def test_blocked_channels_count_as_dead() -> None:
    blocked = np.arange(CHANNELS) == 2
    known = of([reader(3, np.arange(CHANNELS))], None, blocked)
    assert known.weight[2] == known.weight_rms[2] == 0
    assert (known.weight_rms[~blocked] > 0).all()
