from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.functions import is_call
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.run import Runner
from qcompiler.graph.shapes import OTHER_SIZES, SIZES, Sizes, concrete_shapes
from tests import families
from tests.graph.tiny import tiny


def test_computed_shapes_are_followed() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[N,M] y) {
            shape = Shape(x)
            b = Gather(shape, zero)
            s = Gather(shape, one)
            rows = Mul(b, s)
            limit = Add(rows, one)
            range = Range(zero, limit, one)
            ends = Slice(range, minus, end)
            all = Concat<axis: int = 0>(ends, minus)
            y = Reshape(x, all)
        }""",
        {
            "zero": np.array(0),
            "one": np.array(1),
            "minus": np.array([-1]),
            "end": np.array([2**62]),
        },
    )
    facts = concrete_shapes(model)
    assert facts["y"].shape == (6, 8)
    assert facts["range"].numbers is not None
    assert facts["range"].numbers.tolist() == list(range(7))
    assert concrete_shapes(model, OTHER_SIZES)["y"].shape == (15, 8)


def test_what_depends_on_data_is_absent() -> None:
    model = tiny(
        "g (float[B,S] x) => (int64[2,N] y, float[N] z) { y = NonZero(x) t = Transpose(y) z = GatherND(x, t) }", {}
    )
    assert set(concrete_shapes(model)) == {"x"}


def _open(shape: ir.Shape) -> bool:
    """Whether the first axis has neither a number nor a name."""
    return len(shape) > 0 and not isinstance(shape[0], int) and shape[0].value is None


@pytest.mark.parametrize("sizes", [SIZES, OTHER_SIZES])
@pytest.mark.parametrize("family", ["llama", "bert", "falcon", "whisper_encoder", "mixtral"])
def test_shapes_are_those_of_a_real_run(family: str, sizes: Sizes) -> None:
    model = ir.load(families.exported(family))
    canonicalise(model)
    facts = concrete_shapes(model, sizes)
    names = [output.name or "" for node in model.graph for output in node.outputs]
    assert set(names) <= set(facts)
    results = Runner(model, taps=names, threads=1)(families.feeds(family, *sizes[:2]))
    by_data = {v.name for node in model.graph for v in node.outputs if v.shape is not None and _open(v.shape)}
    if family != "mixtral":  # of which row an expert gets, the data decides
        assert not by_data
    for name in by_data & set(results):
        assert facts[name].shape[1:] == results.pop(name).shape[1:]
    assert {name: facts[name].shape for name in results} == {name: array.shape for name, array in results.items()}
    counts = {v.name for node in model.graph if is_call(node, "SortByExpert") for v in node.outputs}
    for name, array in results.items():
        if name in counts:
            continue
        known = facts[name].numbers
        assert known is None or np.allclose(known, array, rtol=1e-6, equal_nan=True)
