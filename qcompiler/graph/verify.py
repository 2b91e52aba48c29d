"""Proof on numbers that a rewrite changed nothing: between source and sinks, and at the model's outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
import onnx_ir as ir

from qcompiler.core import DOMAIN, ModelError
from qcompiler.graph.edit import array_of
from qcompiler.graph.functions import OPSET
from qcompiler.graph.linear import as_linear
from qcompiler.graph.run import Feeds, Runner
from qcompiler.graph.shapes import Fact

_COLUMNS = 64
"""Output features of a sink that are compared: all are scaled alike, and an output head has tens of thousands."""

Arrays = dict[str, npt.NDArray[Any]]


def compare_outputs(before: ir.Model, after: ir.Model, batches: Iterable[Feeds]) -> float:
    """Largest relative difference of any model output over all batches in ONNX Runtime: max|a - b| / max|a|."""
    first, second = Runner(before), Runner(after)
    return max((relative_error(first(feeds), second(feeds)) for feeds in batches), default=0.0)


def relative_error(before: Mapping[str, npt.NDArray[Any]], after: Mapping[str, npt.NDArray[Any]]) -> float:
    """max over names of max|a - b| / max|a|; infinite where NaN or inf stand in one only."""
    worst = 0.0
    for name, a in before.items():
        b = after[name]
        finite = np.isfinite(a)
        if a.shape != b.shape or not np.array_equal(finite, np.isfinite(b)):
            return float("inf")
        a, b = a[finite].astype(np.float64), b[finite].astype(np.float64)
        if a.size:
            difference, size = float(np.abs(a - b).max()), float(np.abs(a).max())
            worst = max(worst, difference / size if size else difference)
    return worst


def region_outputs(model: ir.Model, boundary: Mapping[str, Fact], linears: Sequence[str], seed: int = 0) -> Arrays:
    """What the sinks compute in float64, by name, when the values of ``boundary`` are filled from ``seed``.

    A boundary value with known numbers keeps them; other floats are normal, booleans fair coins, indices zero.

    Raises:
        ModelError: the region reads something that is neither constant nor in ``boundary``, or cannot be evaluated.
    """
    nodes = {node.name: node for node in model.graph if node.name in set(linears)}
    wanted = {name: nodes[name].inputs[0] for name in linears}
    region, constants = _closure(model.graph, [value for value in wanted.values() if value is not None], boundary)
    feeds = {name: fill(name, fact, seed) for name, fact in boundary.items()}
    feeds.update({name: _double(array) for name, array in constants.items()})
    names = {name: value.name or "" for name, value in wanted.items() if value is not None}
    activations = evaluate(model, region, feeds, sorted(set(names.values())))
    return {name: _apply(nodes[name], activations[names[name]], seed) for name in linears}


def _closure(graph: ir.Graph, ends: list[ir.Value], boundary: Mapping[str, Fact]) -> tuple[list[ir.Node], Arrays]:
    """Nodes between boundary and ``ends`` in graph order, and the constants they read."""
    inside: set[ir.Node] = set()
    constants: Arrays = {}
    pending = list(ends)
    while pending:
        value = pending.pop()
        if value.name in boundary:
            continue
        if (array := array_of(value)) is not None:
            constants[value.name or ""] = array
            continue
        node = value.producer()
        if node is None:
            raise ModelError(f"the region reads {value.name!r}, which is outside it")
        if node not in inside:
            inside.add(node)
            pending.extend(v for v in node.inputs if v is not None)
    return [node for node in graph if node in inside], constants


def fill(name: str, fact: Fact, seed: int) -> npt.NDArray[Any]:
    if fact.numbers is not None:
        return _double(fact.numbers)
    rng = np.random.default_rng([seed, *name.encode()])
    if fact.dtype.is_floating_point():
        return np.asarray(rng.standard_normal(fact.shape))
    if fact.dtype == ir.DataType.BOOL:
        return rng.integers(0, 2, fact.shape).astype(bool)
    return np.zeros(fact.shape, dtype=fact.dtype.numpy())


def _double(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    floating = ir.DataType.from_numpy(array.dtype).is_floating_point()
    return array.astype(np.float64) if floating else array


def evaluate(model: ir.Model, region: list[ir.Node], feeds: Arrays, outputs: list[str]) -> Arrays:
    empty = onnx.helper.make_empty_tensor_value_info
    graph = onnx.helper.make_graph(
        [_in_double(ir.to_proto(node)) for node in region],
        "region",
        [empty(name) for name in feeds],
        [empty(name) for name in outputs],
    )
    called = {(node.domain, node.op_type) for node in region}
    proto = onnx.helper.make_model(
        graph,
        functions=[ir.to_proto(f) for f in model.functions.values() if (f.domain, f.name) in called],
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)],
    )
    known = {name: array for name, array in feeds.items() if name in outputs}
    wanted = [name for name in outputs if name not in known]
    if not wanted:
        return known
    try:
        arrays = onnx.reference.ReferenceEvaluator(proto).run(wanted, feeds)
    except Exception as error:
        raise ModelError(f"the region cannot be evaluated: {str(error).splitlines()[0]}") from error
    return {**known, **{name: np.asarray(array) for name, array in zip(wanted, arrays, strict=True)}}


def _in_double(node: onnx.NodeProto) -> onnx.NodeProto:
    """Casts between floating-point types become casts to double."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and ir.DataType(attribute.i).is_floating_point():
            attribute.i = int(ir.DataType.DOUBLE)
    return node


def _apply(matmul: ir.Node, x: npt.NDArray[Any], seed: int) -> npt.NDArray[Any]:
    """The sink's own output on x, for a sample of its output features."""
    weight = array_of(matmul.inputs[1])
    assert weight is not None
    features = weight.shape[-1]
    sample = np.arange(features)
    if features > _COLUMNS:
        sample = np.random.default_rng(seed).choice(features, _COLUMNS, replace=False)
    y = x @ weight[..., sample].astype(np.float64)
    linear = as_linear(matmul)
    bias = array_of(linear.bias) if linear is not None else None
    return y if bias is None else y + bias[sample].astype(np.float64)
