"""Several quantized versions of one float graph in one session, and which of them each site takes is an input.

Trying what single sites cost would otherwise open a session for each trial, which writes and reads all weights again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.edit import add_initializer, array_of, first_of, insert_node, replace_value, unique_name
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.run import Feeds, Runner

_CHOICES = "qcompiler.choices"


class Switch:
    """A float graph whose Linears can be quantized site by site, from run to run.

    Args:
        model: the float graph; it is not changed.
        versions: the same graph, each with its Linears fake-quantized or folded in another way.
        sites: names of the Linears that switch together; those of one site read one value.
        threads: intra-op threads; 0 leaves the number to ONNX Runtime.
    """

    def __init__(
        self, model: ir.Model, versions: Sequence[ir.Model], sites: Sequence[Sequence[str]], threads: int = 0
    ) -> None:
        merged = model.clone()
        graph = merged.graph
        for version in versions:
            for key, function in version.functions.items():
                if key not in merged.functions:
                    merged.functions[key] = function.clone()
            for domain, number in version.graph.opset_imports.items():
                graph.opset_imports.setdefault(domain, number)
        choices = ir.Value(name=_CHOICES, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(sites)]))
        graph.inputs.append(choices)
        floats = {linear.name: linear for linear in linears(merged)}
        quantized = [{linear.name: linear for linear in linears(version)} for version in versions]
        for number, names in enumerate(sites):
            group = [floats[name] for name in names]
            _make_switchable(graph, choices, number, group, [[found[name] for name in names] for found in quantized])
        self.sites = len(sites)
        self._runner = Runner(merged, threads=threads, in_order=True)
        self.outputs = self._runner.outputs

    def __call__(self, feeds: Feeds, choices: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
        """The outputs, with version ``choices[i] - 1`` at site i; 0: float.

        Raises:
            ModelError: the run fails in ONNX Runtime.
        """
        return self._runner({**feeds, _CHOICES: np.asarray(choices, np.int64)})


def _make_switchable(
    graph: ir.Graph, choices: ir.Value, number: int, group: Sequence[Linear], versions: Sequence[Sequence[Linear]]
) -> None:
    """Let the Linears of one site read their input, and compute their products, by a choice."""
    x = group[0].x
    before = first_of(graph, {linear.matmul for linear in group})
    index = add_initializer(graph, f"{_CHOICES}.{number}", np.array(number, np.int64))
    choice = insert_node(graph, before, "Gather", [choices, index], name=f"{_CHOICES}.of.{number}").outputs[0]
    quants = [_copied(graph, version[0].activation_quant, x) for version in versions]
    cases = [[quant] if quant is not None else None for quant in quants]
    chosen = _select(graph, before, choice, [ir.node("Identity", [x])], cases, f"{x.name}.chosen", x)
    for place, linear in enumerate(group):
        plain = [ir.node("MatMul", [chosen, linear.weight])]
        products: list[list[ir.Node] | None] = []
        for version in versions:
            products.append(_equal(products, version[place]) or _product(graph, chosen, version[place]))
        old = linear.matmul.outputs[0]
        replace_value(old, _select(graph, linear.matmul, choice, plain, products, f"{linear.name}.chosen", old))
        graph.remove(linear.matmul, safe=True)


def _product(graph: ir.Graph, x: ir.Value, linear: Linear) -> list[ir.Node] | None:
    """The nodes that multiply by the quantized weight; None: it is not quantized."""
    weight = _copied(graph, linear.weight_quant)
    return [weight, ir.node("MatMul", [x, weight.outputs[0]])] if weight is not None else None


def _equal(made: Sequence[list[ir.Node] | None], linear: Linear) -> list[ir.Node] | None:
    """What an earlier version made of the same weight: most differ in the activation alone."""
    quant = linear.weight_quant
    for nodes in made:
        if nodes is None or quant is None or nodes[0].op_type != quant.op_type:
            continue
        pairs = [(array_of(a), array_of(b)) for a, b in zip(nodes[0].inputs, quant.inputs, strict=False)]
        if all(a is not None and b is not None and np.array_equal(a, b) for a, b in pairs):
            return nodes
    return None


def _copied(graph: ir.Graph, quant: ir.Node | None, x: ir.Value | None = None) -> ir.Node | None:
    """The node that quantizes a Linear's input ``x`` or its weight, for a branch of this graph; None: there is none."""
    if quant is None:
        return None
    inputs: list[ir.Value | None] = [] if x is None else [x]
    for value in quant.inputs[len(inputs) :]:
        array = array_of(value)
        inputs.append(None if value is None or array is None else add_initializer(graph, value.name or "", array))
    return ir.Node(quant.domain, quant.op_type, inputs, list(quant.attributes.values()))


def _select(
    graph: ir.Graph,
    before: ir.Node,
    choice: ir.Value,
    plain: list[ir.Node],
    cases: Sequence[list[ir.Node] | None],
    name: str,
    like: ir.Value,
) -> ir.Value:
    """What ``cases[choice - 1]`` computes, or ``plain`` where the choice is 0 or there is no such case.

    Nothing but the chosen one runs. Every list of nodes ends with the one that makes the value.
    """
    nodes = plain
    distinct = {id(case): case for case in cases if case is not None}
    for number, case in enumerate(distinct.values()):
        when = add_initializer(graph, f"{name}.when", np.array([False, *(other is case for other in cases)]))
        condition = insert_node(graph, before, "Gather", [when, choice], name=f"{name}.condition")
        branches = {
            "then_branch": _branch(case, like, f"{name}.{number}.then"),
            "else_branch": _branch(nodes, like, f"{name}.{number}.else"),
        }
        nodes = [ir.node("If", condition.outputs, attributes=branches)]
    for node in nodes:
        node.name = node.outputs[0].name = unique_name(graph, name)
        node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
    graph.insert_before(before, nodes)
    return nodes[-1].outputs[0]


def _branch(nodes: list[ir.Node], like: ir.Value, name: str) -> ir.Graph:
    for number, node in enumerate(nodes):
        node.name = node.outputs[0].name = f"{name}.{number}"
    output = nodes[-1].outputs[0]
    output.type = like.type
    return ir.Graph([], [output], nodes=nodes, name=name)
