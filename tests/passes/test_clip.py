"""clip: shorter ranges where they help, the old ones where they do not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.core import OptionError
from qcompiler.graph.edit import array_of, scalar_of
from qcompiler.graph.linear import linear_named, linears
from qcompiler.numerics.clip_search import METHODS
from qcompiler.passes import parse_pipeline
from qcompiler.passes.clip import Clip
from qcompiler.passes.fold import Fold
from tests.passes.blocks import LINEARS, apply, block, context, error, outputs, quantize

STATIC = "w8a8-o3"


def too_wide(model: ir.Model, name: str, factor: float = 8.0) -> None:
    """Make the input's scale of one Linear needlessly large."""
    quant = linear_named(model, name).activation_quant
    assert quant is not None
    value = quant.inputs[1]
    value.const_value = ir.tensor(np.float32(scalar_of(value) * factor), name=value.name)


def input_scales(model: ir.Model) -> dict[str, float | None]:
    return {linear.name: scalar_of(linear.activation_quant.inputs[1]) for linear in linears(model)}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_range_that_is_too_wide_is_shortened(method: str) -> None:
    """Only that one by much, and on new data the outputs are nearer to the float model's."""
    ctx, model, reference = context(STATIC), block(), outputs(block())["logits"]
    quantize(model, ctx)
    factor = 8.0 if method != "eq" else 1.6  # EasyQuant looks from 0.6 to 1.2 of the old scale
    too_wide(model, "post", factor)
    before, wide = error(reference, outputs(model)["logits"]), input_scales(model)["post"]
    result = apply(Clip(method=method), model, ctx)
    found = input_scales(model)["post"]
    if method == "admm":  # its alternation moves to the nearest fixed point, not to the best one
        assert found <= wide
    else:
        assert found < 0.8 * wide
        assert error(reference, outputs(model)["logits"]) < before
    assert input_scales(model)["logits0"] == found
    assert {note.node for note in result.notes} == set(LINEARS)


def test_what_helps_nothing_is_left() -> None:
    ctx, model = context(STATIC), block()
    quantize(model, ctx)
    before = {name: array_of(value).copy() for name, value in model.graph.initializers.items()}
    result = apply(Clip(gain=1e6), model, ctx)
    assert not result.changed
    assert {note.what for note in result.notes} == {"not clipped"}
    for name, array in before.items():
        np.testing.assert_array_equal(array_of(model.graph.initializers[name]), array)


def test_weights_alone_where_inputs_are_dynamic() -> None:
    ctx, model = context("w8a8-o1"), block()
    weight = linear_named(model, "k").weight
    far = array_of(weight).copy()
    far[5] *= 30
    weight.const_value = ir.tensor(far, name=weight.name)
    gain = linear_named(model, "k").x.producer().inputs[1]
    faint = array_of(gain).copy()
    faint[5] = 1e-4  # an input that hardly counts has the largest weights: a shorter range pays
    gain.const_value = ir.tensor(faint, name=gain.name)
    bias = linear_named(model, "k").x.producer().inputs[2]
    none = array_of(bias).copy()
    none[5] = 0
    bias.const_value = ir.tensor(none, name=bias.name)
    quantize(model, ctx)
    before = array_of(linear_named(model, "k").weight_quant.inputs[1]).copy()
    result = apply(Clip(), model, ctx)
    assert (array_of(linear_named(model, "k").weight_quant.inputs[1]) < before).any()
    assert any(note.node == "k" and note.why.startswith("weight:") for note in result.notes)
    Fold().run(model, {}, ctx)
    assert np.abs(array_of(linear_named(model, "k").weight).astype(int)).max() <= 128


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(OptionError, match="did you mean 'mse'"):
        parse_pipeline("clip{method=mes}")
