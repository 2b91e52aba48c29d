"""Linears whose weights have scales by group, or fewer than 8 bits, or whose inputs are float or quantized by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler.graph.linear import Linear
from qcompiler.graph.weights import folded_grid
from qcompiler.targets.ort.nbits import Blocks, blocks_of
from qcompiler.targets.tvm.emit.builder import Builder, Tensor
from qcompiler.targets.tvm.emit.fusion import Fused
from qcompiler.targets.tvm.emit.linears import Integers, emit_call, epilogue_of, group_size_of
from qcompiler.targets.tvm.kernels import gemm_groups, gemm_groups_f32

MULTIPLE = 16
"""Of which every group size is a multiple: the weights of 2 bits that one load serves."""


def group_size_for(linear: Linear) -> int | None:
    """The groups of its kernel, those that its input is quantized in; None where there is no such kernel for it."""
    quant, dequantize = linear.activation_quant, linear.weight_quant
    grid = None if dequantize is None or dequantize.op_type != "DequantizeLinear" else folded_grid(dequantize)
    if grid is None or grid.high - grid.low not in (3, 15, 255):
        return None
    if quant is not None:
        size = group_size_of(quant)  # 0 where it is not by group
    else:
        size = grid.group_size or -(-linear.in_features // MULTIPLE) * MULTIPLE
    return size if size and size % MULTIPLE == 0 and (grid.group_size or size) % size == 0 else None


def emit_groups(builder: Builder, fused: Fused, x: Integers | Tensor, bias: Any, residuals: Sequence[Tensor]) -> Tensor:
    """The product of x, which is quantized in the groups of :func:`group_size_for`, or float."""
    linear, isa, blocks = fused.linear, builder.isa, _blocks(fused.linear)
    size, bits = blocks.group_size, blocks.bits
    symmetric = bool((blocks.zero_point == 1 << (bits - 1)).all())
    name = f"{linear.weight.name or linear.name}.g{size}"
    shape = (linear.in_features, linear.out_features, size, bits, symmetric)
    scale = builder.constant(f"{name}.scale", gemm_groups.pack_groups(blocks.scale, isa))
    if isinstance(x, Integers):
        inputs = [x.values, builder.constant(f"{name}.packed", gemm_groups.pack(blocks.q, size, bits, isa)), scale]
    else:
        packed = gemm_groups_f32.pack(blocks.q, size, bits, isa)
        inputs = [builder.rows(x), builder.constant(f"{name}.lanes", packed), scale]
    if not symmetric:
        zero = blocks.zero_point.astype(np.uint8 if isinstance(x, Integers) else np.float32)
        inputs.append(builder.constant(f"{name}.zero.{zero.dtype}", gemm_groups.pack_groups(zero, isa)))
    if isinstance(x, Integers):
        inputs += [tensor for tensor in (x.x_scale, x.x_sum) if tensor is not None]
    epilogue = epilogue_of(builder, fused, bias, residuals, inputs, gemm_groups.pad_panels)
    kind = gemm_groups.GemmGroups if isinstance(x, Integers) else gemm_groups_f32.GemmGroupsF32
    sizes = (*x.sizes[:-1], linear.out_features)
    return emit_call(builder, kind(*shape, epilogue), inputs, inputs[0].sizes[0], sizes)


def _blocks(linear: Linear) -> Blocks:
    size = group_size_for(linear)
    assert size is not None
    assert linear.weight_quant is not None
    blocks = blocks_of(linear.weight_quant)
    assert blocks is not None
    return blocks.in_blocks_of(size)
