from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.linear import linears
from qcompiler.graph.rules.rewriter import MAP, PARAMETER, TIED
from tests.graph.rules.spelling import counts, normal, raised, spelled

X3 = "float[B, 3, 8] x"


def _only(model: ir.Model) -> tuple[str, str]:
    (linear,) = linears(model)
    return linear.name, linear.weight.metadata_props.get(MAP, "")


SPELLINGS = {
    "transpose": (
        f"""g ({X3}) => (float[B, 3, 5] y) {{ t = Transpose<perm = [1, 0]>(fc__weight) m = MatMul(x, t)
            y = Add(m, fc__bias) }}""",
        {"fc.weight": (5, 8), "fc.bias": (5,)},
        "transpose",
    ),
    "default perm": (
        f"g ({X3}) => (float[B, 3, 5] y) {{ t = Transpose(fc__weight) y = MatMul(x, t) }}",
        {"fc.weight": (5, 8)},
        "transpose",
    ),
    "bias on the left": (
        f"g ({X3}) => (float[B, 3, 5] y) {{ m = MatMul(x, fc__weight) y = Add(fc__bias, m) }}",
        {"fc.weight": (8, 5), "fc.bias": (5,)},
        "",
    ),
    "bias of rank 3": (
        f"g ({X3}) => (float[B, 3, 5] y) {{ m = MatMul(x, fc__weight) y = Add(m, fc__bias) }}",
        {"fc.weight": (8, 5), "fc.bias": (1, 1, 5)},
        "",
    ),
    "identity and cast between": (
        f"""g ({X3}) => (float[B, 3, 5] y) {{ i = Identity(fc__weight) c = Cast<to = 1>(i)
            t = Transpose<perm = [1, 0]>(c)
        m = MatMul(x, t) j = Identity(m) y = Add(j, fc__bias) }}""",
        {"fc.weight": (5, 8), "fc.bias": (5,)},
        "transpose",
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_matmul_become_one_linear(spelling: str) -> None:
    body, weights, map_ = SPELLINGS[spelling]
    model = raised(spelled(body, weights), {"x": normal(2, 3, 8)})
    assert _only(model) == ("fc", map_)
    (linear,) = linears(model)
    assert linear.weight.name == "fc.weight"
    assert linear.weight.metadata_props[PARAMETER] == "fc.weight"
    assert (linear.in_features, linear.out_features) == (8, 5)
    assert (linear.bias is not None) == ("fc.bias" in weights)
    assert set(counts(model)) <= {"MatMul", "Add"}


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("bias", [None, (5,), (1, 5), (1,), (), (4, 5)])
def test_gemm_in_all_its_forms(
    trans_a: int, trans_b: int, alpha: float, beta: float, bias: tuple[int, ...] | None
) -> None:
    shape = (8, 4) if trans_a else (4, 8)
    third = "" if bias is None else ", fc__bias"
    body = f"""g (float[{shape[0]}, {shape[1]}] x) => (float[4, 5] y) {{
        y = Gemm<transA = {trans_a}, transB = {trans_b}, alpha = {alpha}, beta = {beta}>(x, fc__weight{third}) }}"""
    weights = {"fc.weight": (5, 8) if trans_b else (8, 5)} | ({} if bias is None else {"fc.bias": bias})
    model = raised(spelled(body, weights), {"x": normal(*shape)})
    (linear,) = linears(model)
    assert linear.name == "fc"
    assert "Gemm" not in counts(model)
    assert (linear.bias is not None) == (bias is not None and bias != (4, 5))
    maps = (["transpose"] if trans_b else []) + (["scale:0.5"] if alpha != 1.0 else [])
    assert linear.weight.metadata_props.get(MAP, "") == ",".join(maps)


def test_gemm_of_two_computed_values_stays() -> None:
    model = raised(
        spelled("g (float[4, 8] x, float[8, 5] w) => (float[4, 5] y) { y = Gemm(x, w) }"),
        {
            "x": normal(4, 8),
            "w": normal(8, 5),
        },
    )
    assert counts(model) == {"Gemm": 1}


@pytest.mark.parametrize(
    "product", ["y2 = Gemm(x2, fc__weight, fc__bias)", "m = MatMul(x2, fc__weight) y2 = Add(m, fc__bias)"]
)
def test_conv1d_becomes_a_linear_of_rank_3(product: str) -> None:
    body = f"""g (float[B, S, 8] x) => (float[B, S, 5] y) {{
        flat = Constant<value_ints = [-1, 8]>() x2 = Reshape(x, flat) {product}
        s = Shape<start = 0, end = 2>(x) n = Constant<value_ints = [5]>() shape = Concat<axis = 0>(s, n)
        y = Reshape(y2, shape) }}"""
    model = raised(spelled(body, {"fc.weight": (8, 5), "fc.bias": (5,)}), {"x": normal(2, 3, 8)})
    assert counts(model) == {"MatMul": 1, "Add": 1}
    (linear,) = linears(model)
    assert linear.x.name == "x"
    assert linear.bias is not None


def test_a_reshape_that_splits_heads_stays_behind_the_linear() -> None:
    body = """g (float[B, S, 8] x) => (float[B, S, 2, 3] y) {
        flat = Constant<value_ints = [-1, 8]>() x2 = Reshape(x, flat) y2 = MatMul(x2, fc__weight)
        s = Shape<start = 0, end = 2>(x) n = Constant<value_ints = [2, 3]>() shape = Concat<axis = 0>(s, n)
        y = Reshape(y2, shape) }"""
    model = raised(spelled(body, {"fc.weight": (8, 6)}), {"x": normal(2, 3, 8)})
    assert counts(model) == {"MatMul": 1, "Reshape": 1}


def test_a_reshape_that_mixes_features_is_no_flattening() -> None:
    body = """g (float[B, 4, 4] x) => (float[N, 5] y) { flat = Constant<value_ints = [-1, 8]>() x2 = Reshape(x, flat)
        y = MatMul(x2, fc__weight) }"""
    model = raised(spelled(body, {"fc.weight": (8, 5)}), {"x": normal(2, 4, 4)})
    assert counts(model) == {"MatMul": 1, "Reshape": 1}


def test_a_tied_head_gets_its_own_weight_and_the_embedding_keeps_the_name() -> None:
    body = """g (int64[B, S] ids) => (float[B, S, 16] y) { e = Gather(embed__weight, ids)
        t = Transpose<perm = [1, 0]>(embed__weight) y = MatMul(e, t) }"""
    model = raised(spelled(body, {"embed.weight": (16, 8)}), {"ids": np.array([[1, 2, 15]])})
    (linear,) = linears(model)
    assert linear.weight.metadata_props[TIED] == "embed.weight"
    assert linear.weight.metadata_props[PARAMETER] == "embed.weight"
    assert list(linear.weight.shape.numpy()) == [8, 16]
    assert list(model.graph.initializers["embed.weight"].shape.numpy()) == [16, 8]


def test_a_linear_called_twice_shares_one_transposed_weight_and_has_two_names() -> None:
    body = """g (float[B, 8] a, float[B, 8] b) => (float[B, 5] y, float[B, 5] z) {
        t = Transpose<perm = [1, 0]>(fc__weight) y = MatMul(a, t) u = Transpose<perm = [1, 0]>(fc__weight)
        z = MatMul(b, u) }"""
    model = raised(spelled(body, {"fc.weight": (5, 8)}), {"a": normal(2, 8), "b": normal(2, 8, seed=2)})
    first, second = linears(model)
    assert first.weight is second.weight
    assert [first.name, second.name] == ["fc", "fc_2"]


def test_a_large_constant_node_becomes_an_initializer() -> None:
    model = spelled("g (float[B, 80] x) => (float[B, 64] y) { y = MatMul(x, w) }", {"w": (80, 64)})
    constant = ir.node("Constant", [], attributes={"value": model.graph.initializers["w"].const_value})
    constant.outputs[0].name = "stored"
    node = next(iter(model.graph))
    model.graph.insert_before(node, constant)
    node.replace_input_with(1, constant.outputs[0])
    assert counts(raised(model, {"x": normal(2, 80)})) == {"MatMul": 1}


def test_weights_that_are_graph_inputs_with_defaults_count_as_weights() -> None:
    body = "g (float[B, 8] x, float[8, 5] fc__weight) => (float[B, 5] y) { y = MatMul(x, fc__weight) }"
    model = spelled(body, {"fc.weight": (8, 5)})
    assert [linear.name for linear in linears(raised(model, {"x": normal(2, 8), "fc.weight": _value(model)}))] == ["fc"]


def _value(model: ir.Model) -> np.ndarray:
    tensor = model.graph.initializers["fc.weight"].const_value
    assert tensor is not None
    return tensor.numpy()
