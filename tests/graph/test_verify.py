from __future__ import annotations

import numpy as np
import pytest

from qcompiler.core import ModelError
from qcompiler.graph.absorb import fold
from qcompiler.graph.edit import write_input
from qcompiler.graph.verify import compare_outputs, region_outputs, relative_error
from tests.graph.tiny import feeds_for, outputs, site_of, tiny

TEXT = """g (float[B,S,8] x) => (float[B,S,300] y) {
    h = LayerNormalization(x, g, b)
    y = MatMul(h, w)
}"""
WEIGHTS = {"g": [8], "b": [8], "w": [8, 300]}


def test_relative_error() -> None:
    a = {"y": np.array([1.0, -4.0])}
    assert relative_error(a, a) == 0
    assert relative_error(a, {"y": np.array([1.0, -3.0])}) == 0.25
    assert relative_error(a, {"y": np.array([1.0, np.nan])}) == np.inf
    nan = {"y": np.array([np.nan, 2.0])}
    assert relative_error(nan, nan) == 0
    assert relative_error({"y": np.zeros(2)}, {"y": np.full(2, 0.5)}) == 0.5


def test_regions_tell_a_right_fold_from_a_wrong_one() -> None:
    before, after, broken = (tiny(TEXT, WEIGHTS) for _ in range(3))
    site = site_of(before, "h")
    boundary, sinks = site.boundary, [sink.linear for sink in site.sinks]
    expected = region_outputs(before, boundary, sinks, seed=7)
    scale = np.linspace(0.2, 5, 8)
    plan = fold(after, site_of(after, "h"), scale)
    bound = relative_error(expected, region_outputs(after, boundary, sinks, seed=7))
    assert 0 < bound < 1e-6
    assert bound == pytest.approx(plan.proof, rel=10)
    norm = next(iter(broken.graph))
    write_input(norm, 1, norm.inputs[1].const_value.numpy() / scale.astype(np.float32))
    assert relative_error(expected, region_outputs(broken, boundary, sinks, seed=7)) > 0.1


def test_compare_outputs_is_the_worst_batch() -> None:
    before, after = tiny(TEXT, WEIGHTS), tiny(TEXT, WEIGHTS)
    matmul = list(after.graph)[1]
    write_input(matmul, 1, matmul.inputs[1].const_value.numpy() * np.float32(1.5))
    batches = [feeds_for(before, seed) for seed in range(3)]
    assert compare_outputs(before, before, batches) == 0
    assert compare_outputs(before, after, batches) == pytest.approx(0.5, rel=1e-4)


def test_the_region_is_computed_in_double_precision() -> None:
    """The same numbers as ONNX Runtime's, but for single precision; only a sample of a wide sink's features."""
    model = tiny(TEXT, WEIGHTS)
    site = site_of(model, "h")
    found = region_outputs(model, site.boundary, ["y"], seed=3)["y"]
    assert found.dtype == np.float64
    assert found.shape == (2, 3, 64)
    x = np.random.default_rng([3, *b"x"]).standard_normal((2, 3, 8))
    reference = outputs(model, {"x": x.astype(np.float32)})["y"]
    sample = np.random.default_rng(3).choice(300, 64, replace=False)
    assert np.allclose(found, reference[..., sample], atol=1e-4)


def test_a_region_that_reads_more_than_its_boundary_is_refused() -> None:
    model = tiny(TEXT, WEIGHTS)
    with pytest.raises(ModelError, match="reads 'x', which is outside it"):
        region_outputs(model, {}, ["y"])


def test_taps_leave_no_trace() -> None:
    from qcompiler.graph.run import Runner

    model = tiny(TEXT, WEIGHTS)
    Runner(model, taps=["h"])
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert not site_of(model, "h").value.is_graph_output()
