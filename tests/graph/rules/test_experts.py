"""Gathered expert weights become one Linear an expert, and say the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph import canonical
from qcompiler.graph.linear import linears
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.rules.rewriter import MAP, PARAMETER
from qcompiler.graph.run import Runner, save_model
from qcompiler.graph.verify import relative_error
from tests.graph.tiny import tiny
from tests.mixtures import rows, traced

FORMS = {
    "rows times W": "places = Unsqueeze(ids, last) g = GatherND(w, places) wide = Unsqueeze(x, last) "
    "m = MatMul(g, wide) y = Squeeze(m, last)",
    "W turned": "g = Gather(turned, ids) wide = Unsqueeze(x, middle) m = MatMul(wide, g) y = Squeeze(m, middle)",
    "axes from the front": "places = Unsqueeze(ids, middle) g = GatherND(w, places) wide = Unsqueeze(x, two) "
    "m = MatMul(g, wide) y = Squeeze(m, two)",
}


def projection(body: str, ids: str = "ids = ArgMax<axis: int = 1, keepdims: int = 0>(logits)") -> ir.Model:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 5, 8))
    integers = {"last": [-1], "middle": [1], "two": [2], "fixed": [0, 2, 1, 1]}
    return tiny(
        f"g (float[S,8] x, float[S,3] logits) => (float[S,5] y) {{ {ids} {body} }}",
        {"w": w, "turned": w.transpose(0, 2, 1), **{n: np.array(a, np.int64) for n, a in integers.items()}},
    )


def feeds(count: int) -> dict[str, np.ndarray]:
    return {**rows(count, 8), "logits": np.random.default_rng(2).standard_normal((count, 3)).astype(np.float32)}


@pytest.mark.parametrize("form", FORMS)
def test_each_spelling_becomes_one_linear_an_expert(form: str) -> None:
    model = projection(FORMS[form])
    before = model.clone()
    canonicalise(model)
    canonical.check(model)
    assert [linear.name for linear in linears(model)] == [
        f"{e}.{'turned' if 'turned' in form else 'w'}" for e in (0, 1, 2)
    ]
    assert not {"GatherND", "Squeeze"} & {node.op_type for node in model.graph}
    for count in (1, 2, 40):
        assert relative_error(Runner(before)(feeds(count)), Runner(model)(feeds(count))) <= 1e-6


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        (FORMS["rows times W"].replace("Squeeze(m, last)", "ReduceSum<keepdims: int = 0>(m, last)"), None),
        (FORMS["rows times W"], "ids = Identity(fixed)"),
        (
            FORMS["W turned"].replace("Gather(turned, ids)", "Gather<axis: int = 0>(turned, ids)"),
            "ids = Identity(fixed)",
        ),
    ],
)
def test_what_is_no_choice_by_row_stays(body: str, ids: str | None) -> None:
    model = projection(body) if ids is None else projection(body, ids)
    before = model.clone()
    canonicalise(model)
    assert not linears(model)
    assert relative_error(Runner(before)(feeds(4)), Runner(model)(feeds(4))) <= 1e-6


def test_a_mixture_keeps_its_outputs_and_names_its_experts() -> None:
    model = traced()
    before = model.clone()
    canonicalise(model)
    canonical.check(model)
    names = [linear.name for linear in linears(model)]
    assert names[:2] == ["mlp.router", "mlp.experts.0.gate_up_proj"]
    assert names[-1] == "mlp.experts.3.down_proj"
    assert len(names) == 9
    assert sum(node.op_type == "SortByExpert" for node in model.graph) == 1  # both projections share it
    for count in (1, 3, 50):
        assert relative_error(Runner(before)(rows(count)), Runner(model)(rows(count))) <= 1e-6


def test_each_weight_is_one_matrix_of_its_parameter(tmp_path: pytest.TempPathFactory) -> None:
    """From memory, and from a file where the parameter is not read but for the expert that is asked for."""
    in_memory = traced()
    parameter = in_memory.graph.initializers["mlp.experts.down_proj"].const_value.numpy()
    save_model(in_memory, tmp_path / "model.onnx")
    for model in (in_memory, ir.load(tmp_path / "model.onnx")):
        canonicalise(model)
        by_name = {linear.name: linear for linear in linears(model)}
        for expert in range(4):
            weight = by_name[f"mlp.experts.{expert}.down_proj"].weight
            assert weight.metadata_props[PARAMETER] == "mlp.experts.down_proj"
            assert weight.metadata_props[MAP] == f"item:{expert},transpose"
            np.testing.assert_array_equal(weight.const_value.numpy(), parameter[expert].T)
