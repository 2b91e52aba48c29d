"""piecewise is the identity in float, gives channels of each kind what they need, and refuses bad options."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.core import OptionError
from qcompiler.graph.edit import array_of
from qcompiler.passes import make_pass
from qcompiler.passes.piecewise import Piecewise
from qcompiler.passes.smooth import Smooth
from tests.passes.blocks import apply, block, context, error, outputs, quantize


@pytest.mark.parametrize(
    "item",
    [
        Piecewise(),
        Piecewise(pieces=4, search_pieces=True),
        Piecewise(loss="mae", weight_method="abs_max", activation_method="avg"),
        Piecewise(loss="cosine", weight_method="avg"),
    ],
    ids=str,
)
def test_float_outputs_stay(item: Piecewise) -> None:
    model = block(outliers=30)
    before = outputs(model)
    result = apply(item, model, context())
    assert result.plans
    assert all(plan.proof < 1e-6 and plan.shift is None for plan in result.plans)
    for name, reference in before.items():
        assert 0 < np.abs(outputs(model)[name] - reference).max() <= 1e-5 * np.abs(reference).max()


@pytest.mark.parametrize("scheme", ["w8a8-o3", "w8a8-dynamic"])
def test_outlier_channels_cost_less(scheme: str) -> None:
    """Measured on data that calibration did not see, with all folds and insertions and all rounding in place."""
    reference = outputs(block(outliers=100))
    plain, pieces, smoothed = (block(outliers=100) for _ in range(3))
    quantize(plain, context(scheme))
    quantize(pieces, context(scheme), Piecewise())
    quantize(smoothed, context(scheme), Smooth())
    for name, exact in reference.items():
        got = error(exact, outputs(pieces)[name])
        assert got * (4 if scheme == "w8a8-o3" else 1.5) < error(exact, outputs(plain)[name])
        assert got < 1.2 * error(exact, outputs(smoothed)[name])


def test_what_gains_nothing_is_left_alone() -> None:
    model = block(outliers=1)
    before = {name: array_of(value).copy() for name, value in model.graph.initializers.items()}
    result = apply(Piecewise(fold_gain=1.5, insert_gain=1.5), model, context("w8a8-o3"))
    assert not result.changed
    assert all("no gain worth it: error" in note.why for note in result.notes)
    for name, array in before.items():
        np.testing.assert_array_equal(array_of(model.graph.initializers[name]), array)


def test_folds_only() -> None:
    plans = apply(Piecewise(smooth_all_linears=False), block(outliers=30), context()).plans
    assert {plan.kind for plan in plans} == {"fold"}


def test_same_data_and_seed_same_folds() -> None:
    first, second = (apply(Piecewise(rows=64), block(outliers=30), context(seed=5)).plans for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.scale, b.scale)
        assert a.why == b.why


def test_spelled_options() -> None:
    item = make_pass("piecewise", {"pieces": "2", "search_pieces": "true", "loss": "mae", "alpha_max": "0.8"})
    assert item == Piecewise(pieces=2, search_pieces=True, loss="mae", alpha_max=0.8)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha_min": "0.9", "alpha_max": "0.5"},
        {"alpha_max": "nan"},
        {"scale_min": "0"},
        {"scale_max": "inf"},
        {"pieces": "0"},
        {"loss": "rmse"},
        {"weight_method": "absmax"},
        {"activation_method": "abs_max_channel_wise"},
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(OptionError, match=next(iter(options.values()))):
        make_pass("piecewise", options)
