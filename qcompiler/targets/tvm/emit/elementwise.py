"""Operators that work on each element, with ONNX's broadcasting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from tvm import te, tirx

from qcompiler.targets.tvm.emit.builder import Builder, Tensor
from qcompiler.targets.tvm.emit.dims import Size, product
from qcompiler.targets.tvm.kernels.pointwise import Pointwise

Rule = Callable[[Builder, ir.Node, Sequence[Tensor]], Tensor]


def broadcast(*shapes: Sequence[Size]) -> tuple[Size, ...]:
    """The common shape.

    Raises:
        ValueError: two sizes are not known to be equal.
    """
    rank = max(len(shape) for shape in shapes)
    result: list[Size] = [1] * rank
    for shape in shapes:
        for axis, size in enumerate(shape, rank - len(shape)):
            if result[axis] == 1:
                result[axis] = size
            elif size not in (1, result[axis]):
                raise ValueError(f"sizes {result[axis]} and {size} are not known to be equal")
    return tuple(result)


def element(buffer: Any, sizes: Sequence[Size], index: Sequence[Any]) -> Any:
    """What stands at ``index`` of a shape that this one is broadcast to."""
    own = index[len(index) - len(sizes) :]
    return buffer(*(0 if size == 1 else place for size, place in zip(sizes, own, strict=True)))


def apply(builder: Builder, name: str, inputs: Sequence[Tensor], dtype: str, function: Callable[..., Any]) -> Tensor:
    """function(*elements) for every element of the common shape."""
    sizes = broadcast(*(tensor.sizes for tensor in inputs))

    def body(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
        return function(*(element(b, t.sizes, index) for b, t in zip(buffers, inputs, strict=True)))

    return builder.compute(name.lower(), sizes, dtype, inputs, body)


def _same(function: Callable[..., Any]) -> Rule:
    """The result has the type of the last input."""
    return lambda builder, node, inputs: apply(builder, node.op_type, inputs, inputs[-1].dtype, function)


def _truth(function: Callable[..., Any]) -> Rule:
    return lambda builder, node, inputs: apply(builder, node.op_type, inputs, "bool", function)


def _fold(function: Callable[[Any, Any], Any]) -> Rule:
    def rule(builder: Builder, node: ir.Node, inputs: Sequence[Tensor]) -> Tensor:
        def combine(*elements: Any) -> Any:
            value = elements[0]
            for other in elements[1:]:
                value = function(value, other)
            return value

        return apply(builder, node.op_type, inputs, inputs[0].dtype, combine)

    return rule


def pointwise(builder: Builder, x: Tensor, activation: str) -> Tensor:
    """A vectorised activation."""
    flat = builder.view(x, (product(x.sizes),))
    (y,) = builder.call(Pointwise(activation), [flat], [(flat.sizes, "float32")])
    return builder.view(y, x.sizes)


def _activation(name: str) -> Rule:
    return lambda builder, node, inputs: pointwise(builder, inputs[0], name)


def _gelu(builder: Builder, node: ir.Node, inputs: Sequence[Tensor]) -> Tensor:
    return pointwise(builder, inputs[0], gelu_name(node))


def gelu_name(node: ir.Node) -> str:
    """Which of the two forms a Gelu node has."""
    return "gelu_tanh" if node.attributes.get_string("approximate", "none") == "tanh" else "gelu"


def _cast(builder: Builder, node: ir.Node, inputs: Sequence[Tensor]) -> Tensor:
    dtype = ir.DataType(node.attributes.get_int("to")).numpy().name
    return cast(builder, inputs[0], dtype)


def cast(builder: Builder, x: Tensor, dtype: str) -> Tensor:
    """Cast; to bool means != 0."""
    if x.dtype == dtype:
        return x
    if dtype == "bool":
        return apply(builder, "cast", [x], dtype, lambda a: a != tirx.const(0, x.dtype))
    return apply(builder, "cast", [x], dtype, lambda a: a.astype(dtype))


def _clip(builder: Builder, node: ir.Node, inputs: Sequence[Tensor]) -> Tensor:
    """max(x, lowest), then min(x, highest); either may be absent."""
    x, bounds = inputs[0], iter(inputs[1:])
    for value, function in zip(node.inputs[1:], (tirx.max, tirx.min), strict=False):
        if value is not None:
            x = apply(builder, "clip", [x, next(bounds)], x.dtype, function)
    return x


def _divide(a: Any, b: Any) -> Any:
    return tirx.truncdiv(a, b) if "int" in str(a.ty.dtype) else a / b


def _is_nan(a: Any) -> Any:
    return te.isnan(a)


RULES: dict[str, Rule] = {
    "Add": _same(lambda a, b: a + b),
    "Sub": _same(lambda a, b: a - b),
    "Mul": _same(lambda a, b: a * b),
    "Div": _same(_divide),
    "Pow": lambda builder, node, inputs: apply(
        builder, "pow", inputs, inputs[0].dtype, lambda a, b: te.power(a, b.astype(str(a.ty.dtype)))
    ),
    "Sum": _fold(lambda a, b: a + b),
    "Max": _fold(tirx.max),
    "Min": _fold(tirx.min),
    "Neg": _same(lambda a: tirx.const(0, str(a.ty.dtype)) - a),
    "Abs": _same(te.abs),
    "Sqrt": _same(te.sqrt),
    "Reciprocal": _same(lambda a: tirx.const(1.0, "float32") / a),
    "Exp": _same(te.exp),
    "Log": _same(te.log),
    "Cos": _same(te.cos),
    "Sin": _same(te.sin),
    "Erf": _same(te.erf),
    "Round": _same(te.nearbyint),
    "Floor": _same(te.floor),
    "Ceil": _same(te.ceil),
    "Tanh": _activation("tanh"),
    "Sigmoid": _activation("sigmoid"),
    "Relu": _activation("relu"),
    "Gelu": _gelu,
    "Cast": _cast,
    "Clip": _clip,
    "Where": _same(lambda c, a, b: tirx.Select(c, a, b)),
    "And": _truth(tirx.all),
    "Or": _truth(tirx.any),
    "Xor": _truth(lambda a, b: a != b),
    "Not": _truth(lambda a: tirx.Not(a)),
    "Equal": _truth(lambda a, b: tirx.EQ(a, b)),
    "Less": _truth(lambda a, b: a < b),
    "LessOrEqual": _truth(lambda a, b: a <= b),
    "Greater": _truth(lambda a, b: a > b),
    "GreaterOrEqual": _truth(lambda a, b: a >= b),
    "IsNaN": _truth(_is_nan),
    "Identity": lambda builder, node, inputs: inputs[0],
}
