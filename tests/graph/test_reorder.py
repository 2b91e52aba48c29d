"""Any order of a basis leaves the outputs as they were; what cannot be ordered is told."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.graph.basis import Basis, find_bases
from qcompiler.graph.canonical import check
from qcompiler.graph.edit import array_of
from qcompiler.graph.reorder import reorder_basis
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.run import Runner
from qcompiler.graph.shapes import concrete_shapes
from qcompiler.graph.transaction import FoldError
from qcompiler.graph.verify import relative_error
from tests import families
from tests.graph.streams import LAYER, RMS, WIDTH, block, ids
from tests.graph.tiny import Shapes, feeds_for, tiny

MLP = """g (float[B,S,8] x) => (float[B,S,6] y) {
    u0 = MatMul(x, up)  u = Add(u0, ub)  a = Gelu(u)
    y0 = MatMul(a, down)  y = Add(y0, db)
}"""
GATED = """g (float[B,S,8] x) => (float[B,S,6] y) {
    gate = MatMul(x, gw)  s = Sigmoid(gate)  silu = Mul(gate, s)
    u = MatMul(x, up)  a = Mul(silu, u)  y = MatMul(a, down)
}"""
AGAIN = """g (float[B,S,8] x) => (float[B,S,8] y) {
    u = MatMul(x, up)  a = Relu(u)  m = MatMul(a, down)
    z = Softmax <axis = -1> (m)
    v = MatMul(z, up)  b = Relu(v)  y = MatMul(b, down)
}"""
POOLED = """g (float[B,S,8] x, float[B,S] mask) => (float[B,12] pooled, float[B,S,12] tokens, float[B,S,4] z) {
    tokens = MatMul(x, w)  last = Constant<value_ints = [-1]>()  first = Constant<value_ints = [1]>()
    column = Unsqueeze(mask, last)  shape = Shape(tokens)  wide = Expand(column, shape)
    picked = Mul(tokens, wide)  total = ReduceSum <keepdims = 0> (picked, first)
    size = ReduceL2 <keepdims = 1> (total, last)  pooled = Div(total, size)
    z = MatMul(tokens, v)
}"""
SHAPES = {"up": (8, 12), "ub": (12,), "gw": (8, 12), "down": (12, 6), "db": (6,), "w": (8, 12), "v": (12, 4)}


def canonical(text: str, weights: Shapes, seed: int = 0) -> ir.Model:
    model = tiny(text, weights, seed)
    canonicalise(model)
    return model


def ordered(model: ir.Model, basis: Basis, seed: int = 0) -> None:
    order = np.random.default_rng(seed).permutation(basis.channels)
    plan = reorder_basis(model, basis, order, concrete_shapes(model), seed=seed)
    assert plan.kind == "reorder"
    assert plan.order is not None
    assert plan.order.tolist() == order.tolist()
    assert plan.proof < 1e-6
    check(model)


def difference(before: ir.Model, after: ir.Model, feeds: dict[str, np.ndarray]) -> float:
    first, second = Runner(before, threads=1)(feeds), Runner(after, threads=1)(feeds)
    assert list(first) == list(second)
    return relative_error(first, second)


@pytest.mark.parametrize("text", [MLP, GATED], ids=["gelu", "gated"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_hidden_units_in_any_order(text: str, seed: int) -> None:
    model = canonical(text, {name: shape for name, shape in SHAPES.items() if f" {name})" in text}, seed)
    before = model.clone()
    (basis,) = [basis for basis in find_bases(model) if basis.channels == 12]
    ordered(model, basis, seed)
    assert len(list(model.graph)) == len(list(before.graph))
    assert difference(before, model, feeds_for(model)) < 1e-5


@pytest.mark.parametrize("norm", [RMS, LAYER])
@pytest.mark.parametrize("shown", [False, True])
def test_a_stream_from_its_tables_to_its_head(norm: str, shown: bool) -> None:
    outputs = "float[b, s, 7] head" + (f", float[b, s, {WIDTH}] n2, float[b, s, {WIDTH}] y" if shown else "")
    model = block(norm, outputs=outputs)
    before = model.clone()
    (basis,) = [basis for basis in find_bases(model) if basis.channels == WIDTH]
    assert {value.name for value in basis.outputs} == ({"n2", "y"} if shown else set())
    assert [node.name for node in basis.readers] == ["up_w", "head_w"]
    ordered(model, basis)
    assert sum(node.op_type == "Gather" for node in model.graph) == (3 if shown else 1)
    assert not np.array_equal(array_of(model.graph.initializers["table"]), array_of(before.graph.initializers["table"]))
    assert difference(before, model, ids()) < 1e-5


def test_a_layer_that_is_called_again_stays_one_layer() -> None:
    model = canonical(AGAIN, {"up": (8, 12), "down": (12, 8)})
    before = model.clone()
    (basis,) = [basis for basis in find_bases(model) if basis.channels == 12]
    assert len(basis.readers) == 2
    ordered(model, basis)
    assert set(model.graph.initializers) == {"up", "down"}
    assert difference(before, model, feeds_for(model)) < 1e-5


def test_means_over_positions_and_sums_over_channels() -> None:
    model = canonical(POOLED, {name: SHAPES[name] for name in ("w", "v")})
    before = model.clone()
    (basis,) = [basis for basis in find_bases(model) if basis.channels == 12]
    ordered(model, basis)
    assert difference(before, model, feeds_for(model)) < 1e-5


def test_channels_that_are_named_are_the_same_ones() -> None:
    text = """g (float[B,S,8] x) => (float[B,S,6] y) {
        u = MatMul(x, up)  few = Gather <axis = -1> (u, loud)  beside = MatMul(few, w)
        rest = Mul(u, mask)  main = MatMul(rest, down)  y = Add(main, beside)
    }"""
    mask = np.where(np.isin(np.arange(12), [2, 7]), 0, 1).astype(np.float32)
    given = {"up": (8, 12), "down": (12, 6), "w": (2, 6), "mask": mask, "loud": np.array([2, 7])}
    model = canonical(text, given)
    before = model.clone()
    (basis,) = [basis for basis in find_bases(model) if basis.channels == 12]
    ordered(model, basis)
    assert set(model.graph.initializers) == set(given)
    assert difference(before, model, feeds_for(model)) < 1e-5


def test_what_cannot_be_ordered_is_told_and_left() -> None:
    text = """g (float[B,S,8] x) => (float[B,S,6] y) {
        u = MatMul(x, up)  c = CumSum(u, axis)  y = MatMul(c, down)
    }"""
    model = canonical(text, {"up": (8, 12), "down": (12, 6), "axis": np.array(-1)})
    (basis,) = [basis for basis in find_bases(model) if basis.channels == 12]
    assert "CumSum" in basis.refused
    with pytest.raises(FoldError, match="CumSum"):
        reorder_basis(model, basis, np.arange(12), concrete_shapes(model))


def test_no_order_at_all_is_refused() -> None:
    model = block()
    basis = find_bases(model)[0]
    with pytest.raises(FoldError, match="no order"):
        reorder_basis(model, basis, np.zeros(WIDTH, np.int64), concrete_shapes(model))


def test_a_basis_that_lacks_an_end_is_refused_and_nothing_is_changed() -> None:
    model = block(LAYER, outputs=f"float[b, s, 7] head, float[b, s, {WIDTH}] y")
    before = model.clone()
    (basis,) = [basis for basis in find_bases(model) if basis.channels == WIDTH]
    for left in range(len(basis.ends)):
        broken = Basis(**{**vars(basis), "ends": basis.ends[:left] + basis.ends[left + 1 :]})
        with pytest.raises(FoldError, match="changes the outputs"):
            reorder_basis(model, broken, np.random.default_rng(0).permutation(WIDTH), concrete_shapes(model))
        assert difference(before, model, ids()) == 0


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "gemma2", "bloom", "falcon", "vit", "t5_encoder"])
def test_every_basis_of_a_family(family: str) -> None:
    model = ir.load(families.exported(family))
    canonicalise(model)
    before = model.clone()
    free = [number for number, basis in enumerate(find_bases(model)) if not basis.refused]
    assert len(free) == 3  # the stream, and the hidden units of two layers
    for number in free:
        ordered(model, find_bases(model)[number], number)
    assert difference(before, model, families.feeds(family, 2, 12, 0)) < 1e-5
    sizes = [sum(value.const_value.nbytes for value in m.graph.initializers.values()) for m in (before, model)]
    assert sizes[1] <= sizes[0] + 8 * families.HIDDEN  # the order at an output, no copy of a weight
