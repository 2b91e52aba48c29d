"""Linears and the quantization of their inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.edit import array_of
from qcompiler.graph.functions import is_call, zero_point_of_rows
from qcompiler.graph.linear import Linear
from qcompiler.targets.tvm.builder import f32
from qcompiler.targets.tvm.emit.builder import Builder, Tensor
from qcompiler.targets.tvm.emit.dims import Size
from qcompiler.targets.tvm.emit.fusion import Fused, is_static
from qcompiler.targets.tvm.isa import Isa
from qcompiler.targets.tvm.kernels import gemm_f32, gemm_int8
from qcompiler.targets.tvm.kernels.epilogue import Epilogue, inverse
from qcompiler.targets.tvm.kernels.quantize import Quantize
from qcompiler.targets.tvm.kernels.quantize_groups import QuantizeGroups


@dataclasses.dataclass(frozen=True)
class Integers:
    """A quantized activation.

    Attributes:
        values: [m, padded K].
        sizes: the shape of the float value.
        scales: "static", "tensor" or "row", as :class:`qcompiler.targets.tvm.kernels.gemm_int8.GemmInt8` has it; or
            "group", as :class:`qcompiler.targets.tvm.kernels.quantize_groups.QuantizeGroups` gives it.
        scale, zero_point: where they are static.
        x_scale, x_zero: tensors where they are not.
        x_sum: the tensor Σ values of each group, in the place of a zero point.
    """

    values: Tensor
    sizes: tuple[Size, ...]
    scales: str
    scale: float = 1.0
    zero_point: int = 0
    x_scale: Tensor | None = None
    x_zero: Tensor | None = None
    x_sum: Tensor | None = None


GRANULARITY = {
    "FakeQuant": "static",
    "FakeQuantPerTensor": "tensor",
    "FakeQuantPerToken": "row",
    "FakeQuantPerGroup": "group",
}


def padded(features: Size, isa: Isa) -> int:
    """K as integers are stored."""
    assert isinstance(features, int)
    return -(-features // isa.group) * isa.group


def static_steps(quant: ir.Node) -> tuple[float, int]:
    """Scale and zero point of a static fake-quant, on the grid 0 … 255."""
    scale, zero = array_of(quant.inputs[1]), array_of(quant.inputs[2])
    assert scale is not None
    assert zero is not None
    signed = zero.dtype == np.int8
    return float(scale.reshape(())), int(zero.reshape(())) + (128 if signed else 0)


def zero_of_rows(quant: ir.Node) -> int:
    """The zero point of a per-token fake-quant; the usual one for the others, which do not ask for it."""
    return round(zero_point_of_rows(quant)) if is_call(quant, "FakeQuantPerToken") else 128


def group_size_of(quant: ir.Node) -> int:
    """Inputs that share a scale of a per-group fake-quant; 0 for the others."""
    return quant.attributes["block_size"].as_int() if is_call(quant, "FakeQuantPerGroup") else 0


def grouped_outputs(m: Size, count: int, group_size: int) -> list[tuple[Sequence[Size], str]]:
    """Shapes and types of values, x_scale and x_sum of an input quantized by group."""
    groups = -(-count // group_size)
    return [((m, groups * group_size), "int8"), ((m, groups), "float32"), ((m, groups), "int32")]


def steps_tensor(builder: Builder, quant: ir.Node) -> Tensor:
    """Scale and zero point as the kernels' argument."""
    name = f"{quant.inputs[1].name if quant.inputs[1] else ''}.steps"
    scale, zero_point = static_steps(quant)
    return builder.constant(name, np.array([inverse(scale), zero_point], np.float32))


def quantize(builder: Builder, quant: ir.Node, x: Tensor, multiplier: Tensor | None = None) -> Integers:
    """The integers of a fake-quant call on x, or on x · multiplier."""
    rows, granularity = builder.rows(x), GRANULARITY[quant.op_type]
    (m, count), isa = rows.sizes, builder.isa
    assert isinstance(count, int)
    if granularity == "group":
        group_size = group_size_of(quant)
        grouped = QuantizeGroups(count, group_size, multiplier is not None)
        arguments = [rows, *([multiplier] if multiplier is not None else [])]
        q, x_scale, x_sum = builder.call(grouped, arguments, grouped_outputs(m, count, group_size))
        return Integers(q, x.sizes, granularity, x_scale=x_scale, x_sum=x_sum)
    kernel = Quantize(count, granularity, multiplier is not None, zero_of_rows(quant))
    inputs = [rows, *([multiplier] if multiplier is not None else [])]
    values = ((m, padded(count, isa)), isa.activation)
    if granularity == "static":
        (q,) = builder.call(kernel, [*inputs, steps_tensor(builder, quant)], [values])
        return Integers(q, x.sizes, granularity, *static_steps(quant))
    scales = (m if granularity == "row" else 1,)
    q, x_scale, x_zero = builder.call(kernel, inputs, [values, (scales, "float32"), (scales, "int32")])
    return Integers(q, x.sizes, granularity, x_scale=x_scale, x_zero=x_zero)


