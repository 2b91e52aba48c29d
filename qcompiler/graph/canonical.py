"""What canonical means, checked: each property of DESIGN.md section 1 that every pass may rely on."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qcompiler.core import DOMAIN, ModelError
from qcompiler.graph.functions import NAMES, OPSET
from qcompiler.graph.linear import linears

_INPUTS = {
    "RMSNorm": 2,
    "RotaryEmbedding": 3,
    "Attention": 3,
    "MaskedAttention": 4,
    "SortByExpert": 1,
    "FakeQuant": 3,
    "FakeQuantPerTensor": 1,
    "FakeQuantPerToken": 1,
    "FakeQuantBlocks": 3,
    "FakeQuantRows": 3,
    "FakeQuantCodebook": 3,
    "FakeQuantFloat": 1,
    "DequantizeFloat": 1,
    "DequantizeCodebook": 3,
    "DequantizeScales": 3,
    "FakeQuantPerGroup": 1,
}
_ATTRIBUTES = {
    "RMSNorm": {"epsilon"},
    "Attention": {"scale"},
    "MaskedAttention": {"scale"},
    "SortByExpert": {"experts"},
    "FakeQuant": {"axis"},
    "FakeQuantBlocks": {"block_size", "low", "high"},
    "FakeQuantRows": {"block_size", "low", "high"},
    "FakeQuantPerGroup": {"block_size"},
    "FakeQuantCodebook": {"block_size"},
    "FakeQuantFloat": {"to"},
    "DequantizeCodebook": {"block_size"},
    "DequantizeScales": {"count"},
}


def check(model: ir.Model) -> None:
    """Verify that the model is in canonical form, at any stage of the pipeline before lowering.

    Raises:
        ModelError: the first property that does not hold, with the node's name.
    """
    for problem in problems(model):
        raise ModelError(f"the graph is not in canonical form: {problem}.")


def problems(model: ir.Model) -> Iterator[str]:
    """Each property that does not hold, as one phrase that names the node."""
    yield from _opsets(model)
    yield from _values(model)
    for node in model.graph:
        if node.domain == DOMAIN:
            yield from _call(model, node)
        elif node.domain == "":
            yield from _standard(node)
    yield from _linears(model)


def _opsets(model: ir.Model) -> Iterator[str]:
    if model.graph.opset_imports.get("") != OPSET:
        yield f"it imports opset {model.graph.opset_imports.get('')} instead of {OPSET}"
    for (domain, name, _), function in model.functions.items():
        if domain != DOMAIN or name not in NAMES:
            yield f"function {domain}::{name} is none of ours"
        if function.opset_imports.get("") != OPSET:
            yield f"function {name} imports opset {function.opset_imports.get('')} instead of {OPSET}"


def _values(model: ir.Model) -> Iterator[str]:
    """Names are the identity of things: each value has one, used once, and is made before it is read."""
    graph = model.graph
    seen: set[str] = set()
    nodes: set[str] = set()
    made: set[ir.Value] = set()
    for name, value in graph.initializers.items():
        if value.const_value is None:
            yield f"initializer {name!r} has no tensor"
        made.add(value)
        seen.add(name)
    for value in graph.inputs:
        made.add(value)
        if value.name not in graph.initializers and value.name in seen:
            yield f"value name {value.name!r} is used twice"
        seen.add(value.name or "")
    for node in graph:
        if node.name and node.name in nodes:
            yield f"two nodes are named {node.name!r}"
        nodes.add(node.name or "")
        for read in node.inputs:
            if read is not None and read not in made:
                yield f"node {node.name!r} reads {read.name!r} before it is computed"
        for output in node.outputs:
            made.add(output)
            if not output.name:
                if output.uses() or len(node.outputs) == 1:
                    yield f"an output of node {node.name!r} has no name"
            elif output.name in seen:
                yield f"value name {output.name!r} is used twice"
            seen.add(output.name or "")
    for value in graph.outputs:
        if value not in made:
            yield f"graph output {value.name!r} is computed nowhere"


def _call(model: ir.Model, node: ir.Node) -> Iterator[str]:
    if node.op_type not in NAMES:
        yield f"node {node.name!r} calls {DOMAIN}::{node.op_type}, which does not exist"
        return
    if (DOMAIN, node.op_type, "") not in model.functions:
        yield f"node {node.name!r} calls {node.op_type}, which the model does not define"
    if len(node.inputs) != _INPUTS[node.op_type] or any(value is None for value in node.inputs):
        wanted = _INPUTS[node.op_type]
        yield f"node {node.name!r} calls {node.op_type} with {len(node.inputs)} inputs instead of {wanted}"
    missing = _ATTRIBUTES.get(node.op_type, set()) - set(node.attributes)
    if missing:
        yield f"node {node.name!r} calls {node.op_type} without {', '.join(sorted(missing))}"


def _standard(node: ir.Node) -> Iterator[str]:
    matrix = node.inputs[1] if node.op_type in ("MatMul", "Gemm") and len(node.inputs) > 1 else None
    if node.op_type == "Gemm" and _initializer(matrix):
        yield f"node {node.name!r} is a Gemm with a constant weight instead of MatMul and Add"
    producer = matrix.producer() if matrix is not None else None
    if producer is not None and producer.domain == "":
        if producer.op_type == "Constant":
            yield f"the weight of node {node.name!r} is a Constant node instead of an initializer"
        if producer.op_type in ("Transpose", "Identity") and _initializer(producer.inputs[0]):
            yield f"the weight of node {node.name!r} comes through a {producer.op_type} instead of being an initializer"
    if node.op_type in ("LayerNormalization", "Add"):
        for value in node.inputs:
            source = value.producer() if value is not None else None
            if source is not None and source.op_type == "Constant" and source.domain == "" and _long(value):
                yield f"a constant vector of node {node.name!r} is a Constant node instead of an initializer"


def _initializer(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and not value.is_graph_input()


def _long(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and len(value.shape) > 0 and value.shape[-1] not in (0, 1)


def _linears(model: ir.Model) -> Iterator[str]:
    """Linears have names, and biases are vectors [out]."""
    for linear in linears(model):
        if not linear.name:
            yield f"the Linear that computes {linear.output.name!r} has no name"
        if linear.bias is None and (shape := _odd_bias(linear.matmul, linear.out_features)) is not None:
            yield f"the bias of Linear {linear.name!r} has shape {shape} instead of [{linear.out_features}]"


def _odd_bias(matmul: ir.Node, columns: int) -> list[int] | None:
    """The shape of an added constant that is a bias but for its leading axes of size 1."""
    uses = matmul.outputs[0].uses()
    if len(uses) != 1 or matmul.outputs[0].is_graph_output():
        return None
    add = next(iter(uses))[0]
    if add.op_type != "Add" or add.domain != "" or len(add.inputs) != 2:
        return None
    other = add.inputs[1] if add.inputs[0] is matmul.outputs[0] else add.inputs[0]
    if not _initializer(other) or other is None or other.shape is None or not other.shape.is_static():
        return None
    shape = [int(d) for d in other.shape.numpy()]
    rank = len(matmul.outputs[0].shape) if matmul.outputs[0].shape is not None else 2
    odd = 1 < len(shape) <= rank and shape[-1] == columns and all(d == 1 for d in shape[:-1])
    return shape if odd else None
