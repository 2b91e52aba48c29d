"""bias_correction: give each output channel back what quantization takes from its mean.

Nagel et al. 2019 (Data-Free Quantization), section 4.2: rounding W and x moves the mean of an output channel by
E[x] W - E[x̂] Ŵ, and the bias can take that back. Means are those of calibration data here.

Of the two readings of E[x], the float model's and the quantized model's own value before its fake-quant, it is the
second: every Linear then corrects what its own rounding did, so that all can be corrected from one run. With the float
model's means each Linear would correct its upstream's error too, which upstream corrects already: Linears would have to
be corrected one after the other, with a run over the data for each.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.observers.means import FoldMeans
from qcompiler.core import Note, StatRequest
from qcompiler.graph.edit import array_of, write_input
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.transaction import Transaction
from qcompiler.graph.weights import fake_quantized, rounded_weight
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.reference import float_weights

Vector = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class BiasCorrection(Pass):
    """Correct the bias of every fake-quantized Linear; create one where there is none.

    It runs after ``insert``, and after ``gptq`` where that is used. A Linear is left as it is where the means of some
    samples, corrected by those of the others, are no closer than uncorrected.

    Attributes:
        folds: parts of the calibration samples, for that test.
    """

    name: ClassVar[str] = "bias_correction"
    folds: int = 4

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        return [request for linear in _corrected(model) for request in self._requests(linear)]

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        notes = []
        weights = float_weights(model, ctx)
        for linear in _corrected(model):
            x, seen = (stats[request] for request in self._requests(linear))
            moved = shift_of_means(x, seen, weights[linear.name], rounded_weight(linear))
            kept, left = held_out(moved, x.rows)
            told = f"held-out squared shift of means {kept:.1e} -> {left:.1e}"
            if left < kept:
                add_to_bias(model, linear, x.rows @ moved / x.rows.sum())
                notes.append(Note(linear.name, "bias corrected", told))
            else:
                notes.append(Note(linear.name, "bias not corrected", told))
        return PassResult(any(note.what == "bias corrected" for note in notes), tuple(notes))

    def _requests(self, linear: Linear) -> tuple[StatRequest, StatRequest]:
        read = linear.matmul.inputs[0]
        assert read is not None
        spelling = f"means{{folds={self.folds}}}"
        return StatRequest(linear.x.name or "", spelling, -1), StatRequest(read.name or "", spelling, -1)


def shift_of_means(
    x: FoldMeans, seen: FoldMeans, weight: npt.NDArray[np.floating], rounded: npt.NDArray[np.floating]
) -> Vector:
    """E[x] W - E[x̂] Ŵ of each fold, float64 [folds, out], for weights [in, out]."""
    # In this form nothing large cancels: both differences are small.
    return np.asarray((x.mean - seen.mean) @ weight + seen.mean @ (np.asarray(weight, np.float64) - rounded))


def held_out(moved: Vector, rows: npt.NDArray[np.integer]) -> tuple[float, float]:
    """Mean squared shift of the folds [folds, out]: as it is, and less that of the other folds.

    With one fold there is nothing to hold out, and nothing is left.
    """
    weights = rows / rows.sum()
    before = float(weights @ (moved**2).sum(1))
    if len(moved) == 1:
        return before, 0.0
    total = rows @ moved
    others = (total - rows[:, None] * moved) / (rows.sum() - rows)[:, None]
    return before, float(weights @ ((moved - others) ** 2).sum(1))


def add_to_bias(model: ir.Model, linear: Linear, change: Vector) -> None:
    """Add ``change`` [out] to a Linear's bias; other uses of a shared bias keep the old one."""
    if linear.add is None or linear.bias is None:
        assert linear.weight.dtype is not None
        Transaction(model.graph).create_bias(linear.matmul, change.astype(linear.weight.dtype.numpy()))
        return
    old = array_of(linear.bias)
    assert old is not None
    slot = next(i for i, value in enumerate(linear.add.inputs) if value is linear.bias)
    write_input(linear.add, slot, (old.astype(np.float64) + change).astype(old.dtype))


def _corrected(model: ir.Model) -> list[Linear]:
    """Fake-quantized Linears, but for those whose bias is no plain constant."""
    return [
        linear
        for linear in linears(model)
        if fake_quantized(linear) and (linear.bias is None or array_of(linear.bias) is not None)
    ]
