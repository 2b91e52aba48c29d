"""The corrected target is the least squares answer for the inputs as they are."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.numerics.gptq_target import corrected


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 12), out=st.integers(1, 4), seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_what_is_left_has_no_part_along_the_inputs(rows: int, out: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(60, rows)) @ rng.normal(size=(rows, rows))
    after = before + 0.1 * rng.normal(size=before.shape)
    weight = rng.normal(size=(rows, out))
    got = corrected(weight, after.T @ after, after.T @ (before - after), share, damp=1e-12)
    best = np.linalg.lstsq(after, before @ weight, rcond=None)[0]
    np.testing.assert_allclose(got, weight + share * (best - weight), rtol=1e-5, atol=1e-6)