def restored(builder: Builder, x: Integers) -> Tensor:
    """scale · (q - zero_point) in float: for what reads a fake-quant and is no 8-bit Linear."""
    count = x.sizes[-1]
    group_size = _size_of_groups(x)
    tensors = [x.values, *(t for t in (x.x_scale, x.x_zero) if t is not None)]

    def body(buffers: Any, index: Any) -> Any:
        steps = buffers[0][tuple(index)].astype("float32")
        if x.scales == "group":
            return steps * buffers[1][index[0], index[1] // group_size]
        if x.scales == "static":
            return (steps - f32(x.zero_point)) * f32(x.scale)
        which = index[0] if x.scales == "row" else 0
        return (steps - buffers[2][which].astype("float32")) * buffers[1][which]

    rows = builder.compute("restored", (x.values.sizes[0], count), "float32", tensors, body)
    return builder.view(rows, x.sizes)


def _size_of_groups(x: Integers) -> int:
    """Inputs that share a scale where they do so by group; else 1."""
    if x.scales != "group" or x.x_scale is None:
        return 1
    whole, groups = x.values.sizes[-1], x.x_scale.sizes[-1]
    assert isinstance(whole, int)
    assert isinstance(groups, int)
    return whole // groups


def refusal(linear: Linear) -> str | None:
    """Why a Linear has no 8-bit product; None where it has one."""
    weight, quant = linear.weight_quant, linear.activation_quant
    if weight is None:
        return "it is float"
    if weight.op_type != "DequantizeLinear":
        return "its weight is not folded to integers"
    scale, zeros = (
        array_of(value) for value in (weight.inputs[1], weight.inputs[2] if len(weight.inputs) > 2 else None)
    )
    array = array_of(linear.weight)
    if array is None or array.dtype != np.int8 or weight.attributes.get_int("block_size", 0) != 0:
        return "its weight is not int8 by channel"
    if scale is None or scale.size not in (1, linear.out_features) or (zeros is not None and zeros.any()):
        return "its weight is not symmetric by channel"
    if quant is None:
        return "its input is float"
    if is_call(quant, "FakeQuant") and not is_static(quant):
        return "its input has more than one static scale"
    if is_call(quant, "FakeQuantPerGroup"):
        return "its input has scales by group"
    return None


def emit_int8(builder: Builder, fused: Fused, x: Integers, bias: Any, residuals: Sequence[Tensor]) -> Tensor:
    """The product of quantized x; the result has the shape of the Linear's output, or is [m, N] integers."""
    linear, isa = fused.linear, builder.isa
    weight = array_of(linear.weight)
    assert weight is not None
    assert linear.weight_quant is not None
    scale = array_of(linear.weight_quant.inputs[1])
    assert scale is not None
    w_scale = np.broadcast_to(scale.astype(np.float32).reshape(-1), linear.out_features)
    sums = weight.sum(axis=0, dtype=np.int32)
    name = linear.weight.name or linear.name
    tiling = builder.tiling(linear.in_features, linear.out_features)
    kernel = gemm_int8.GemmInt8(linear.in_features, linear.out_features, x.scales, tiling=tiling)
    inputs = [x.values, builder.constant(f"{name}.packed", kernel.pack(weight, isa))]
    if x.scales == "static":
        offset, scale = sums * np.int32(x.zero_point), w_scale * np.float32(x.scale)
    else:
        offset, scale = sums, w_scale
    for suffix, vector in (("offset", offset), ("scale", scale)):
        inputs.append(builder.constant(f"{linear.name}.{suffix}", kernel.pad(vector, isa)))
    inputs += [tensor for tensor in (x.x_scale, x.x_zero) if tensor is not None]
    epilogue = epilogue_of(builder, fused, bias, residuals, inputs, kernel.pad)
    kernel = dataclasses.replace(kernel, epilogue=epilogue)
    return emit_call(builder, kernel, inputs, x.values.sizes[0], (*x.sizes[:-1], linear.out_features))


def emit_float(
    builder: Builder, fused: Fused, x: Tensor, weight: npt.NDArray[Any], bias: Any, residuals: Sequence[Tensor]
) -> Tensor:
    """The product of float x."""
    linear, isa = fused.linear, builder.isa
    rows = builder.rows(x)
    name = linear.weight.name or linear.name
    inputs = [rows, builder.constant(f"{name}.float", gemm_f32.pack(weight, isa))]
    epilogue = epilogue_of(builder, fused, bias, residuals, inputs, gemm_f32.pad_columns)
    kernel = gemm_f32.GemmF32(linear.in_features, linear.out_features, epilogue)
    return emit_call(builder, kernel, inputs, rows.sizes[0], (*x.sizes[:-1], linear.out_features))


def epilogue_of(
    builder: Builder, fused: Fused, bias: Any, residuals: Sequence[Tensor], inputs: list[Tensor], pad: Any
) -> Epilogue:
    """The epilogue, its arguments appended to ``inputs``."""
    if bias is not None:
        inputs.append(builder.constant(f"{fused.linear.name}.bias", pad(bias.astype(np.float32), builder.isa)))
    inputs += [builder.rows(residual) for residual in residuals]
    if fused.requantize is not None:
        inputs.append(steps_tensor(builder, fused.requantize))
    return Epilogue(bias is not None, fused.activation, len(residuals), fused.late, fused.requantize is not None)


def emit_call(builder: Builder, kernel: Any, inputs: list[Tensor], m: Size, sizes: tuple[Size, ...]) -> Tensor:
    """Call the kernel of a Linear on m rows; the result has these sizes, or is [m, N] integers."""
    dtype = kernel.epilogue.dtype(builder.isa.activation)
    (y,) = builder.call(kernel, inputs, [((m, sizes[-1]), dtype)])
    return y if kernel.epilogue.quantized else builder.view(y, sizes)
