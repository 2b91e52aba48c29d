"""Every family of tests.families, float and fake-quantized, computes in torch what it does in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from tests import families

pytest.importorskip("torch")
from tests.training.twins import canonical, nodes_apart, outputs_apart, relative

QUICK = ("bert",)
"""The others are marked slow."""
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in families.FAMILIES]
NODE_BY_NODE = [
    ("llama", "w4a8"),
    ("bert", "w8a8"),
    *(
        pytest.param(name, scheme, marks=pytest.mark.slow)
        for scheme, names in {
            "w4a8": set(families.FAMILIES) - {"llama"},
            "w8a8-dynamic": ["bert"],
            "nf4": ["gpt2"],
        }.items()
        for name in sorted(names)
    ),
]
"""Each kind of fake-quant once, and each family's activations."""
EXACT = 5e-6
"""Sums in another order: measured differences are below 1.3e-6."""


@pytest.mark.parametrize("name", EACH)
def test_a_family_computes_the_same_at_other_shapes_too(name: str) -> None:
    """Float and weights of 4 bits: whole forwards, at batch and sequence that nothing was traced with."""
    for model in canonical(families.exported(name), "w4a16"):
        for batch, seq in ((2, 16), (3, 7)):
            assert outputs_apart(model, families.feeds(name, batch, seq, seed=batch)) <= EXACT


@pytest.mark.parametrize(("name", "scheme"), NODE_BY_NODE)
def test_each_node_of_a_fake_quant_graph_computes_the_same(name: str, scheme: str) -> None:
    calibration = [families.feeds(name, seed=3)] if scheme == "w8a8" else None
    _, model = canonical(families.exported(name), scheme, calibration)
    apart = nodes_apart(model, families.feeds(name, seed=1))
    assert len(apart) >= sum(len(node.outputs) for node in model.graph) - 1
    assert max(apart.values()) <= EXACT, max(apart, key=lambda value: apart[value])


def test_the_comparison_sees_a_difference() -> None:
    """What the tests above rest on."""
    a = np.array([1.0, -2.0], np.float32)
    assert relative(a, a) == 0
    assert relative(a, a + np.float32(0.25)) == 0.125
    with pytest.raises(AssertionError):
        relative(np.array([1.0, -np.inf], np.float32), a)
    with pytest.raises(AssertionError):
        relative(a, a.astype(np.float64))
