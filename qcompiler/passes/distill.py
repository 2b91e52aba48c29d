"""distill: learn which way each weight is rounded, until the quantized model says what the float model says.

The float weights behind the fake-quants are trained with a straight-through gradient (Bengio et al. 2013), scales and
zero points as they stand, so that the outputs and every norm's output come near the float model's. The float model
labels any input, so some are made up (data-free distillation, Liu et al. 2023, LLM-QAT, section 3.1; there a language
model writes them, here tokens of the calibration samples are replaced): a few thousand would be learned by heart.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.substitutes import few, training_batches
from qcompiler.core import DataError, Note, OptionError
from qcompiler.graph.edit import array_of, write_input
from qcompiler.graph.transaction import Transaction
from qcompiler.graph.weights import grid_of, to_integers
from qcompiler.numerics.grids import Grid
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.reference import float_weights

Array = npt.NDArray[Any]

_REAL, _FEW_REAL = 0.7, 0.25  # of the batches
_EDGE = 0.45  # of a step from an integer: half a step away the next one begins


@dataclasses.dataclass(frozen=True)
class Distill(Pass):
    """Train the weights of all Linears whose fake-quant is to integers.

    It runs after ``insert``, and after ``gptq`` where that is there: each float weight starts inside the interval that
    is rounded to the integer which stands in the graph, as near to the number it was as that interval allows.

    Attributes:
        steps: batches that are learned from, one update each.
        rate: how far Adam moves a weight in one update at first, in steps of the weight's grid; it falls to 0 along a
            cosine.
        real: share of the batches that are samples as they are; None: 0.7, or 0.25 where rows are few and no text is
            there.
        text: where rows are fewer than 8 times the inputs of the widest Linear, learn from the general text that comes
            with qcompiler too, if the model takes text.
    """

    name: ClassVar[str] = "distill"
    steps: int = 600
    rate: float = 0.002
    real: float | None = None
    text: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise OptionError(f"distill{{steps={self.steps}}}: one step at least is wanted.")
        if not 0 < self.rate < 1:
            raise OptionError(f"distill{{rate={self.rate}}}: a part of a step is wanted, 0.001 to 0.01 as a rule.")
        if self.real is not None and not 0 <= self.real <= 1:
            raise OptionError(f"distill{{real={self.real}}}: a share of the batches, from 0 to 1, is wanted.")

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        if ctx.data is None or ctx.distill is None:
            raise DataError("pass 'distill' learns from samples: give calibration data.")
        if ctx.float_model is None:
            raise OptionError("pass 'distill' comes after 'insert': before it there is nothing to learn.")
        groups = to_integers(model)
        if not groups:
            return PassResult(False, (Note("", "nothing distilled", "no weight is rounded to integers"),))
        before = {quant: grid_of(quant).nearest(_weight(quant)) for quant in groups}
        originals = float_weights(model, ctx)
        student = model.clone()
        calls = {node.name: node for node in student.graph}
        starts: dict[ir.Node, ir.Value] = {}
        for quant, group in groups.items():
            start = inside(originals[group[0].name], before[quant], grid_of(quant))
            starts[quant] = write_input(calls[quant.name], 0, start)
        rates = {value.name or "": self.rate * _step(quant) for quant, value in starts.items()}
        data, widest = list(ctx.data), max(group[0].in_features for group in groups.values())
        text = ctx.text() if self.text and few(data, widest) else ()
        real = (_FEW_REAL if few(data, widest) and not text else _REAL) if self.real is None else self.real
        batches = training_batches(model, [*data, *text], real, ctx.seed)
        learned = ctx.distill(ctx.float_model, student, rates, itertools.islice(batches, self.steps), self.steps)
        edit, notes = Transaction(model.graph), []
        for quant, group in groups.items():
            grid = grid_of(quant)
            q = grid.nearest(learned[starts[quant].name or ""])
            values = np.asarray(grid.dequantized(q), np.float32)
            edit.weight(quant, 0, values, _weight(quant), b"distill")()
            what = f"{np.mean(q != before[quant]):.1%} of its integers changed"
            notes += [Note(linear.name, "distill", what) for linear in group]
        edit.inherit_names()
        return PassResult(bool(notes), tuple(notes))


def inside(weight: Array, q: Array, grid: Grid) -> npt.NDArray[np.float32]:
    """The numbers nearest to a weight [in, out] that are rounded to the integers ``q``, with a little way to the edge.

    Beyond the least and the largest integer the grid takes all there is.
    """
    scale, zero_point = grid.spread(len(q))
    low = np.where(q == grid.low, -np.inf, q - _EDGE)
    high = np.where(q == grid.high, np.inf, q + _EDGE)
    return np.asarray(np.clip(weight / scale + zero_point, low, high) - zero_point, np.float32) * scale


def _weight(quant: ir.Node) -> Array:
    array = array_of(quant.inputs[0])
    assert array is not None
    return array


def _step(quant: ir.Node) -> float:
    """The mean distance between two numbers of a weight's grid."""
    return float(np.mean(grid_of(quant).spread(len(_weight(quant)))[0]))
