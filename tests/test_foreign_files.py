"""Files of other exporters reach the canonical form: the counts of tests.passes.test_normalise, the same numbers."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qcompiler.graph import canonical
from qcompiler.graph.linear import linears
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.run import Runner
from tests import foreign
from tests.passes.test_normalise import EXPECTED, shape_of

# onnxruntime.transformers makes one Linear of q, k and v in its Attention operator
FEWER_LINEARS = {"bert-fused-python": 4, "distilbert-fused-python": 4}


@pytest.mark.parametrize("name", foreign.FILES)
def test_foreign_files_become_canonical_and_say_the_same(name: str) -> None:
    before = ir.load(foreign.foreign(name))
    model = before.clone()
    notes = canonicalise(model)
    canonical.check(model)
    assert notes == []
    expected = EXPECTED[foreign.FILES[name].family]
    assert shape_of(model) == (expected[0] - FEWER_LINEARS.get(name, 0), *expected[1:])
    feeds = foreign.feeds(name)
    old, new = Runner(before, threads=1)(feeds), Runner(model, threads=1)(feeds)
    for key, reference in old.items():
        assert foreign.relative_error(reference, new[key]) <= 2e-6


@pytest.mark.parametrize("name", foreign.FILES)
def test_linears_of_foreign_files_have_names_of_modules(name: str) -> None:
    model = ir.load(foreign.foreign(name))
    canonicalise(model)
    names = [linear.name for linear in linears(model)]
    assert len(set(names)) == len(names)
    assert all(n.startswith(("model.", "Attention_")) for n in names)
