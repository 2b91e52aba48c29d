"""Means of channels by fold, over batches and shards."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.calibration.observers import make_observer
from qcompiler.calibration.observers.means import Means
from qcompiler.core import OptionError


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose mean is far from 0, of ten samples of unequal length."""
    rng = np.random.default_rng(seed)
    samples = np.sort(rng.integers(0, 10, 200))
    return rng.normal(loc=(0, 5, -100), size=(200, 3)).astype(np.float32), samples


def test_means_of_folds_in_batches_and_shards() -> None:
    x, samples = data()
    shards = []
    for part in (slice(0, 90), slice(90, 200)):
        observer = make_observer("means{folds=3}", -1)
        for batch in (slice(part.start, part.start + 37), slice(part.start + 37, part.stop)):
            observer.observe(x[batch], samples[batch])
        shards.append(observer)
    result = shards[0].merge(shards[1]).result()
    for fold in range(3):
        np.testing.assert_allclose(result.mean[fold], x[samples % 3 == fold].astype(np.float64).mean(0), rtol=1e-12)
        assert result.rows[fold] == (samples % 3 == fold).sum()
    np.testing.assert_allclose(result.overall, x.astype(np.float64).mean(0), rtol=1e-12)


def test_folds_without_rows_are_left_out() -> None:
    observer = make_observer("means", -1)
    observer.observe(np.ones((4, 2), np.float32), np.array([0, 0, 2, 2]))
    assert observer.result().mean.shape == (2, 2)
    with pytest.raises(OptionError, match="at least one fold"):
        Means(folds=0)
