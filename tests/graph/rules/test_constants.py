from __future__ import annotations

import numpy as np
import pytest

from qcompiler.graph.edit import array_of
from tests.graph.rules.spelling import counts, normal, raised, spelled


def test_shape_arithmetic_becomes_a_constant_target() -> None:
    """The legacy exporter's view(batch, seq, heads, -1)."""
    body = """g (float[B, S, 8] x) => (float[B, S, 2, 4] y) {
        zero = Constant<value = int64 {0}>() one = Constant<value = int64 {1}>() axis = Constant<value_ints = [0]>()
        s = Shape(x) b0 = Gather<axis = 0>(s, zero) l0 = Gather<axis = 0>(s, one) b = Unsqueeze(b0, axis)
        l = Unsqueeze(l0, axis)
        h = Constant<value_ints = [2]>() m = Constant<value_ints = [-1]>() t = Concat<axis = 0>(b, l, h, m)
        y = Reshape(x, t) }"""
    model = raised(spelled(body), {"x": normal(2, 3, 8)})
    (node,) = model.graph
    assert array_of(node.inputs[1]).tolist() == [0, 0, 2, 4]


@pytest.mark.parametrize(
    "body",
    [
        "y = Identity(x)",
        "c = Cast<to = 1>(x) y = Abs(c)",
        "one = Constant<value_float = 1.0>() m = Mul(x, one) d = Div(m, one) y = Abs(d)",
        "t = Transpose<perm = [0, 1, 2]>(x) y = Abs(t)",
        "s = Shape(x) r = Reshape(x, s) e = Expand(r, s) y = Abs(e)",
        """a = Constant<value_ints = [0]>() z = Constant<value_ints = [9223372036854775807]>()
            s = Slice(x, a, z, a) y = Abs(s)""",
        "d, m = Dropout(x) y = Abs(d)",
        "c = Concat<axis = 1>(x) y = Abs(c)",
    ],
)
def test_what_does_nothing_goes(body: str) -> None:
    model = raised(spelled(f"g (float[B, S, 8] x) => (float[B, S, 8] y) {{ {body} }}"), {"x": normal(2, 3, 8)})
    assert len(model.graph) == 1


@pytest.mark.parametrize(
    "body",
    [
        "one = Constant<value = float[1, 1, 1, 1] {1.0}>() y = Mul(x, one)",  # it adds an axis
        "a = Constant<value_ints = [0]>() z = Constant<value_ints = [1]>() y = Slice(x, a, z, a)",
        "c = Cast<to = 7>(x) y = Cast<to = 1>(c)",
        """b = Shape<start = 0, end = 1>(x) r = Constant<value_ints = [4, -1]>() t = Concat<axis = 0>(b, r)
            y = Reshape(x, t)""",
        "t = Constant<value_ints = [2, 1, 1, 1]>() y = Expand(x, t)",
    ],
)
def test_what_does_something_stays(body: str) -> None:
    model = raised(spelled(f"g (float[B, S, 8] x) => (float y) {{ {body} }}"), {"x": normal(2, 3, 8)})
    assert len(model.graph) >= 1
    assert "Identity" not in counts(model)


def test_integer_arithmetic_folds_and_float_parameters_do_not() -> None:
    body = """g (float[B, 4] x) => (float[B, 4] y) { a = Constant<value = int64 {2}>() b = Constant<value = int64 {3}>()
        c = Mul(a, b) f = Cast<to = 1>(c) w2 = Mul(w, w) z = Mul(x, w2) y = Mul(z, f) }"""
    model = raised(spelled(body, {"w": (4,)}), {"x": normal(2, 4)})
    assert counts(model) == {"Mul": 3}
    assert "w" in model.graph.initializers


def test_a_folded_value_that_a_subgraph_reads_is_still_there() -> None:
    body = """g (float[4] x, bool c) => (float[4] y) { one = Constant<value_float = 1.0>() two = Add(one, one)
        y = If (c) <then_branch = t () => (float[4] a) {
        a = Mul(x, two) }, else_branch = e () => (float[4] b) { b = Identity(x) }> }"""
    for condition in (True, False):
        raised(spelled(body), {"x": normal(4), "c": np.array(condition)})


def test_zero_in_a_target_copies_only_where_it_says_so() -> None:
    body = """g (float[B, 0, 3] x) => (float[3, 0, 2] y) { t = Constant<value_ints = [3, 0, 2]>()
        y = Reshape<allowzero = 1>(x, t) }"""
    raised(spelled(body), {"x": np.zeros((2, 0, 3), np.float32)})


def test_a_graph_output_keeps_its_name_when_its_producer_goes() -> None:
    model = raised(spelled("g (float[4] x) => (float[4] y) { a = Abs(x) y = Identity(a) }"), {"x": normal(4)})
    (node,) = model.graph
    assert (node.op_type, node.outputs[0].name) == ("Abs", "y")


def test_equal_work_is_done_once() -> None:
    model = raised(spelled("g (float[4] x) => (float[4] y) { a = Abs(x) b = Abs(x) y = Add(a, b) }"), {"x": normal(4)})
    assert counts(model) == {"Abs": 1, "Add": 1}


def test_an_axis_size_is_read_from_the_graph_input_that_has_it() -> None:
    body = """g (float[B, S, 8] x) => (int64[1] y, int64[1] z, float[B, S, 8] b) { a = Abs(x) b = Neg(a)
        y = Shape<start = 1, end = 2>(b) t = Transpose<perm = [1, 0, 2]>(a) v = Shape<start = 0, end = 1>(t)
        z = Add(v, y) }"""
    model = raised(spelled(body), {"x": normal(2, 3, 8)})
    assert counts(model) == {"Abs": 1, "Neg": 1, "Shape": 1, "Add": 1}
    assert next(node for node in model.graph if node.op_type == "Shape").inputs[0] is model.graph.inputs[0]
