"""shift is the identity in float, and centres channels that lie off zero where that lowers the error."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.core import OptionError
from qcompiler.graph.edit import array_of, write_input
from qcompiler.graph.linear import linear_named
from qcompiler.passes import make_pass
from qcompiler.passes.shift import SAMPLERS, Shift
from qcompiler.presets import PRESETS
from tests.passes.blocks import WIDTH, apply, batches, block, context, error, outputs, quantize

OFF = np.where(np.arange(WIDTH) % 2, 25, -25).astype(np.float32)


def off_centre() -> ir.Model:
    """The block whose first norm has a bias of 25 up or down: its channels do not overlap."""
    model = block()
    norm = next(node for node in model.graph if node.outputs[0].name == "h")
    write_input(norm, 2, OFF)
    return model


@pytest.mark.parametrize("kind", ["mean", "midpoint", None], ids=str)
@pytest.mark.parametrize("everywhere", [False, True])
def test_float_outputs_stay(kind: str | None, everywhere: bool) -> None:
    model = off_centre()
    before = outputs(model)
    result = apply(Shift(kind=kind, shift_all_linears=everywhere), model, context("w8a8-o3"))
    assert result.changed
    for name, after in outputs(model).items():
        assert np.abs(after - before[name]).max() <= 1e-5 * np.abs(before[name]).max()
    assert all(plan.proof < 1e-6 and (plan.scale == 1).all() and plan.shift is not None for plan in result.plans)
    if kind is not None:
        inserted = {"p", "n"} if everywhere else set()
        assert {plan.source for plan in result.plans if plan.kind == "insert"} == inserted
        assert {plan.source for plan in result.plans if plan.kind == "fold"} == {"h"}  # a Relu carries no shift


def test_the_shift_moves_from_the_norms_bias_into_those_of_its_readers() -> None:
    """y = (x - z) W + (b + z W): section 4 of Outlier Suppression+; k had no bias and gets one."""
    model, old = off_centre(), off_centre()
    (plan,) = apply(Shift(kind="mean"), model, context("w8a8-o3")).plans
    z = plan.shift
    np.testing.assert_allclose(z, OFF, atol=1)
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    np.testing.assert_allclose(array_of(norm.inputs[2]), OFF - z, atol=1e-5)
    for name, bias in (("q0", array_of(old.graph.initializers["bq"])), ("k", 0)):
        linear = linear_named(model, name)
        np.testing.assert_allclose(array_of(linear.bias), bias + z @ array_of(linear.weight), rtol=1e-4, atol=1e-4)


def test_channels_off_centre_cost_less() -> None:
    reference = outputs(off_centre())
    plain, shifted = off_centre(), off_centre()
    quantize(plain, context("w8a8-o3"))
    quantize(shifted, context("w8a8-o3"), Shift())
    for name, exact in reference.items():
        assert error(exact, outputs(shifted)[name]) * 1.4 < error(exact, outputs(plain)[name])


def test_what_is_centred_already_is_left_alone() -> None:
    result = apply(Shift(fold_gain=1.2), block(), context("w8a8-o3"))
    assert not result.changed
    assert {note.what for note in result.notes} == {"not transformed"}


@pytest.mark.parametrize("sampler", ["ema", "multi_step"])
def test_a_sampler_is_less_moved_by_one_outlier_token_than_the_extremes(sampler: str) -> None:
    data = batches(6)
    data[2]["x"][0, 0] *= 1e3  # a norm cannot be fooled so, but what it reads may turn it over
    data[2]["x"][0, 0, 5] = 1e6
    shifts = {}
    for name in ("extremes", sampler):
        plans = apply(Shift(kind="midpoint", sampler=name), off_centre(), context("w8a8-o3"), data).plans
        shifts[name] = next(plan.shift for plan in plans if plan.source == "h")
    true = apply(Shift(kind="mean"), off_centre(), context("w8a8-o3"), batches(6)).plans[0].shift
    assert abs(shifts[sampler][5] - true[5]) < abs(shifts["extremes"][5] - true[5])


def test_weights_alone_want_no_shift() -> None:
    scheme = dataclasses.replace(PRESETS["w8a8"], activation=None, fallback=None)
    assert Shift().wants(block(), context(scheme)) == []
    assert not Shift().run(block(), {}, context(scheme)).changed


def test_spelled_options() -> None:
    assert make_pass("shift", {"kind": "mean", "shift_all_linears": "true"}) == Shift("mean", shift_all_linears=True)
    assert make_pass("shift", {"sampler": "ema"}).wants(block(), context())[-1].observer == SAMPLERS["ema"]
    for option in ({"kind": "median"}, {"sampler": "steps"}):
        with pytest.raises(OptionError, match="pass 'shift'"):
            make_pass("shift", option)
