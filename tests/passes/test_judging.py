"""What a site is judged by, and when a static scale is good enough."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qcompiler.calibration import collect
from qcompiler.capability import Capability, Kernel
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linear_named, linears
from qcompiler.numerics.site_search import with_margin
from qcompiler.passes.judging import (
    ERROR_PER_TIME,
    FALLBACK_GAIN,
    HEAD_ERROR,
    STATIC_ERROR,
    FallbackRule,
    by_input,
    decision,
    holds,
    leave_decision,
    quantized,
    reader,
    sample_request,
)
from qcompiler.presets import PRESETS
from qcompiler.scheme import TensorSpec
from tests.graph.tiny import tiny
from tests.passes.blocks import LINEARS, WIDTH, batches, block

SCHEME = PRESETS["w8a8"]


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({}, set()),
        ({"ignore": ("*0",)}, {"q0", "up0", "down0", "logits0"}),
        ({"head": False}, {"logits0"}),
        ({"bits": (("*0", 16), ("up0", 8))}, {"q0", "down0", "logits0"}),
        ({"head": False, "ignore": ("K", "k")}, {"k", "logits0"}),  # globs know upper case from lower
    ],
)
def test_who_is_quantized(changes: dict, left_out: set[str]) -> None:
    chosen = [linear.name for linear in quantized(block(), dataclasses.replace(SCHEME, **changes))]
    assert chosen == [name for name in LINEARS if name not in left_out]


def test_linears_are_grouped_by_what_they_read() -> None:
    groups = [[linear.name for linear in group] for group in by_input(linears(block()))]
    assert groups == [["q0", "k"], ["up0"], ["down0"], ["post", "logits0"]]
    assert by_input([]) == []


def test_reader_puts_the_weights_side_by_side() -> None:
    model = block()
    group = [linear_named(model, name) for name in ("post", "logits0")]
    request = sample_request(group[0], 64)
    sample = collect(model, batches(), [request], progress=False)[request]
    found = reader(group, sample, None, SCHEME, seed=0)
    assert found.rows.shape == (64, WIDTH)
    assert found.low.shape == found.high.shape == (4, WIDTH)
    np.testing.assert_array_equal(found.weight, np.hstack([array_of(linear.weight) for linear in group]))
    np.testing.assert_array_equal(found.columns, np.arange(WIDTH))


def test_a_wide_head_is_judged_on_a_seeded_sample_of_its_features() -> None:
    weight = np.tile(np.arange(9000, dtype=np.float32), (4, 1))
    model = tiny("g (float[B,S,4] x) => (float[B,S,9000] y) { y = MatMul(x, w) }", {"w": weight})
    (linear,) = linears(model)
    request = sample_request(linear, 8)
    sample = collect(model, batches(width=4), [request], progress=False)[request]
    first, again, other = (reader([linear], sample, None, SCHEME, seed).weight for seed in (0, 0, 1))
    assert first.shape == (4, 4096)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(np.unique(first[0])) == 4096


def test_decisions_are_kept_on_the_node() -> None:
    linear = linear_named(block(), "k")
    assert decision(linear) is None
    spec = TensorSpec("uint8", False, observer="percentile{percent=99.9}")
    leave_decision([linear], spec, "so")
    assert decision(linear) == (spec, "so")


def test_margins_are_for_static_ranges_of_minmax() -> None:
    static = SCHEME.activation
    assert with_margin(static, 1.5).observer == "minmax{margin=1.5}"
    assert with_margin(static, 1.0) is static
    for other in (SCHEME.fallback, dataclasses.replace(static, observer="mse")):
        assert with_margin(other, 1.5) is other


def test_when_static_holds() -> None:
    small, large = 0.9 * STATIC_ERROR, 3 * STATIC_ERROR
    assert holds(small, None)
    assert holds(small, small / 100)  # good enough, whatever else could be had
    assert not holds(large, None)
    assert not holds(large, large / (1.1 * FALLBACK_GAIN))
    assert holds(large, large / (0.9 * FALLBACK_GAIN))  # the fallback would hardly be better


def timed(static: float, dynamic: float) -> Capability:
    """A target whose per-token products take ``dynamic`` microseconds where static ones take ``static``."""

    def kernel(granularity: str, is_dynamic: bool, time: float) -> Kernel:
        times = ((WIDTH, WIDTH, time),)
        return Kernel("k", "int8", "per_channel", "uint8", granularity, is_dynamic, 1.0, times=times)

    return Capability("timed", (kernel("per_tensor", False, static), kernel("per_token", True, dynamic)))


def test_the_fallback_pays_by_the_error_that_it_removes_for_its_time() -> None:
    model = block()
    groups = by_input(linears(model))
    rule = FallbackRule(model, SCHEME, timed(100, 150))
    # Wide outputs take longer in proportion: (q + k + up + down + post + logits) / WIDTH.
    widths = sum(linear.in_features * linear.out_features for linear in linears(model)) / WIDTH**2
    needed = ERROR_PER_TIME * 0.5 * 2 / widths  # q and k read one value: half as much again, twice the width
    assert rule.pays(groups[:1], 2 * needed, 0.9 * needed)
    assert not rule.pays(groups[:1], 2 * needed, 1.1 * needed)
    assert rule.may_pay(groups[:1], 1.1 * needed)
    assert not rule.may_pay(groups[:1], 0.9 * needed)


@pytest.mark.parametrize("capability", [timed(100, 150), Capability("test", ())], ids=["timed", "untimed"])
def test_an_error_counts_more_at_an_output_head(capability: Capability) -> None:
    model = block()
    rule = FallbackRule(model, SCHEME, capability)
    head, inner = linear_named(model, "logits0"), linear_named(model, "down0")
    least_head, least_inner = (
        min(static for static in np.geomspace(1e-6, 1, 1000) if rule.pays([[linear]], static, static / 10))
        for linear in (head, inner)
    )
    time = head.in_features * head.out_features / (inner.in_features * inner.out_features) if capability.kernels else 1
    assert least_head / least_inner == pytest.approx(time / HEAD_ERROR, rel=0.1)


def test_a_fallback_that_costs_nothing_pays_as_soon_as_it_is_better() -> None:
    rule = FallbackRule(block(), SCHEME, timed(100, 100))
    groups = by_input(linears(block()))[:1]
    assert rule.pays(groups, 1e-6, 0.9e-6)
    assert not rule.pays(groups, 1e-6, 1e-6)


def test_without_times_or_fallback() -> None:
    groups = by_input(linears(block()))[:1]
    untimed = FallbackRule(block(), SCHEME, Capability("test", ()))
    assert untimed.pays(groups, 3 * STATIC_ERROR, STATIC_ERROR)
    assert not untimed.pays(groups, STATIC_ERROR, STATIC_ERROR / 100)
    assert not untimed.may_pay(groups, STATIC_ERROR)
    static_only = dataclasses.replace(SCHEME, fallback=None)
    assert not FallbackRule(block(), static_only, timed(100, 150)).may_pay(groups, 1.0)
