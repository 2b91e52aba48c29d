"""The table of passes and the text of a pipeline; a newcomer's pass is one file and one line."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import ClassVar

import onnx_ir as ir
import pytest

from qcompiler.core import Note, OptionError
from qcompiler.passes import PASSES, make_pass, parse_pipeline
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.fold import Fold
from qcompiler.passes.smooth import Smooth
from qcompiler.spelling import spell
from tests.passes.blocks import block, context


@pytest.mark.parametrize("name", PASSES)
def test_each_pass_has_its_name_frozen_options_and_a_text(name: str) -> None:
    item = make_pass(name, {})
    assert item.name == name
    assert spell(name, item) == name
    assert item == make_pass(name, {})
    for field in dataclasses.fields(item):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(item, field.name, None)


def test_a_pipeline_is_text_there_and_back() -> None:
    text = "smooth{alpha=0.5,smooth_all_linears=false},annotate,insert,fold{bias=int32}"
    pipeline = parse_pipeline(text)
    assert pipeline[0] == Smooth(alpha=0.5, smooth_all_linears=False)
    assert pipeline[3] == Fold(bias="int32")
    assert ",".join(spell(item.name, item) for item in pipeline) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("smoth,insert", "unknown pass 'smoth': did you mean 'smooth'"),
        ("smooth{alfa=1}", "unknown option of pass 'smooth' 'alfa': did you mean 'alpha'"),
        ("smooth{alpha=half}", "alpha=half of pass 'smooth' is not of type float"),
        ("smooth{smooth_all_linears=maybe}", "smooth_all_linears=maybe of pass 'smooth' is not of type bool"),
        ("smooth{alpha}", "cannot read option 'alpha' of 'smooth'"),
        ("smooth{alpha=1", "cannot read"),
        ("insert{}{}", "cannot read"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(text: str, words: str) -> None:
    with pytest.raises(OptionError) as refused:
        parse_pipeline(text)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_new_pass_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Rename(Pass):
        """A newcomer's pass."""

        name: ClassVar[str] = "rename"
        prefix: str = "new."

        def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
            for value in model.graph.inputs:
                value.name = f"{self.prefix}{value.name}"
            return PassResult(True, (Note("x", "renamed", self.prefix),))

    module = types.ModuleType("newcomer")
    module.Rename = Rename  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "newcomer", module)
    monkeypatch.setitem(PASSES, "rename", "newcomer:Rename")
    (item,) = parse_pipeline("rename{prefix=in.}")
    model = block()
    assert item.wants(model, context()) == []
    assert not item.float_exact
    result = item.run(model, {}, context())
    assert (result.changed, result.plans, [note.why for note in result.notes]) == (True, (), ["in."])
    assert [value.name for value in model.graph.inputs] == ["in.x"]


def test_a_pass_without_run_is_none() -> None:
    class Idle(Pass):
        name = "idle"

    with pytest.raises(TypeError, match="abstract"):
        Idle()  # type: ignore[abstract]
