"""Norms and additions: the same numbers, in the spelling that ONNX Runtime leaves alone."""

import numpy as np
import pytest

from qcompiler.graph.functions import inline_functions
from qcompiler.graph.shapes import concrete_shapes
from qcompiler.targets.ort import LOWERED_OPSET
from qcompiler.targets.ort.norms import keep_additions_apart, lower_rms_norms
from qcompiler.targets.ort.optimised import optimised_graph
from tests.targets.ort.graphs import FLOAT, Graph, random_weights, run_optimised, run_plain

X = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)


def sum_graph(consumer):
    g = Graph(None, random_weights())
    x, y = (g.input(name, FLOAT, ["B", "S", 16]) for name in "xy")
    total = g.op("Add", x, y)
    out = g.norm(total, "norm", 16) if consumer == "LayerNormalization" else g.op(consumer, total)
    g.output(out, "out")
    return g.model


@pytest.mark.parametrize(("consumer", "slow"), [("LayerNormalization", "SkipLayerNormalization")])
def test_onnx_runtime_fuses_add_but_not_sum(consumer, slow):
    model = sum_graph(consumer)
    values = {"x": X, "y": X[::-1].copy()}
    before = run_plain(model, values)
    assert slow in {node.op_type for node in optimised_graph(model).node}
    assert len(keep_additions_apart(model)) == 1
    assert slow not in {node.op_type for node in optimised_graph(model).node}
    np.testing.assert_allclose(run_optimised(model, values), before, atol=1e-6)


def test_bias_before_gelu_is_not_fused():
    g = Graph(None, random_weights())
    g.output(g.op("Gelu", g.op("Add", g.op("Neg", g.input("x", FLOAT, ["B", "S", 16])), X[0, 0])), "out")
    assert "BiasGelu" in {node.op_type for node in optimised_graph(g.model).node}
    before = run_plain(g.model, {"x": X})
    keep_additions_apart(g.model)
    assert "BiasGelu" not in {node.op_type for node in optimised_graph(g.model).node}
    np.testing.assert_allclose(run_optimised(g.model, {"x": X}), before, atol=1e-6)


def test_other_additions_stay():
    model = sum_graph("Relu")
    assert keep_additions_apart(model) == []
    assert "Add" in {node.op_type for node in model.graph}


@pytest.mark.parametrize("size", [(16,), (5, 16)])
def test_rms_norm_is_exact_or_left_in_plain_operators(size):
    g = Graph(None, random_weights())
    x = g.input("x", FLOAT, ["B", 5, 16])
    weight = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    g.output(g.op("RMSNorm", x, weight, epsilon=1e-3, name="norm"), "out")
    before = run_plain(g.model, {"x": X})
    notes = lower_rms_norms(g.model, concrete_shapes(g.model))
    lowered = "RMSNormalization" in {node.op_type for node in g.model.graph}
    assert lowered == (len(size) == 1) == (not notes)
    inline_functions(g.model)
    g.model.graph.opset_imports[""] = LOWERED_OPSET
    np.testing.assert_allclose(run_optimised(g.model, {"x": X}), before, rtol=1e-6, atol=1e-6)
