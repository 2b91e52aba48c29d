"""Edits leave everything that was not asked for as it was: names, shared constants, order, outputs."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qcompiler.graph.edit import (
    add_initializer,
    array_of,
    insert_node,
    names,
    remove_dead,
    replace_value,
    scalar_of,
    sole_user,
    unique_name,
    users,
    value_names,
    write_input,
)
from qcompiler.graph.functions import ensure_function
from tests.graph.tiny import feeds_for, outputs, tiny

TEXT = """g (float[B,4] x) => (float[B,4] y, float[B,4] z) {
    c = Constant<value: tensor = float[4] {1, 2, 3, 4}>()
    p = Mul(x, w)
    q = Mul(p, w)
    y = Add(q, c)
    z = Relu(p)
}"""


@pytest.fixture
def model() -> ir.Model:
    return tiny(TEXT, {"w": [4]})


def node(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph if n.name == name)


def test_array_of_constants_and_of_nothing_else(model: ir.Model) -> None:
    assert array_of(node(model, "p").inputs[1]).shape == (4,)
    np.testing.assert_array_equal(array_of(node(model, "y").inputs[1]), [1, 2, 3, 4])
    assert array_of(node(model, "p").inputs[0]) is None  # fed
    assert array_of(node(model, "q").inputs[0]) is None  # computed
    assert array_of(None) is None


def test_an_initializer_that_may_be_fed_is_no_constant() -> None:
    text = (
        '<ir_version: 10, opset_import: ["": 21]> g (float[2] x, float[2] w = {1, 2}) => (float[2] y) { y = Mul(x, w) }'
    )
    value = ir.from_proto(onnx.parser.parse_model(text)).graph[0].inputs[1]
    assert value.is_initializer()
    assert array_of(value) is None


def test_scalar_of_takes_one_element_of_any_rank(model: ir.Model) -> None:
    graph = model.graph
    assert scalar_of(add_initializer(graph, "one", np.array([[2.5]], np.float32))) == 2.5
    assert scalar_of(add_initializer(graph, "two", np.zeros(2, np.float32))) is None
    assert scalar_of(graph.inputs[0]) is None


def test_names_stay_unique(model: ir.Model) -> None:
    graph = model.graph
    assert value_names(graph) == {"x", "w", "c", "p", "q", "y", "z"}
    assert unique_name(graph, "new") == "new"
    first, second = (add_initializer(graph, "p", np.zeros(1, np.float32)) for _ in range(2))
    assert (first.name, second.name) == ("p_2", "p_3")
    assert unique_name(graph, "p") == "p_4"
    assert names([first, None]) == ["p_2", ""]


def test_scalars_stay_scalars_and_transposes_are_laid_out(model: ir.Model) -> None:
    scalar = add_initializer(model.graph, "s", np.float32(3).reshape(()))
    assert scalar.shape == ir.Shape([])
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3).T
    turned = add_initializer(model.graph, "t", matrix)
    np.testing.assert_array_equal(array_of(turned), matrix)
    assert array_of(turned).flags.c_contiguous


def test_writing_a_shared_constant_leaves_its_other_readers_alone(model: ir.Model) -> None:
    old = array_of(node(model, "p").inputs[1])
    feeds = feeds_for(model)
    before = outputs(model, feeds)
    new = write_input(node(model, "q"), 1, 2 * old)
    assert new.name == "w_2"
    np.testing.assert_array_equal(array_of(node(model, "p").inputs[1]), old)
    after = outputs(model, feeds)
    np.testing.assert_array_equal(after["z"], before["z"])
    shift = np.array([1, 2, 3, 4], np.float32)
    np.testing.assert_allclose(after["y"] - shift, 2 * (before["y"] - shift), rtol=1e-5, atol=1e-5)


def test_writing_a_constant_of_ones_own_keeps_its_name_and_metadata(model: ir.Model) -> None:
    write_input(node(model, "q"), 1, np.ones(4, np.float32))  # now p alone reads w
    model.graph.initializers["w"].metadata_props["qcompiler.parameter"] = "layer.w"
    new = write_input(node(model, "p"), 1, np.full(4, 7, np.float32))
    assert new.name == "w"
    assert new.metadata_props["qcompiler.parameter"] == "layer.w"
    assert model.graph.initializers["w"] is new
    feeds = feeds_for(model)
    np.testing.assert_array_equal(outputs(model, feeds)["z"], np.maximum(7 * feeds["x"], 0))


def test_a_constant_that_is_a_graph_output_is_not_overwritten() -> None:
    model = tiny("g (float[4] x) => (float[4] y, float[4] w) { y = Mul(x, w) }", {"w": [4]})
    old = array_of(node(model, "y").inputs[1])
    assert write_input(node(model, "y"), 1, np.zeros(4, np.float32)).name == "w_2"
    got = outputs(model, feeds_for(model))
    np.testing.assert_array_equal(got["w"], old)
    np.testing.assert_array_equal(got["y"], np.zeros(4))


def test_insert_node_stands_before_and_borrows_type_and_shape(model: ir.Model) -> None:
    target = node(model, "q")
    made = insert_node(
        model.graph, target, "LeakyRelu", [target.inputs[0]], attributes={"alpha": 0.5}, name="w", like=target.inputs[0]
    )
    order = list(model.graph)
    assert order.index(made) == order.index(target) - 1
    assert made.outputs[0].name == "w_2"
    assert (made.outputs[0].shape, made.outputs[0].type) == (target.inputs[0].shape, target.inputs[0].type)
    target.replace_input_with(0, made.outputs[0])
    feeds = feeds_for(model)
    w = array_of(node(model, "p").inputs[1])
    p = feeds["x"] * w
    expected = np.where(p > 0, p, 0.5 * p) * w + np.array([1, 2, 3, 4], np.float32)
    np.testing.assert_allclose(outputs(model, feeds)["y"], expected, rtol=1e-6)


def test_two_nodes_of_one_name_would_not_run(model: ir.Model) -> None:
    target = node(model, "q")
    made = [insert_node(model.graph, target, "Abs", [target.inputs[0]], name="p") for _ in range(2)]
    assert [n.name for n in made] == ["p_2", "p_3"]
    outputs(model, feeds_for(model))


def test_several_outputs_are_numbered(model: ir.Model) -> None:
    made = insert_node(model.graph, node(model, "q"), "Split", [node(model, "p").outputs[0]], outputs=2, name="half")
    assert names(made.outputs) == ["half.0", "half.1"]


def test_replace_value_moves_readers_and_keeps_the_names_of_graph_outputs(model: ir.Model) -> None:
    last = node(model, "y")
    negated = insert_node(model.graph, last, "Neg", [last.inputs[0]], name="negated", like=last.outputs[0]).outputs[0]
    replace_value(last.outputs[0], negated)
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert model.graph.outputs[0] is negated
    outputs(model, feeds_for(model))  # still valid while the old node stands
    remove_dead(model)
    assert [n.op_type for n in model.graph] == ["Mul", "Mul", "Neg", "Relu"]
    feeds = feeds_for(model)
    w = array_of(node(model, "p").inputs[1])
    np.testing.assert_allclose(outputs(model, feeds)["y"], -(feeds["x"] * w * w), rtol=1e-6)


def test_replace_value_of_an_inner_value_renames_nothing(model: ir.Model) -> None:
    p = node(model, "p").outputs[0]
    made = insert_node(model.graph, node(model, "q"), "Abs", [model.graph.inputs[0]], name="magnitude", like=p)
    replace_value(p, made.outputs[0])
    assert (p.name, made.outputs[0].name) == ("p", "magnitude")
    assert users(p) == []
    assert {n.name for n in users(made.outputs[0])} == {"q", "z"}


def test_remove_dead_drops_nodes_constants_and_functions_and_keeps_inputs() -> None:
    model = tiny(
        "g (float[B,4] x, float[B,4] unused) => (float[B,4] y) { dead = Mul(x, w)  gone = Relu(dead)  y = Abs(x) }",
        {"w": [4]},
    )
    ensure_function(model, "RMSNorm")
    assert remove_dead(model)
    assert [n.op_type for n in model.graph] == ["Abs"]
    assert not model.graph.initializers
    assert not model.functions
    assert [value.name for value in model.graph.inputs] == ["x", "unused"]
    assert not remove_dead(model)


def test_sole_user(model: ir.Model) -> None:
    assert sole_user(node(model, "q").outputs[0]) is node(model, "y")
    assert sole_user(node(model, "p").outputs[0]) is None  # two readers
    assert sole_user(node(model, "y").outputs[0]) is None  # a graph output
    assert sole_user(None) is None
    twice = tiny("g (float[4] x) => (float[4] y) { a = Abs(x)  y = Mul(a, a) }", {})
    assert sole_user(node(twice, "a").outputs[0]) is None  # read twice by one node
    assert users(node(twice, "a").outputs[0]) == [node(twice, "y")]
