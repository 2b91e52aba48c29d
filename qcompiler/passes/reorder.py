"""reorder: permute channels so that weights of like magnitude share a group's scale, for nothing at run time.

The hidden units between two Linears may stand in any order, and so may the channels of a residual stream: the weights
on both sides are permuted (``graph/basis.py`` finds them). Only scales by group along a weight's inputs notice.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.core import FoldPlan, Note, StatRequest
from qcompiler.graph.basis import Basis, find_bases
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import Linear
from qcompiler.graph.reorder import reorder_basis
from qcompiler.graph.shapes import concrete_shapes
from qcompiler.graph.transaction import FoldError
from qcompiler.numerics.group_swaps import swapped
from qcompiler.numerics.ordering import Reading, best_order, error_of, residual_variance
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.judging import quantized, rows_request, sampled_outputs
from qcompiler.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class Reorder(Pass):
    """Order channels where the scheme's weights have scales by group; runs after passes that scale channels
    (``split``, ``adaptive``, ``awq``) and before ``insert``.

    Attributes:
        outputs: order channels that outputs of the model show as well; a Gather at each of these restores the order.
        sweeps: how often each two neighbouring groups are looked at to exchange channels; 0: channels are sorted only.
        gain: the expected squared error must fall by this factor at least.
        rows: calibration rows from which it is known what an error counts; without data all inputs count alike.
        features: output features of a weight that are looked at.
    """

    name: ClassVar[str] = "reorder"
    float_exact: ClassVar[bool] = True
    outputs: bool = True
    sweeps: int = 3
    gain: float = 1.01
    rows: int = 2048
    features: int = 512

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        if ctx.data is None:
            return []
        grouped = _in_groups(model, ctx.scheme)
        read = [grouped[node] for basis in self._bases(model, ctx) for node in basis.readers if node in grouped]
        return list(dict.fromkeys(rows_request(linear.x, self.rows) for linear in read))

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        grouped = _in_groups(model, ctx.scheme)
        if not grouped:
            return PassResult(False, (Note(self.name, "nothing ordered", "no weight has scales by group of inputs"),))
        notes: list[Note] = []
        plans: list[FoldPlan] = []
        facts = None
        for basis in self._bases(model, ctx):
            readings = self._readings([grouped[node] for node in basis.readers if node in grouped], stats, ctx)
            if not readings:
                continue
            name, order = best_order(readings)
            if self.sweeps:
                order = swapped(readings, order, self.sweeps)
            left = error_of(readings, order) / (error_of(readings, np.arange(basis.channels)) or 1.0)
            told = f"{name}: squared error of about {left:.2f} of that as given"
            if not left * self.gain < 1:
                notes.append(Note(basis.name, "channels not ordered", f"no gain worth it: {told}"))
                continue
            facts = facts or concrete_shapes(model)
            try:
                plan = reorder_basis(model, basis, order, facts, seed=ctx.seed)
            except FoldError as error:
                notes.append(Note(basis.name, "channels not ordered", str(error)))
                continue
            plans.append(dataclasses.replace(plan, why=told))
            notes.append(Note(basis.name, f"{basis.channels} channels ordered", told))
        return PassResult(bool(plans), tuple(notes), tuple(plans))

    def _bases(self, model: ir.Model, ctx: Context) -> list[Basis]:
        """Those that may be ordered. Where the source's own parameters are all there can be, hidden units alone: their
        Linears are parameters, and what a stream is made of may be none."""
        free = [basis for basis in find_bases(model) if not basis.refused]
        if ctx.capability.fixed_graph:
            return [basis for basis in free if not basis.outputs and _of_linears(basis)]
        return [basis for basis in free if self.outputs or not basis.outputs]

    def _readings(self, readers: list[Linear], stats: Stats, ctx: Context) -> list[Reading]:
        counts: dict[ir.Value, np.ndarray] = {}
        readings = []
        for linear in readers:
            if linear.x not in counts:
                counts[linear.x] = np.ones(linear.in_features)
                if ctx.data is not None:
                    counts[linear.x] = residual_variance(stats[rows_request(linear.x, self.rows)].rows)
            weight = array_of(linear.weight)
            assert weight is not None
            if linear.out_features > self.features:
                weight = sampled_outputs(weight, self.features, ctx.seed)
            readings.append(
                Reading(np.asarray(weight, np.float32), counts[linear.x], ctx.scheme.weight_of(linear.name))
            )
        return readings


def _in_groups(model: ir.Model, scheme: Scheme) -> dict[ir.Node, Linear]:
    """The Linears whose weights get more than one group, by their MatMul."""
    found = {}
    for linear in quantized(model, scheme):
        size = scheme.weight_of(linear.name).group_size
        if size is not None and size < linear.in_features:
            found[linear.matmul] = linear
    return found


def _of_linears(basis: Basis) -> bool:
    """Whether nothing but Linears, and the biases behind them, is ordered."""
    return all(end.node.op_type in ("MatMul", "Add") for end in basis.ends)
