"""AWQ's scales: the paper's power of the magnitudes, the same for any unit, and 1 where there is nothing to scale."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.numerics.activation_aware import ActivationAware, awq_scale
from qcompiler.numerics.site_channels import Channels

MAGNITUDES = hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(2.0**-10, 2.0**10, width=32))
ALPHA = st.floats(0, 1)


@given(MAGNITUDES, ALPHA)
def test_ratios_are_powers_of_the_magnitudes_about_one(magnitude: np.ndarray, alpha: float) -> None:
    magnitude = np.maximum(magnitude, 1e-3 * magnitude.max())  # none is so faint that it is lifted
    scale = awq_scale(magnitude, alpha)
    np.testing.assert_allclose(scale / scale[0], (magnitude / magnitude[0]) ** alpha, rtol=1e-4)
    np.testing.assert_allclose(scale.max() * scale.min(), 1, rtol=1e-5)


@given(MAGNITUDES, ALPHA, st.floats(2.0**-20, 2.0**20))
def test_the_unit_of_the_activation_does_not_matter(magnitude: np.ndarray, alpha: float, unit: float) -> None:
    np.testing.assert_allclose(awq_scale(magnitude * unit, alpha), awq_scale(magnitude, alpha), rtol=1e-4)


def test_dead_channels_take_one_and_faint_ones_are_lifted() -> None:
    np.testing.assert_array_equal(awq_scale(np.zeros(3), 0.5), np.ones(3))
    scale = awq_scale(np.array([0, 4.0, 1.0]), 1.0)
    np.testing.assert_allclose(scale, [1, 2, 0.5])
    np.testing.assert_allclose(awq_scale(np.array([1e-9, 1.0]), 1.0), [1e-2, 1e2], rtol=1e-6)
    lifted = awq_scale(np.array([1e-3, 1.0, 4.0]), 1.0, floor=1.0)
    np.testing.assert_allclose(lifted, [0.5, 0.5, 2.0], rtol=1e-6)


def test_blocked_channels_stay() -> None:
    zeros = np.zeros(3, np.float32)
    weight = np.array([1, 0, 1], np.float32)  # 0: the scale must stay 1
    channels = Channels(zeros, zeros, zeros, weight, weight, np.array([9, 9, 1], np.float32), zeros.astype(bool))
    np.testing.assert_allclose(ActivationAware(0.5)(channels).scale, [3**0.5, 1, 3**-0.5], rtol=1e-6)
