"""The float weights that a quantized Linear stands for, also after a pass has rounded them."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linears
from qcompiler.passes.base import Context


def float_weights(model: ir.Model, ctx: Context) -> dict[str, npt.NDArray[Any]]:
    """Float weight [in, out] of every Linear by name: the float model's, or the Linear's own where there is none.

    ``gptq`` leaves rounded weights in the graph; what they were is in the float model that ``insert`` kept.
    """
    reference = {} if ctx.float_model is None else {linear.name: linear for linear in linears(ctx.float_model)}
    weights = {}
    for linear in linears(model):
        kept = reference.get(linear.name, linear)
        array = array_of(kept.weight)
        if array is not None:
            weights[linear.name] = array
    return weights
