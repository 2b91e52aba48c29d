from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.core import ModelError, OptionError
from qcompiler.graph import absorb, transaction
from qcompiler.graph.absorb import FoldError, fold, insert_scale
from qcompiler.graph.flow import analyse
from qcompiler.graph.verify import relative_error
from tests.graph.tiny import feeds_for, fold_everything, outputs, site_of, tiny

NORM = {
    "LayerNormalization(x, g, b)": {"g", "b"},
    "qcompiler.RMSNorm<epsilon: float = 1e-5>(x, g)": {"g"},
    "Mul(x, g)": {"g"},
}


def norm_linear(channels: int, features: int, norm: str, bias: bool, seed: int) -> ir.Model:
    tail = "p = MatMul(h, w) y = Add(p, c)" if bias else "y = MatMul(h, w)"
    weights = (
        {name: [channels] for name in NORM[norm]} | {"w": [channels, features]} | ({"c": [features]} if bias else {})
    )
    text = f"g (float[B,S,{channels}] x) => (float[B,S,{features}] y) {{ h = {norm} {tail} }}"
    return tiny(text, weights, seed)


def numbers(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}


def wiring(model: ir.Model) -> list[tuple[str, list[str | None], list[str | None]]]:
    return [(n.op_type, [v and v.name for v in n.inputs], [o.name for o in n.outputs]) for n in model.graph]


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(2, 40),
    features=st.integers(1, 100),
    norm=st.sampled_from(sorted(NORM)),
    bias=st.booleans(),
    spread=st.floats(0, 6),
    offset=st.floats(0, 5, allow_subnormal=False).map(lambda size: size if size > 1e-6 else 0.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_fold_of_any_scale_and_shift_leaves_the_outputs(
    channels: int, features: int, norm: str, bias: bool, spread: float, offset: float, seed: int
) -> None:
    model = norm_linear(channels, features, norm, bias, seed)
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(-spread, spread + 0.1, channels))
    shift = offset * rng.standard_normal(channels)
    feeds = feeds_for(model)
    before = outputs(model, feeds)
    inside = np.asarray(fold_input(model, feeds))
    plan = fold(model, site_of(model, "h"), scale, shift)
    assert relative_error(before, outputs(model, feeds)) < 1e-5 * (1 + offset)
    assert plan.kind == "fold"
    assert plan.proof < 1e-5
    assert np.allclose(plan.scale, scale, rtol=1e-6)
    moved = np.zeros(channels) if plan.shift is None else plan.shift
    assert (plan.shift is not None) == ("Layer" in norm and bool(shift.any()))
    assert np.allclose(fold_input(model, feeds), (inside - moved) / scale, rtol=1e-3, atol=1e-3 / scale.min())


def fold_input(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    from qcompiler.graph.run import Runner

    return Runner(model, taps=["h"], threads=1)(feeds)["h"]


@settings(max_examples=25, deadline=None)
@given(spread=st.floats(0, 6), shifted=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_insertion_leaves_the_outputs_and_the_other_readers(spread: float, shifted: bool, seed: int) -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,8] y, float[B,S,5] z) {
            h = LayerNormalization(x, g, b)
            q = MatMul(h, wq)
            k = MatMul(h, wk)
            z = MatMul(h, wz)
            both = Add(q, k)
            y = Add(both, h)
        }""",
        {"g": [8], "b": [8], "wq": [8, 8], "wk": [8, 8], "wz": [8, 5]},
        seed,
    )
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(-spread, spread + 0.1, 8))
    feeds = feeds_for(model)
    before, old = outputs(model, feeds), numbers(model)
    value = site_of(model, "h").value
    plan = insert_scale(model, value, ["q", "k"], scale, rng.standard_normal(8) if shifted else None)
    assert plan.kind == "insert"
    assert plan.source == "h"
    assert plan.sinks == ("q", "k")
    assert relative_error(before, outputs(model, feeds)) < 1e-5
    assert (numbers(model)["wz"] == old["wz"]).all()
    added = [node.op_type for node in model.graph][1 : 3 if shifted else 2]
    assert added == (["Sub", "Mul"] if shifted else ["Mul"])


def test_values_keep_their_names() -> None:
    """The value that readers see keeps its name when a bias is created, so that statistics by name stay right."""
    model = norm_linear(6, 4, "LayerNormalization(x, g, b)", False, 0)
    fold(model, site_of(model, "h"), shift=np.ones(6))
    assert wiring(model)[-1] == ("Add", ["y.product", "y.bias"], ["y"])
    model = tiny(
        "g (float[B,S,6] x) => (float[B,S,4] z) { v = MatMul(x, w) r = Identity(v) z = MatMul(r, o) }",
        {"w": [6, 5], "o": [5, 4]},
    )
    site = site_of(model, "v")
    fold(model, site, shift=np.ones(5))
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Identity", "MatMul", "Add"]
    fold(model, site, np.full(5, 3.0), np.ones(5))  # the site stays usable after the rewrite
    assert site_of(model, "v").sinks[0].linear == "z"


def test_folds_compose_in_any_order() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,8] y) {
            h = LayerNormalization(x, g, b)
            f = MatMul(h, w1)
            f1 = Add(f, c)
            r = Relu(f1)
            y = MatMul(r, w2)
        }""",
        {"g": [8], "b": [8], "w1": [8, 12], "c": [12], "w2": [12, 8]},
    )
    feeds = feeds_for(model)
    before = outputs(model, feeds)
    first, second = analyse(model)
    scales = {8: np.linspace(0.1, 4, 8), 12: np.linspace(3, 0.2, 12)}
    for site in (second, first, second):
        fold(model, site, scales[site.channels], np.ones(site.channels))
    assert relative_error(before, outputs(model, feeds)) < 1e-5


