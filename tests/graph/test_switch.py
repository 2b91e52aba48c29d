"""Switch: at every choice the same numbers, up to float rounding, as the model that is quantized so."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.linear import linears
from qcompiler.graph.run import Runner
from qcompiler.graph.switch import Switch
from qcompiler.passes.fold import Fold
from qcompiler.passes.judging import by_input, decision, keep_float, leave_decision
from qcompiler.presets import PRESETS
from tests.passes.blocks import HELD_OUT, apply, block, context, quantize

SITES = [["q0", "k"], ["up0"], ["down0"], ["post", "logits0"]]
SCHEMES = ("w8a8-o3", "w8a8-dynamic")


def version(scheme: str, fold: bool = False) -> ir.Model:
    model = block(outliers=10)
    quantize(model, context(scheme))
    if fold:
        apply(Fold(), model, context(scheme))
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["fake-quant", "folded"])
def versions(request: pytest.FixtureRequest) -> list[ir.Model]:
    return [version(scheme, request.param) for scheme in SCHEMES]


@pytest.fixture(scope="module")
def switch(versions: list[ir.Model]) -> Switch:
    return Switch(block(outliers=10), versions, SITES, threads=1)


def assert_alike(have: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(have - want).max() <= 1e-6 * np.abs(want).max()


def test_all_alike(switch: Switch, versions: list[ir.Model]) -> None:
    for choice, model in enumerate([block(outliers=10), *versions]):
        want = Runner(model, threads=1)(HELD_OUT[0])
        have = switch(HELD_OUT[0], [choice] * len(SITES))
        assert have.keys() == want.keys()
        for name, array in want.items():
            assert_alike(have[name], array)


def test_mixed(switch: Switch) -> None:
    """Static, per token, float, static: as annotate and insert make it of such decisions."""
    choices = [1, 2, 0, 1]
    made = [{linear.name: linear for linear in linears(version(scheme))} for scheme in SCHEMES]
    model = block(outliers=10)
    specs = {}
    for scheme, found in zip(SCHEMES, made, strict=True):
        specs[scheme] = {name: decision(linear)[0] for name, linear in found.items()}
    for group, choice in zip(by_input(linears(model)), choices, strict=True):
        for linear in group:
            if choice == 0:
                keep_float(linear.matmul, "a test")
            else:
                leave_decision([linear], specs[SCHEMES[choice - 1]][linear.name], "")
    quantize(model, context("w8a8"))
    for name, array in Runner(model, threads=1)(HELD_OUT[0]).items():
        assert_alike(switch(HELD_OUT[0], choices)[name], array)


def test_each_site_alone_changes_the_outputs(switch: Switch) -> None:
    exact = switch(HELD_OUT[0], [0] * len(SITES))["logits"]
    for number in range(len(SITES)):
        for choice in (1, 2):
            choices = [choice if i == number else 0 for i in range(len(SITES))]
            error = np.abs(switch(HELD_OUT[0], choices)["logits"] - exact).max()
            assert 0 < error < 0.2 * np.abs(exact).max()


def test_the_models_stay_as_they_are() -> None:
    model, quantized = block(), version("w8a8-o3")
    before = [[node.op_type for node in each.graph] for each in (model, quantized)]
    Switch(model, [quantized], SITES, threads=1)
    assert [[node.op_type for node in each.graph] for each in (model, quantized)] == before
    assert "qcompiler.choices" not in [value.name for value in model.graph.inputs]


def test_what_a_version_left_in_float_is_float() -> None:
    model = block(outliers=10)
    for linear in linears(model):
        if linear.name == "up0":
            keep_float(linear.matmul, "a test")
    quantize(model, context(PRESETS["w8a8-o3"]))
    switch = Switch(block(outliers=10), [model], SITES, threads=1)
    for name, array in switch(HELD_OUT[0], [0, 1, 0, 0]).items():
        np.testing.assert_array_equal(array, switch(HELD_OUT[0], [0, 0, 0, 0])[name])
