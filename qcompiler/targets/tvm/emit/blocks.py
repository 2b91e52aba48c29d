"""Norms, rotary embeddings, convolutions and products of activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tvm import tirx

from qcompiler.targets.tvm.emit.builder import Builder, Tensor
from qcompiler.targets.tvm.emit.dims import Dim, Size, product
from qcompiler.targets.tvm.emit.elementwise import broadcast, element
from qcompiler.targets.tvm.emit.linears import (
    GRANULARITY,
    Integers,
    group_size_of,
    grouped_outputs,
    padded,
    static_steps,
    steps_tensor,
    zero_of_rows,
)
from qcompiler.targets.tvm.emit.movement import expand, transpose
from qcompiler.targets.tvm.kernels import gemm_f32
from qcompiler.targets.tvm.kernels.batch_matmul import BatchMatMul
from qcompiler.targets.tvm.kernels.epilogue import Epilogue
from qcompiler.targets.tvm.kernels.norm import Norm


def norm(
    builder: Builder,
    node: ir.Node,
    operands: tuple[Tensor, Tensor, Tensor | None],
    quant: ir.Node | None,
    multiplier: Tensor | None,
) -> tuple[Tensor, Integers | None]:
    """The normalized value, and its integers where ``quant``, a fake-quant, reads it.

    Args:
        builder: where to.
        node: LayerNormalization or RMSNorm.
        operands: x, weight and bias.
        quant: a fake-quant that is static, per token or per group, or None.
        multiplier: what the value is multiplied by before that, or None.
    """
    x, weight, bias = operands
    rows, isa = builder.rows(x), builder.isa
    m, count = rows.sizes
    if not isinstance(count, int) or weight.sizes != (count,):
        raise ValueError("its weight is not a vector along the last axis")
    granularity = "" if quant is None else GRANULARITY[quant.op_type]
    kernel = Norm(
        count,
        node.attributes.get_float("epsilon", 1e-5),
        node.op_type == "LayerNormalization",
        bias is not None,
        granularity,
        multiplier is not None,
        128 if quant is None else zero_of_rows(quant),
        0 if quant is None else group_size_of(quant),
    )
    inputs = [rows, weight, *(tensor for tensor in (bias, multiplier) if tensor is not None)]
    outputs: list[tuple[Sequence[Size], str]] = [((m, count), "float32")]
    if quant is None:
        return builder.view(builder.call(kernel, inputs, outputs)[0], x.sizes), None
    if granularity == "group":
        y, q, x_scale, x_sum = builder.call(kernel, inputs, [*outputs, *grouped_outputs(m, count, kernel.group_size)])
        return builder.view(y, x.sizes), Integers(q, x.sizes, granularity, x_scale=x_scale, x_sum=x_sum)
    outputs.append(((m, padded(count, isa)), isa.activation))
    if granularity == "static":
        inputs.append(steps_tensor(builder, quant))
        y, q = builder.call(kernel, inputs, outputs)
        return builder.view(y, x.sizes), Integers(q, x.sizes, granularity, *static_steps(quant))
    outputs += [((m,), "float32"), ((m,), "int32")]
    y, q, x_scale, x_zero = builder.call(kernel, inputs, outputs)
    return builder.view(y, x.sizes), Integers(q, x.sizes, granularity, x_scale=x_scale, x_zero=x_zero)


def rotary(builder: Builder, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x · cos + rotate_half(x) · sin."""
    width = x.sizes[-1]
    if not isinstance(width, int):
        raise ValueError("its last axis is open")
    half = width // 2
    sizes = broadcast(x.sizes, cos.sizes, sin.sizes)

    def body(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
        value, c, s = (element(b, t.sizes, index) for b, t in zip(buffers, (x, cos, sin), strict=True))
        d = index[-1]
        ahead = element(buffers[0], x.sizes, (*index[:-1], d + half))
        behind = element(buffers[0], x.sizes, (*index[:-1], d - half))
        zero = tirx.const(0.0, "float32")
        return value * c + tirx.if_then_else(d < half, zero - ahead, behind) * s

    return builder.compute("rotary", sizes, x.dtype, [x, cos, sin], body)


def matmul(builder: Builder, a: Tensor, c: Tensor) -> Tensor:
    """ONNX's MatMul of two activations."""
    if len(a.sizes) == 1 or len(c.sizes) == 1:
        raise ValueError("a vector is multiplied")
    batch = broadcast(a.sizes[:-2], c.sizes[:-2])
    a, c = (
        builder.view(t := expand(builder, x, (*batch, *x.sizes[-2:])), (product(batch), *t.sizes[-2:])) for x in (a, c)
    )
    if a.sizes[2] != c.sizes[1]:
        raise ValueError(f"sizes {a.sizes[2]} and {c.sizes[1]} are not known to be equal")
    (y,) = builder.call(BatchMatMul(), [a, c], [((a.sizes[0], a.sizes[1], c.sizes[2]), "float32")])
    return builder.view(y, (*batch, a.sizes[1], c.sizes[2]))


def convolution(
    builder: Builder, node: ir.Node, x: Tensor, weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None
) -> Tensor:
    """A convolution of one group as a product: every window of x is a row."""
    rank = weight.ndim - 2
    strides = list(node.attributes.get_ints("strides", [1] * rank))
    dilations = list(node.attributes.get_ints("dilations", [1] * rank))
    pads = list(node.attributes.get_ints("pads", [0] * (2 * rank)))
    if node.attributes.get_int("group", 1) != 1 or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        raise ValueError("only a Conv of one group with explicit padding is understood")
    windows: list[Size] = []
    for axis, size in enumerate(x.sizes[2:]):
        reach = dilations[axis] * (weight.shape[2 + axis] - 1) + 1
        room = size + pads[axis] + pads[rank + axis] - reach
        if isinstance(room, Dim) and strides[axis] != 1:
            raise ValueError("it has strides along an open axis")
        windows.append((room if strides[axis] == 1 else room // strides[axis]) + 1)
    kernel = weight.shape[2:]
    depth = int(np.prod(weight.shape[1:]))

    def body(buffers: Sequence[Any], index: Sequence[Any]) -> Any:
        batch, places, rest = index[0], index[1 : 1 + rank], index[-1]
        within: list[Any] = []
        for length in reversed(kernel):
            within.insert(0, rest % length)
            rest = rest // length
        at = [p * s + w * d - lead for p, s, w, d, lead in zip(places, strides, within, dilations, pads, strict=False)]
        value = buffers[0][(batch, rest, *at)]
        inside = [c for p, size in zip(at, x.sizes[2:], strict=True) for c in (p >= 0, p < builder.expression(size))]
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0.0, "float32")) if any(pads) else value

    columns = builder.compute("windows", (x.sizes[0], *windows, depth), "float32", [x], body)
    rows = builder.rows(columns)
    out = weight.shape[0]
    name = node.inputs[1].name if node.inputs[1] is not None else ""
    packed = gemm_f32.pack(weight.reshape(out, depth).T, builder.isa)
    inputs = [rows, builder.constant(f"{name}.packed", packed)]
    if bias is not None:
        inputs.append(builder.constant(f"{name}.bias", gemm_f32.pad_columns(bias, builder.isa)))
    gemm = gemm_f32.GemmF32(depth, out, Epilogue(bias is not None))
    (y,) = builder.call(gemm, inputs, [((rows.sizes[0], out), "float32")])
    shaped = builder.view(y, (x.sizes[0], *windows, out))
    return transpose(builder, shaped, [0, rank + 1, *range(1, rank + 1)])