def test_a_failed_proof_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,6] y, float[B,S,6] z, float[B,S,8] t) {
            h = LayerNormalization(x, g)
            y = MatMul(h, w)
            z = MatMul(h, w)
            h2 = LayerNormalization(x, g)
            t = MatMul(h2, w2)
        }""",
        {"g": [8], "w": [8, 6], "w2": [8, 8]},
    )
    old, before = numbers(model), wiring(model)
    site = site_of(model, "h")
    monkeypatch.setattr(transaction, "relative_error", lambda a, b: 0.5)
    with pytest.raises(FoldError, match=r"changes the outputs of its region by 5\.0e-01"):
        fold(model, site, np.full(8, 2.0), np.ones(8))
    with pytest.raises(FoldError, match="changes the outputs"):
        insert_scale(model, site.value, ["y", "z"], np.full(8, 2.0), np.ones(8))
    assert wiring(model) == before
    assert {name: a.tolist() for name, a in numbers(model).items()} == {name: a.tolist() for name, a in old.items()}

    def fail(*_: object) -> None:
        raise ModelError("the region cannot be evaluated: no kernel")

    monkeypatch.setattr(absorb, "region_outputs", fail)
    with pytest.raises(FoldError, match="no proof, no fold: the region cannot be evaluated: no kernel"):
        fold(model, site, np.full(8, 2.0))
    assert wiring(model) == before


def test_the_proof_sees_a_sink_that_was_left_out() -> None:
    """The proof is of numbers: a site whose analysis were wrong is refused by it."""
    import dataclasses

    model = norm_linear(6, 4, "LayerNormalization(x, g, b)", True, 0)
    site = site_of(model, "h")
    wrong = dataclasses.replace(site.sinks[0], columns=site.sinks[0].columns[::-1].copy())
    with pytest.raises(FoldError, match="changes the outputs"):
        fold(model, dataclasses.replace(site, sinks=(wrong,)), np.linspace(1, 2, 6))


def test_bad_arguments() -> None:
    model = norm_linear(6, 4, "LayerNormalization(x, g, b)", True, 0)
    site = site_of(model, "h")
    with pytest.raises(OptionError, match="must have the source's 6 channels"):
        fold(model, site, np.ones(5))
    with pytest.raises(OptionError, match="shift must be finite"):
        fold(model, site, None, np.full(6, np.nan))
    with pytest.raises(FoldError, match="scale is 1 and shift is 0 throughout"):
        fold(model, site, np.ones(6), np.zeros(6))
    with pytest.raises(OptionError, match="not all of p read 'x'"):
        insert_scale(model, model.graph.inputs[0], ["p"], np.ones(6))


def test_shared_norm_weights_and_parameter_notes_survive() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,8] y) {
            h = LayerNormalization(x, g, b)
            a = MatMul(h, w1)
            h2 = LayerNormalization(a, g, b)
            y = MatMul(h2, w2)
        }""",
        {"g": [8], "b": [8], "w1": [8, 8], "w2": [8, 8]},
    )
    for value in model.graph.initializers.values():
        value.metadata_props["qcompiler.parameter"] = f"p.{value.name}"
    old = numbers(model)
    fold(model, site_of(model, "h2"), np.full(8, 2.0))
    first, second = (node for node in model.graph if node.op_type == "LayerNormalization")
    assert (first.inputs[1].const_value.numpy() == old["g"]).all()
    assert np.allclose(second.inputs[1].const_value.numpy(), old["g"] / 2)
    assert second.inputs[1].metadata_props["qcompiler.parameter"] == "p.g"
    assert fold_everything(model) == 2


def test_layers_that_share_weights_and_are_folded_alike_go_on_sharing() -> None:
    """ALBERT calls one layer again and again: with one scale for all calls nothing is stored twice."""
    text = "g (float[B,S,8] x) => (float[B,S,8] y) { "
    for i in range(3):
        text += f"v{i} = MatMul({'x' if i == 0 else f'o{i - 1}'}, wv) r{i} = Relu(v{i}) o{i} = MatMul(r{i}, wo) "
    model = tiny(text + "y = Identity(o2) }", {"wv": [8, 12], "wo": [12, 8]})
    feeds = feeds_for(model)
    before = outputs(model, feeds)
    sites = [site for site in analyse(model) if site.value.name.startswith("v")]
    assert {site.weights for site in sites} == {("wv", "wo")}
    for site in sites[:2]:
        fold(model, site, np.linspace(0.5, 2, 12))
    assert sorted(model.graph.initializers) == ["wo", "wo_2", "wv", "wv_2"]
    fold(model, sites[2], np.linspace(0.5, 2, 12))
    assert sorted(model.graph.initializers) == ["wo", "wv"]
    assert relative_error(before, outputs(model, feeds)) < 1e-5
