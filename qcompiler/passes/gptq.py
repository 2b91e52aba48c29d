"""gptq: round weights so that a Linear's output error is small, not each weight's (Frantar et al. 2023).

The Hessian is that of the input as the Linear will see it: of FakeQuant(x) where there is one, and after the Linears
before it have been rounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.substitutes import few, substituted
from qcompiler.core import DataError, Note, OptionError, StatRequest
from qcompiler.graph.edit import array_of
from qcompiler.graph.functions import is_call
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.run import Feeds
from qcompiler.graph.transaction import Transaction
from qcompiler.graph.weights import fake_quantized, grid_of, on_integers, write_grid
from qcompiler.numerics.affine import integer_range
from qcompiler.numerics.gptq import Rounded, gptq
from qcompiler.numerics.gptq_search import DAMPS, search_damp
from qcompiler.numerics.gptq_target import corrected
from qcompiler.numerics.grids import Grid, weight_grid
from qcompiler.numerics.group_clip import clipped_grid
from qcompiler.passes.annotate import annotated
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.gptq_inputs import Inputs, Moments, given_grid, quantized, request, spread_out, together
from qcompiler.passes.reference import float_weights
from qcompiler.scheme import TensorSpec

_INT8 = TensorSpec("int8")
Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Gptq(Pass):
    """Replace each fake-quantized Linear's weight by what GPTQ makes of it.

    It runs after ``insert``. Below 8 bits scales are found anew (``refits``, ``correction``); with 0 for both, those in
    the graph stay. The rounded weights are written as float numbers, (q - zero_point) · scale, from which ``fold`` gets
    back the same q. Linears that read one value share one Hessian; those that share a weight share its rounding.

    The model is run once, piece by piece: when a Linear's input is observed, all Linears before it are rounded already.
    Only Linears that share a weight between different inputs are rounded beforehand, from one run of the whole model.

    Attributes:
        act_order: round inputs of large mean square first.
        damp: added to the Hessian's diagonal, times its mean; None: 1 for 8 bits, searched for each Hessian on held-out
            samples for fewer. The paper's 0.01 is for 4 bits and 262,144 tokens; with a few thousand tokens, inputs
            that were silent take up all errors for free and then fire on other data.
        folds: parts of the samples for that search.
        text: below 8 bits, where rows are fewer than 8 times the inputs of the widest Linear, learn from the general
            text that comes with qcompiler too, if the model takes text.
        copies: of the samples, with random tokens in their places, that together count as much as the samples; None: 10
            below 8 bits where rows are that few, 4 beside the text, 0 elsewhere.
        beam: roundings of each output channel that are kept from input to input; None: 8 below 8 bits, else 1, which is
            the paper's.
        refits: times that the scales are fitted to the integers and the integers found anew; None: 2 below 8 bits,
            else 0: the scales stay.
        correction: share of what earlier rounding did to a Linear's inputs that its weight makes up for
            (:mod:`qcompiler.numerics.gptq_target`); None: half below 8 bits, else nothing.
        block_size: inputs of a lazy batch; no numbers depend on it.
    """

    name: ClassVar[str] = "gptq"
    act_order: bool = True
    damp: float | None = None
    folds: int = 2
    text: bool = True
    copies: int | None = None
    beam: int | None = None
    refits: int | None = None
    correction: float | None = None
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.folds < 1:
            raise OptionError(f"gptq{{folds={self.folds}}}: it takes one fold at least.")
        if self.damp is not None and not 0 < self.damp < float("inf"):
            raise OptionError(f"gptq{{damp={self.damp}}}: a positive number is wanted, 0.01 to 1 as a rule.")
        if self.copies is not None and self.copies < 0:
            raise OptionError(f"gptq{{copies={self.copies}}}: 0 or more copies of the samples are wanted.")
        if self.beam is not None and self.beam < 1:
            raise OptionError(f"gptq{{beam={self.beam}}}: 1 or more roundings are to be kept.")
        if self.refits is not None and self.refits < 0:
            raise OptionError(f"gptq{{refits={self.refits}}}: 0 or more times are wanted.")
        if self.correction is not None and not 0 <= self.correction <= 1:
            raise OptionError(f"gptq{{correction={self.correction}}}: a share, from 0 to 1, is wanted.")

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        apart = [group for group in together(quantized(model)) if ctx.data is None or spread_out(group)]
        return [wanted for group in apart for wanted in dict.fromkeys(map(request, group))]

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        why = "GPTQ solves for integers, and this weight becomes none"
        rest = [linear for linear in linears(model) if fake_quantized(linear) and not on_integers(linear)]
        notes = [Note(linear.name, "rounded to nearest", why) for linear in rest]
        weights = float_weights(model, ctx)
        groups = together(quantized(model))
        for group in (group for group in groups if ctx.data is None or spread_out(group)):
            hessian = sum(stats[wanted] for wanted in dict.fromkeys(map(request, group)))
            notes += self._round(model, group, Moments(np.asarray([hessian])), self._damp(group), weights, ctx)
        steps = [group for group in groups if ctx.data is not None and not spread_out(group)]
        if steps:
            beside = ctx.float_model if any(self._share(group[0]) for group in steps) else None
            batches, weight, told = self._samples(model, steps, ctx)
            notes += told
            inputs = Inputs(model, beside, batches, weight)
            for group in inputs.in_order(steps):
                damp = self._damp(group)
                moments = inputs.moments(group[0], self.folds if damp is None else 1)
                notes += self._round(model, group, moments, damp, weights, ctx)
        return PassResult(bool(notes), tuple(notes))

    def _samples(
        self, model: ir.Model, steps: list[list[Linear]], ctx: Context
    ) -> tuple[list[Feeds], list[float], list[Note]]:
        """The batches to learn from, how much each counts, and a note where they are more than the caller's."""
        data = list(ctx.data or ())
        text = ctx.text() if self.text and _few(steps, data) else ()
        data += text
        enough = 0 if not _few(steps, data) else 4 if text else 10
        copies = enough if self.copies is None else self.copies
        more = list(substituted(model, data, copies, ctx.seed))
        why = (
            f"it learns too from {len(text)} batches of general text, {copies if more else 0} copies with other tokens"
        )
        notes = [Note("calibration", "gptq has few samples", why)] if text or more else []
        return [*data, *more], [*[1.0] * len(data), *[1 / max(copies, 1)] * len(more)], notes

    def _damp(self, group: list[Linear]) -> float | None:
        """The damping of Linears of one input; None: it is to be searched."""
        return DAMPS[-1] if self.damp is None and not _few_bits(given_grid(group[0])) else self.damp

    def _search(self, linear: Linear) -> dict[str, int]:
        """How far to search for a Linear's integers and scales; int8's one scale a channel stays."""
        beam, refits = (8, 2) if _few_bits(given_grid(linear)) else (1, 0)
        in_groups = is_call(linear.weight_quant, "FakeQuantBlocks")
        return {
            "beam": beam if self.beam is None else self.beam,
            "refits": (refits if self.refits is None else self.refits) if in_groups else 0,
        }

    def _share(self, linear: Linear) -> float:
        """Weights that are corrected leave their range, so only where scales are searched."""
        if not is_call(linear.weight_quant, "FakeQuantBlocks"):
            return 0.0
        return (0.5 if _few_bits(given_grid(linear)) else 0.0) if self.correction is None else self.correction

    def _round(
        self,
        model: ir.Model,
        group: list[Linear],
        moments: Moments,
        damp: float | None,
        weights: dict[str, Array],
        ctx: Context,
    ) -> list[Note]:
        """All weights that meet one Hessian at once, side by side."""
        distinct = list({linear.weight: linear for linear in group}.values())
        hessian, share = moments.hessians.sum(0), self._share(distinct[0])
        goals, grids = [weights[linear.name] for linear in distinct], [_grid(linear, ctx) for linear in distinct]
        if moments.cross is not None and share:
            goals = [corrected(goal, hessian, moments.cross, share) for goal in goals]
            grids = [_searched(*item, np.diag(hessian)) for item in zip(distinct, goals, strict=True)]
        weight, grid = np.concatenate(goals, axis=1), _side_by_side(grids)
        options: dict[str, Any] = {"act_order": self.act_order, "block_size": self.block_size}
        try:
            if damp is None:
                damp, _ = search_damp(weight, moments.hessians, grid, **options)
            options |= self._search(distinct[0])
            rounded = gptq(weight, hessian, grid, damp=damp, **options)
        except DataError as error:
            return [Note(linear.name, "rounded to nearest", str(error)) for linear in group]
        values = rounded.values(grid).astype(np.float32)
        notes = []
        edit = Transaction(model.graph)
        ends = np.cumsum([linear.out_features for linear in distinct])
        for first, end in zip(distinct, ends, strict=True):
            part = slice(end - first.out_features, end)
            readers = [linear for linear in group if linear.weight is first.weight]
            _write(edit, readers, values[:, part])
            if is_call(first.weight_quant, "FakeQuantBlocks"):
                _rescale(readers, rounded, part)
            notes += [Note(linear.name, "gptq", _told(rounded, part)) for linear in readers]
        edit.inherit_names()
        return notes


