"""gptq: round weights so that a Linear's output error is small, not each weight's (Frantar et al. 2023).

The Hessian is that of the input as the Linear will see it: of FakeQuant(x) where there is one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import DataError, Note, StatRequest
from qcompiler.graph.edit import array_of
from qcompiler.graph.functions import is_call
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.transaction import Transaction
from qcompiler.numerics.affine import integer_range
from qcompiler.numerics.gptq import Grid, Rounded, gptq
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.reference import float_weights
from qcompiler.scheme import TensorSpec

_INT8 = TensorSpec("int8")


@dataclasses.dataclass(frozen=True)
class Gptq(Pass):
    """Replace each fake-quantized Linear's weight by what GPTQ makes of it, in the scales that ``insert`` set.

    It runs after ``insert``. The rounded weights are written as float numbers, q · scale, from which ``fold`` gets back
    the same q. Linears that read one value share one Hessian; those that share a weight share its rounding.

    Attributes:
        act_order: round inputs of large mean square first.
        damp: added to the Hessian's diagonal, times its mean. The paper's 0.01 is for 4 bits and 262,144 tokens; with a
            few thousand tokens, inputs that were silent take up all errors for free and then fire on other data.
        block_size: inputs of a lazy batch; no numbers depend on it.
    """

    name: ClassVar[str] = "gptq"
    act_order: bool = True
    damp: float = 1.0
    block_size: int = 64

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        return [_request(linear) for linear in _quantized(model)]

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        notes: list[Note] = []
        weights = float_weights(model, ctx)
        for group in _together(_quantized(model)):
            hessian = sum(stats[request] for request in dict.fromkeys(map(_request, group)))
            distinct = list({linear.weight: linear for linear in group}.values())
            try:
                rounded = self._solve([weights[linear.name] for linear in distinct], distinct, hessian, ctx)
            except DataError as error:
                notes += [Note(linear.name, "rounded to nearest", str(error)) for linear in group]
                continue
            edit = Transaction(model.graph)
            ends = np.cumsum([linear.out_features for linear in distinct])
            for first, end in zip(distinct, ends, strict=True):
                part = slice(end - first.out_features, end)
                readers = [linear for linear in group if linear.weight is first.weight]
                _write(edit, readers, rounded.q[:, part].astype(np.float32) * rounded.scale[part])
                notes += [Note(linear.name, "gptq", _told(rounded, part)) for linear in readers]
            edit.inherit_names()
        return PassResult(bool(notes), tuple(notes))

    def _solve(
        self, weights: list[npt.NDArray[Any]], group: list[Linear], hessian: npt.NDArray[np.float64], ctx: Context
    ) -> Rounded:
        """All weights that meet one Hessian at once, side by side."""
        low, high = integer_range(_INT8, ctx.capability.reduce_range)
        scale = np.concatenate([_scale(linear) for linear in group])
        return gptq(
            np.concatenate(weights, axis=1),
            hessian,
            Grid(low, high, scale=scale),
            act_order=self.act_order,
            damp=self.damp,
            block_size=self.block_size,
        )


def _quantized(model: ir.Model) -> list[Linear]:
    return [linear for linear in linears(model) if is_call(linear.weight_quant, "FakeQuant")]


def _request(linear: Linear) -> StatRequest:
    """The Hessian of what the MatMul reads: the fake-quantized value, if there is one."""
    read = linear.matmul.inputs[0]
    assert read is not None
    return StatRequest(read.name or "", "hessian", -1)


def _together(candidates: list[Linear]) -> list[list[Linear]]:
    """Linears in groups that are solved at once: those that read one value or, if they share weights, those."""
    shared: dict[ir.Value, list[Linear]] = {}
    for linear in candidates:
        shared.setdefault(linear.weight, []).append(linear)
    groups: dict[tuple[StatRequest, ...], list[Linear]] = {}
    for readers in shared.values():
        groups.setdefault(tuple(dict.fromkeys(map(_request, readers))), []).extend(readers)
    return list(groups.values())


def _scale(linear: Linear) -> npt.NDArray[Any]:
    """The weight's scales, float32 [out]."""
    assert linear.weight_quant is not None
    scale = array_of(linear.weight_quant.inputs[1])
    assert scale is not None
    return np.broadcast_to(scale, (linear.out_features,))


def _write(edit: Transaction, readers: list[Linear], values: npt.NDArray[np.float32]) -> None:
    """Readers of one weight go on sharing it: they get the same numbers under the same key."""
    old = array_of(readers[0].weight)
    assert old is not None
    for quant in dict.fromkeys(linear.weight_quant for linear in readers):
        assert quant is not None
        edit.weight(quant, 0, values, old, b"gptq")()


def _told(rounded: Rounded, part: slice) -> str:
    error, nearest = float(rounded.error[part].sum()), float(rounded.nearest_error[part].sum())
    text = f"squared output error {error / nearest:.2f} of rounding to nearest" if nearest else "no error"
    if rounded.dead:
        text += f", {rounded.dead} dead inputs"
    return f"{text}, damping {rounded.damp:g}"
