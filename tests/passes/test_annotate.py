"""annotate: who gets which spec, and a reason for everyone who does not get the scheme's own."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.linear import linear_named, linears
from qcompiler.passes.annotate import Annotate, annotated
from qcompiler.passes.judging import leave_decision
from qcompiler.presets import PRESETS
from qcompiler.scheme import TensorSpec
from tests.graph.tiny import tiny
from tests.passes.blocks import LINEARS, WIDTH, apply, block, context

STATIC = PRESETS["w8a8-o3"].activation


def specs(model: ir.Model) -> dict[str, tuple[TensorSpec | None, TensorSpec | None]]:
    return {linear.name: annotated(linear) for linear in linears(model)}


def token_outliers() -> list[dict[str, np.ndarray]]:
    """In each sample one token of 96 has one huge number, in whatever channel: no scale by channel evens that out."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((24, 96, WIDTH)).astype(np.float32)
    x[np.arange(24), 0, rng.integers(0, WIDTH, 24)] = 60
    return [{"x": x}]


def one_linear() -> ir.Model:
    weight = np.random.default_rng(0).standard_normal((WIDTH, 8)).astype(np.float32)
    return tiny(f"g (float[B,S,{WIDTH}] x) => (float[B,S,8] y) {{ y = MatMul(x, w) }}", {"w": weight})


@pytest.mark.parametrize(
    ("scheme", "granularity", "dynamic", "symmetric"),
    [
        ("w8a8-o1", "per_token", True, True),
        ("w8a8-o2", "per_tensor", True, False),
        ("w8a8-o3", "per_tensor", False, False),
        ("w8a8-dynamic", "per_token", True, False),
    ],
)
def test_levels_of_smoothquant(scheme: str, granularity: str, dynamic: bool, symmetric: bool) -> None:
    model = block()
    result = apply(Annotate(), model, context(scheme))
    assert result.notes == ()
    found = specs(model)
    assert set(found) == set(LINEARS)
    for weight, activation in found.values():
        assert (weight.dtype, weight.granularity, weight.symmetric) == ("int8", "per_channel", True)
        assert (activation.granularity, activation.dynamic) == (granularity, dynamic)
        assert (activation.dtype, activation.symmetric) == ("uint8", symmetric)


@pytest.mark.parametrize("scheme", ["w8a8-o1", "w8a8-o2", "w8a8-dynamic"])
def test_dynamic_schemes_need_no_data(scheme: str) -> None:
    assert Annotate().wants(block(), context(scheme)) == []


def test_ignored_linears_and_heads_have_a_reason() -> None:
    model = block()
    scheme = dataclasses.replace(PRESETS["w8a8-o2"], head=False)
    result = apply(Annotate(), model, context(scheme, ignore=("up*", "k")))
    assert {name for name, (weight, _) in specs(model).items() if weight is None} == {"k", "up0", "logits0"}
    reasons = {note.node: (note.what, note.why) for note in result.notes}
    assert reasons == {
        "k": ("left in float", "ignored by 'k'"),
        "up0": ("left in float", "ignored by 'up*'"),
        "logits0": ("left in float", "an output head; the scheme leaves it"),
    }


def test_ignored_linears_are_not_asked_about() -> None:
    requests = Annotate().wants(block(), context(ignore=("q0", "k", "logits0")))
    assert {request.value for request in requests} == {"p", "r", "n"}


def test_outlier_tokens_get_the_fallback_and_say_so() -> None:
    model = one_linear()
    result = apply(Annotate(), model, context("w8a8"), token_outliers())
    spec = specs(model)["y"][1]
    assert dataclasses.replace(spec, zero_point=None) == PRESETS["w8a8"].fallback
    (note,) = result.notes
    assert (note.node, note.what) == ("y", f"activation uint8 per_token dynamic about {spec.zero_point}")
    assert "worth its time" in note.why
    static, other = (float(word) for word in note.why.split() if "e-" in word)
    assert static > 2 * other


