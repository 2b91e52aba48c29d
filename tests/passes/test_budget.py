"""What max_drop chooses from, what it takes, and how a choice is written on the Linears."""

from __future__ import annotations

import dataclasses

import pytest

from qcompiler.capability import Capability
from qcompiler.core import TargetError
from qcompiler.graph.linear import linears
from qcompiler.passes.annotate import Annotate, annotated
from qcompiler.passes.budget import decide, decisions, options, prepare, sites
from qcompiler.passes.judging import leave_decision
from qcompiler.presets import PRESETS
from qcompiler.scheme import TensorSpec
from qcompiler.targets import make_target
from tests.passes.blocks import LINEARS, WIDTH, apply, block, context

W8A8 = PRESETS["w8a8"]
CAPABILITY = make_target("ort-cpu").capability()


NONE = Capability("none", ())
GROUPS = TensorSpec("int8", granularity="per_group", group_size=128)


def test_options_of_a_scheme() -> None:
    static, dynamic, groups = options(W8A8, CAPABILITY)
    assert (static.activation, static.fallback) == (W8A8.activation, None)
    assert (dynamic.activation, dynamic.fallback) == (W8A8.fallback, None)
    assert (groups.weight, groups.activation) == (GROUPS, dataclasses.replace(GROUPS, dynamic=True))
    assert options(W8A8, NONE) == (static, dynamic)
    assert options(PRESETS["w8a8-dynamic"], NONE) == (PRESETS["w8a8-dynamic"],)
    assert len(options(PRESETS["w4a8"], CAPABILITY)) == 1


def test_linears_of_one_input_are_one_site_and_one_product() -> None:
    found = sites(block(), W8A8, CAPABILITY)
    assert [site.names for site in found] == [("q0", "k"), ("up0",), ("down0",), ("post", "logits0")]
    pairs = [None, *((option.weight, option.activation) for option in options(W8A8, CAPABILITY))]
    assert found[0].microseconds == tuple(CAPABILITY.microseconds(WIDTH, 2 * WIDTH, pair) for pair in pairs)
    float_time, static, dynamic, _ = found[1].microseconds
    assert static < dynamic < float_time
    ignoring = dataclasses.replace(W8A8, ignore=("k", "down0"))
    assert [site.names for site in sites(block(), ignoring, CAPABILITY)] == [("q0",), ("up0",), ("post", "logits0")]


def test_a_target_without_times_is_refused() -> None:
    with pytest.raises(TargetError, match="no measured times"):
        sites(block(), W8A8, make_target("onnx").capability())


def test_decisions_of_another_option_are_made_anew() -> None:
    """A smoothing pass found a margin for one site, and that another cannot be static: now all shall be."""
    model = block()
    by_name = {linear.name: linear for linear in linears(model)}
    kept = dataclasses.replace(W8A8.activation, observer="minmax{margin=1.5}")
    leave_decision([by_name["up0"]], kept, "")
    leave_decision([by_name["down0"]], W8A8.fallback, "tokens")
    static, dynamic = options(W8A8, NONE)
    for option, specs in ((static, {"up0": kept}), (dynamic, {"up0": W8A8.fallback, "down0": W8A8.fallback})):
        copy = model.clone()
        prepare(copy, option)
        apply(Annotate(), copy, context(option))
        made = decisions(copy)
        assert set(made) == set(LINEARS)
        assert {spec.dynamic for _, spec in made.values()} == {option is dynamic}
        assert specs.items() <= {name: spec for name, (_, spec) in made.items()}.items()


def test_what_is_decided_is_annotated() -> None:
    model = block()
    found = sites(model, W8A8, CAPABILITY)
    made = [dict.fromkeys(LINEARS, (option.weight, option.activation)) for option in options(W8A8, CAPABILITY)]
    decide(model, found, [1, 2, 0, 3], made, ["a", "b", "c", "d"])
    result = apply(Annotate(), model, context("w8a8"))
    specs = {linear.name: annotated(linear) for linear in linears(model)}
    static, dynamic = (W8A8.weight, W8A8.activation), (W8A8.weight, W8A8.fallback)
    groups = (GROUPS, dataclasses.replace(GROUPS, dynamic=True))
    assert specs == dict(zip(LINEARS, (static, static, dynamic, (None, None), groups, groups), strict=True))
    whys = {note.node: note.why for note in result.notes}
    assert whys == dict(zip(LINEARS, "aabcdd", strict=True))
    assert next(note.what for note in result.notes if note.node == "down0") == "left in float"
