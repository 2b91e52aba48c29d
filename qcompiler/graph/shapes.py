"""Concrete shapes of every value, from a dry run of the graph with small sizes and without its weights.

Symbolic dimensions become small numbers (batch 2, sequence 3 …), node after node is inferred with ONNX's own shape
inference, and whatever is small and known (shapes, ranges, index arithmetic) is computed with ``onnx.reference``. So a
``Reshape`` to a computed shape has one definite meaning, and a weight is never read.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
import onnx.shape_inference
import onnx_ir as ir

from qcompiler.graph.edit import array_of
from qcompiler.graph.functions import OPSET, is_call

Sizes = tuple[int, ...]

SIZES: Sizes = (2, 3, 4, 5, 6, 7)
"""What a symbolic dimension becomes, by its axis: all batches 2, all sequences 3."""

OTHER_SIZES: Sizes = (3, 5, 7, 2, 4, 11)
"""A second choice: what holds for both does not hang on a size by accident."""

_SMALL = 4096
_FOLDED = 64  # constants of at most this many elements are read; weights are larger


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is known of a value: its concrete shape, its dtype, and its numbers where they do not depend on the data."""

    shape: tuple[int, ...]
    dtype: ir.DataType
    numbers: npt.NDArray[Any] | None = None


Facts = Mapping[str, Fact]


def concrete_shapes(model: ir.Model, sizes: Sizes = SIZES) -> dict[str, Fact]:
    """Facts by value name; values whose shape does not follow from the inputs' (data-dependent, unknown) are absent."""
    facts: dict[str, Fact] = {}
    for value in model.graph.inputs:
        if value.shape is not None and value.dtype is not None:
            facts[value.name or ""] = Fact(_sized(value.shape, sizes), value.dtype)
    for name, value in model.graph.initializers.items():
        fact = _constant_fact(value)
        if fact is not None:
            facts[name] = fact
    cache: dict[Any, Any] = {}
    for node in model.graph:
        for output, fact in zip(node.outputs, _infer(node, facts, cache), strict=False):
            if fact is not None and output.name:
                facts[output.name] = fact
    return facts


def _sized(shape: ir.Shape, sizes: Sizes) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else sizes[min(i, len(sizes) - 1)] for i, d in enumerate(shape))


def _constant_fact(value: ir.Value) -> Fact | None:
    tensor = value.const_value
    if tensor is None:
        return None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    small = math.prod(shape) <= (_FOLDED if tensor.dtype.is_floating_point() else _SMALL)
    return Fact(shape, tensor.dtype, tensor.numpy() if small else None)