def test_without_a_fallback_static_stays_static() -> None:
    model = one_linear()
    assert apply(Annotate(), model, context("w8a8-o3"), token_outliers()).notes == ()
    activation = specs(model)["y"][1]
    assert dataclasses.replace(activation, observer="minmax") == STATIC


def test_ordinary_activations_stay_static_where_a_fallback_would_be_better_still() -> None:
    weight = np.random.default_rng(0).standard_normal((WIDTH, 8)).astype(np.float32)
    graph = f"g (float[B,S,{WIDTH}] x) => (float[B,S,8] y) {{ m = MatMul(x, w) y = Mul(m, m) }}"
    model = tiny(graph, {"w": weight})
    apply(Annotate(), model, context("w8a8"))
    assert not specs(model)["m"][1].dynamic


def test_an_output_head_that_would_be_better_off_gets_the_fallback() -> None:
    model = one_linear()
    apply(Annotate(), model, context("w8a8"))
    assert specs(model)["y"][1].dynamic


def test_a_range_that_calibration_did_not_reach_gets_a_margin() -> None:
    """Each sample has a size of its own: the range of one fold is too small for the rows of the others."""
    model = one_linear()
    rng = np.random.default_rng(3)
    sizes = np.exp(rng.normal(0, 0.5, (24, 1, 1)))
    data = [{"x": (rng.uniform(-1, 1, (24, 6, WIDTH)) * sizes).astype(np.float32)}]
    apply(Annotate(), model, context("w8a8-o3"), data)
    activation = specs(model)["y"][1]
    assert activation.observer in {"minmax{margin=1.2}", "minmax{margin=1.5}", "minmax{margin=2}"}
    even = [{"x": rng.uniform(-1, 1, (24, 6, WIDTH)).astype(np.float32)}]
    other = one_linear()
    apply(Annotate(), other, context("w8a8-o3"), even)
    assert specs(other)["y"][1].observer == "minmax"


@pytest.mark.parametrize("observer", ["percentile{percent=99.9}", "mse", "ema"])
def test_other_observers_set_their_range_themselves(observer: str) -> None:
    scheme = dataclasses.replace(PRESETS["w8a8-o3"], activation=dataclasses.replace(STATIC, observer=observer))
    model = block()
    assert Annotate().wants(model, context(scheme)) == []
    apply(Annotate(), model, context(scheme))
    assert {activation.observer for _, activation in specs(model).values()} == {observer}


def test_weights_alone() -> None:
    scheme = dataclasses.replace(PRESETS["w8a8"], activation=None, fallback=None)
    model = block()
    apply(Annotate(), model, context(scheme))
    assert set(specs(model).values()) == {(scheme.weight, None)}


def test_linears_of_one_input_share_one_decision() -> None:
    model = block()
    apply(Annotate(), model, context())
    found = specs(model)
    assert found["q0"] == found["k"]
    assert found["post"] == found["logits0"]


def test_what_smooth_decided_stands() -> None:
    model = block()
    linear = linear_named(model, "up0")
    decided = dataclasses.replace(STATIC, observer="minmax{margin=1.5}")
    leave_decision([linear], decided, "as smooth said")
    assert "p" not in {request.value for request in Annotate().wants(model, context())}
    result = apply(Annotate(), model, context())
    assert annotated(linear)[1] == decided
    assert [(note.node, note.why) for note in result.notes] == [("up0", "as smooth said")]


def test_annotations_survive_a_save(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = block()
    apply(Annotate(), model, context())
    ir.save(model, tmp_path / "annotated.onnx")
    assert specs(ir.load(tmp_path / "annotated.onnx")) == specs(model)


def test_numbers_are_not_touched() -> None:
    model = block()
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    apply(Annotate(), model, context())
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before
    assert annotated(linear_named(block(), "k")) == (None, None)