def _few(steps: list[list[Linear]], data: Sequence[Feeds]) -> bool:
    """Whether rows are few for few bits: GPTQ takes from directions that it has not seen."""
    few_bits = any(_few_bits(given_grid(group[0])) for group in steps)
    return few_bits and few(data, max(group[0].in_features for group in steps))


def _few_bits(grid: Grid) -> bool:
    return grid.high - grid.low <= 16


def _grid(linear: Linear, ctx: Context) -> Grid:
    """The weight's grid; int8 by output channel in the integers that are safe on the target."""
    grid = given_grid(linear)
    if not is_call(linear.weight_quant, "FakeQuant"):
        return grid
    low, high = integer_range(_INT8, ctx.capability.reduce_range)
    assert grid.scale is not None
    return Grid(low, high, scale=np.broadcast_to(grid.scale, (linear.out_features,)))


def _side_by_side(grids: list[Grid]) -> Grid:
    scale = np.concatenate([grid.scale for grid in grids if grid.scale is not None], axis=-1)
    zero_points = [grid.zero_point for grid in grids if grid.zero_point is not None]
    zero_point = np.concatenate(zero_points, axis=-1) if zero_points else None
    return dataclasses.replace(grids[0], scale=scale, zero_point=zero_point)


def _write(edit: Transaction, readers: list[Linear], values: npt.NDArray[np.float32]) -> None:
    """Readers of one weight go on sharing it: they get the same numbers under the same key."""
    old = array_of(readers[0].weight)
    assert old is not None
    for quant in dict.fromkeys(linear.weight_quant for linear in readers):
        assert quant is not None
        edit.weight(quant, 0, values, old, b"gptq")()