def _infer(node: ir.Node, facts: Facts, cache: dict[Any, Any]) -> list[Fact | None]:
    if node.op_type == "Constant" and node.domain == "":
        array = array_of(node.outputs[0])
        return [None if array is None else _array_fact(array)]
    inputs = [facts.get(value.name or "") if value is not None else None for value in node.inputs]
    if any(fact is None for fact, value in zip(inputs, node.inputs, strict=True) if value is not None):
        return []
    if is_call(node):
        return _call_facts(node, [fact for fact in inputs if fact is not None])
    if node.domain not in ("", "ai.onnx") or any(a.type in _GRAPHS for a in node.attributes.values()):
        return []
    if node.op_type == "Shape" and inputs[0] is not None:
        start, stop = (node.attributes[k].value if k in node.attributes else None for k in ("start", "end"))
        return [_array_fact(np.array(inputs[0].shape, dtype=np.int64)[start:stop])]
    try:
        outputs = _infer_outputs(node, inputs, cache)
    except onnx.shape_inference.InferenceError:
        return []
    return _compute(node, inputs, outputs, cache)


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _call_facts(node: ir.Node, inputs: list[Fact]) -> list[Fact | None]:
    """How many rows each expert gets depends on the data: here as evenly many as there can be, which is one way."""
    if not is_call(node, "SortByExpert"):
        return [_call_fact(node, inputs)]
    (rows,), experts = inputs[0].shape, node.attributes["experts"].as_int()
    order = Fact((rows,), ir.DataType.INT64)
    return [order, order, _array_fact(np.diff(np.arange(experts + 1) * rows // experts))]


def _call_fact(node: ir.Node, inputs: list[Fact]) -> Fact:
    """Our functions keep the shape of their first input, attention but for the last axis, which is v's; what
    dequantizes has the type of its second, float32 where there is none."""
    shape = inputs[0].shape
    if is_call(node, "Attention", "MaskedAttention"):
        shape = (*shape[:-1], inputs[2].shape[-1])
    if is_call(node, "DequantizeScales"):
        shape = (node.attributes["count"].as_int(),)
    if is_call(node, "DequantizeFloat"):
        return Fact(shape, ir.DataType.FLOAT)
    return Fact(shape, inputs[1 if node.op_type.startswith("Dequantize") else 0].dtype)


def _array_fact(array: npt.NDArray[Any]) -> Fact:
    small = array.size <= _SMALL
    return Fact(array.shape, ir.DataType.from_numpy(array.dtype), array if small else None)


def _signature(node: ir.Node, inputs: list[Fact | None]) -> tuple[Any, ...]:
    attributes = tuple(sorted((a.name, repr(a.value)) for a in node.attributes.values()))
    known = tuple(
        None if f is None else (f.shape, f.dtype, None if f.numbers is None else f.numbers.tobytes()) for f in inputs
    )
    return node.op_type, attributes, known, len(node.outputs)


def _proto(node: ir.Node, inputs: list[Fact | None]) -> onnx.NodeProto:
    """The node with numbered inputs and outputs, so that equal work is recognised as equal."""
    proto = onnx.NodeProto(op_type=node.op_type)
    proto.input.extend("" if fact is None else f"i{k}" for k, fact in enumerate(inputs))
    proto.output.extend(f"o{k}" for k in range(len(node.outputs)))
    proto.attribute.extend(ir.to_proto(attribute) for attribute in node.attributes.values())
    return proto


def _infer_outputs(node: ir.Node, inputs: list[Fact | None], cache: dict[Any, Any]) -> list[Fact | None]:
    key = ("infer", *_signature(node, inputs))
    if key not in cache:
        types, data = {}, {}
        for k, fact in enumerate(inputs):
            if fact is not None:
                types[f"i{k}"] = onnx.helper.make_tensor_type_proto(int(fact.dtype), fact.shape)
                if fact.numbers is not None:
                    data[f"i{k}"] = onnx.numpy_helper.from_array(np.array(fact.numbers, order="C"))
        found = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op_type, OPSET, ""),
            _proto(node, inputs),
            types,
            data,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        )
        cache[key] = [_type_fact(found.get(f"o{k}")) for k in range(len(node.outputs))]
    return list(cache[key])


def _type_fact(proto: onnx.TypeProto | None) -> Fact | None:
    if proto is None or not proto.tensor_type.HasField("shape"):
        return None
    dims = proto.tensor_type.shape.dim
    if not all(d.HasField("dim_value") for d in dims):
        return None
    return Fact(tuple(d.dim_value for d in dims), ir.DataType(proto.tensor_type.elem_type))


def _compute(
    node: ir.Node, inputs: list[Fact | None], outputs: list[Fact | None], cache: dict[Any, Any]
) -> list[Fact | None]:
    """Numbers of the outputs, where all inputs' numbers are known and the outputs are not known to be large."""
    numbers = [None if fact is None else fact.numbers for fact in inputs]
    if node.op_type in _RANDOM or any(f is not None and f.numbers is None for f in inputs):
        return outputs
    if any(fact is not None and math.prod(fact.shape) > _SMALL for fact in outputs):
        return outputs
    key = ("compute", *_signature(node, inputs))
    if key not in cache:
        proto = _proto(node, inputs)
        graph = onnx.helper.make_graph(
            [proto],
            "g",
            [onnx.helper.make_empty_tensor_value_info(name) for name in proto.input if name],
            [onnx.helper.make_empty_tensor_value_info(name) for name in proto.output],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)])
        feeds = {f"i{k}": array for k, array in enumerate(numbers) if array is not None}
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                arrays = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
            cache[key] = [_array_fact(np.asarray(array)) for array in arrays]
        except Exception:  # the reference lacks an operator or a dtype: the shape alone is known
            cache[key] = outputs
    return list(cache[key])


_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
