"""Which kernel computes a Linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from qcompiler.core import Note
from qcompiler.graph.linear import Linear
from qcompiler.targets.tvm.emit.builder import Builder, Tensor
from qcompiler.targets.tvm.emit.fusion import Fused
from qcompiler.targets.tvm.emit.groups import emit_groups, group_size_for
from qcompiler.targets.tvm.emit.linears import Integers, emit_float, emit_int8, refusal
from qcompiler.targets.tvm.kernels import BY_GROUP, FLOAT, FLOAT_BY_GROUP, INT8


def kernel_of(linear: Linear) -> str:
    """One of :data:`qcompiler.targets.tvm.kernels.LINEAR`."""
    if refusal(linear) is None:
        return INT8
    if group_size_for(linear) is None:
        return FLOAT
    return FLOAT_BY_GROUP if linear.activation_quant is None else BY_GROUP


def emit_linear(
    builder: Builder,
    fused: Fused,
    x: Integers | Tensor,
    weight: npt.NDArray[Any] | None,
    bias: npt.NDArray[Any] | None,
    residuals: Sequence[Tensor],
) -> Tensor:
    """The product by the kernel of :func:`kernel_of`: of integers where that takes them.

    Args:
        builder: where to.
        fused: the Linear with its epilogue.
        x: its input.
        weight: in float, where the kernel is float.
        bias: or None.
        residuals: of the epilogue.
    """
    if weight is not None and isinstance(x, Tensor):
        return emit_float(builder, fused, x, weight, bias, residuals)
    if isinstance(x, Integers) and x.scales != "group":
        return emit_int8(builder, fused, x, bias, residuals)
    return emit_groups(builder, fused, x, bias, residuals)


def kernel_note(fused: Fused, kernel: str) -> Note:
    """What became of a Linear, for the report."""
    after = ["residual"] * len(fused.residuals)
    if fused.activation:
        after.insert(len(after) if fused.late else 0, fused.activation)
    if fused.requantize is not None:
        after.append("quantize")
    why = f"fused: {', '.join(['dequantize', *after])}" if kernel != FLOAT else refusal(fused.linear) or ""
    return Note(fused.linear.name, kernel, why)
