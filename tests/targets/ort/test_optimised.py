"""Lowered nodes found again after ONNX Runtime's optimizer, and told from float ones."""

import onnx
import pytest

from qcompiler.core import ModelError
from qcompiler.graph.linear import linears
from qcompiler.targets.ort import OrtCpu
from qcompiler.targets.ort.measure import lowered, one_linear
from qcompiler.targets.ort.optimised import Finder, is_integer, optimised_graph
from tests.targets.ort.graphs import FLOAT, Graph, encoder, random_weights


@pytest.mark.parametrize("kind", ["static", "per_tensor", "per_token"])
def test_every_lowered_linear_is_found_as_an_integer_kernel(kind):
    model = encoder(kind)
    count = len(linears(model))
    nodes = OrtCpu().lower(model).nodes
    finder = Finder(model, optimised_graph(model))
    found = [finder.find(name) for name in nodes.values()]
    assert len(found) == count
    assert all(node is not None and is_integer(node) for node in found)


def test_a_node_that_was_renamed_by_a_fusion_is_found_by_its_output():
    """DynamicQuantizeLinear + MatMulIntegerToFloat become DynamicQuantizeMatMul, a node of another name."""
    model = lowered((8, 64, 32), "per_tensor", "MatMulIntegerToFloat")
    node = Finder(model, optimised_graph(model)).find("linear.integer")
    assert node is not None
    assert node.op_type == "DynamicQuantizeMatMul"


def test_float_products_and_absent_nodes_are_told_apart():
    model = one_linear(8, 64, 32, None)
    finder = Finder(model, optimised_graph(model))
    node = finder.find("linear")
    assert node is None or not is_integer(node)
    assert finder.find("nothing of that name") is None


@pytest.mark.parametrize(("level", "expected"), [(4, True), (0, False)])
def test_block_products_count_at_accuracy_level_4_only(level, expected):
    node = onnx.helper.make_node("MatMulNBits", [], [], domain="com.microsoft", accuracy_level=level)
    assert is_integer(node) is expected


def test_a_graph_that_onnx_runtime_refuses_is_one_sentence():
    g = Graph(None, random_weights())
    g.output(g.op("NoSuchOperator", g.input("x", FLOAT, ["B"])), "y")
    with pytest.raises(ModelError, match="ONNX Runtime refuses"):
        optimised_graph(g.model)