def _searched(linear: Linear, weight: Array, importance: Array) -> Grid:
    """The grid that ``insert`` and ``clip_weights`` would have given a weight in groups."""
    spec, _ = annotated(linear)
    assert spec is not None
    full = weight_grid(weight, spec)
    scale, zero_point = (np.reshape(np.asarray(a), (-1, weight.shape[1])) for a in (full.scale, full.zero_point))
    size = full.group_size or len(weight)
    return clipped_grid(weight, Grid(full.low, full.high, size, scale, zero_point), importance)


def _rescale(readers: list[Linear], rounded: Rounded, part: slice) -> None:
    for quant in dict.fromkeys(linear.weight_quant for linear in readers):
        assert quant is not None
        scale, zero_point = rounded.scale[:, part], rounded.zero_point[:, part]
        write_grid(quant, dataclasses.replace(grid_of(quant), scale=scale, zero_point=zero_point))


def _told(rounded: Rounded, part: slice) -> str:
    error, nearest = float(rounded.error[part].sum()), float(rounded.nearest_error[part].sum())
    text = f"squared output error {error / nearest:.2f} of rounding to nearest" if nearest else "no error"
    if rounded.dead:
        text += f", {rounded.dead} dead inputs"
    return f"{text}, damping {rounded.damp:g}"
