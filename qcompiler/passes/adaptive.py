"""adaptive: at each site the best of nothing, shift, smooth and both, judged on what the quantized model will read.

Sites are taken in the order of the graph, in a few rounds. Before each round the model runs with everything that was
decided so far quantized, and the sites of the round are judged on those inputs: on what is made of them here, for what
upstream made of them no choice at this site can help.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.core import FoldPlan, Note, StatRequest
from qcompiler.graph.linear import linears
from qcompiler.numerics.site_judge import Reader
from qcompiler.numerics.site_search import SCALES, SHIFTS, Choice, SiteSearch, search_smoothing
from qcompiler.passes.annotate import leave_weight
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.insert import Insert
from qcompiler.passes.judging import FallbackRule, decision, rows_request
from qcompiler.passes.site_choice import Chooser, Price, Rules, readers_of
from qcompiler.passes.sites import Site, sharing_weights, sites


@dataclasses.dataclass(frozen=True)
class Adaptive(Pass):
    """Choose the transform of each site, and leave the decision how its input is quantized.

    Attributes:
        rounds: how often the model is run anew, quantized as far as is decided; 1: all sites are judged in float.
        fold_gain: a transform that is folded away must lower the site's squared error by this factor at least.
        insert_gain: the same for each operator that is put in.
        shift_all_linears, smooth_all_linears: whether operators may be put in where nothing absorbs a shift, a scale.
        rows: calibration rows each site is judged on.
    """

    name: ClassVar[str] = "adaptive"
    float_exact: ClassVar[bool] = True
    rounds: int = 2
    fold_gain: float = 1.02
    insert_gain: float = 1.1
    shift_all_linears: bool = False
    smooth_all_linears: bool = True
    rows: int = 512

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        """Of the first round; the others collect theirs from the model as it is quantized by then."""
        if ctx.scheme.activation is None:
            return []
        return self._requests(self._rounds(model, ctx)[0])

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        if ctx.scheme.activation is None:
            return PassResult(False)
        rules = Rules(self._search, self.fold_gain, self.insert_gain, self.smooth_all_linears, self.shift_all_linears)
        fallback = FallbackRule(model, ctx.scheme, ctx.capability)
        notes: list[Note] = []
        plans: list[FoldPlan] = []
        ranges: dict[StatRequest, tuple[np.float32, np.float32]] = {}
        for number, together in enumerate(self._rounds(model, ctx)):
            seen = stats
            if number:
                assert ctx.collect is not None  # wants() was answered, so there is data
                seen = ctx.collect(_quantized_so_far(model, ranges, ctx), self._requests(together))
            chooser = Chooser(rules, ctx, fallback, functools.partial(self._read, seen, ctx))
            result = chooser.transform(model, together)
            ranges |= chooser.ranges
            notes += result.notes
            plans += result.plans
        return PassResult(bool(plans), tuple(notes), tuple(plans))

    def _rounds(self, model: ir.Model, ctx: Context) -> list[list[Sequence[Site]]]:
        """The groups of sites that each round decides, in the order of the graph."""
        groups = _in_order(model, sharing_weights(sites(model, ctx.scheme)))
        count = max(1, min(self.rounds, len(groups)))
        return [[groups[i] for i in part] for part in np.array_split(np.arange(len(groups)), count)]

    def _requests(self, together: Sequence[Sequence[Site]]) -> list[StatRequest]:
        return [rows_request(linear.x, self.rows) for group in together for site in group for linear in site.linears]

    def _search(self, search: SiteSearch, price: Price, sites: Sequence[Site]) -> Choice:
        return search_smoothing(search, alphas=(), scales=SCALES, shifts=SHIFTS, price=price)

    def _read(self, seen: Stats, ctx: Context, site: Site) -> list[Reader]:
        return readers_of(site, seen, self.rows, ctx)


def _in_order(model: ir.Model, groups: Sequence[Sequence[Site]]) -> list[Sequence[Site]]:
    place = {node: i for i, node in enumerate(model.graph)}
    return sorted(groups, key=lambda group: min(place[linear.matmul] for site in group for linear in site.linears))


def _quantized_so_far(model: ir.Model, ranges: Stats, ctx: Context) -> ir.Model:
    """A copy with fake-quants wherever the decision is made."""
    copy = model.clone()
    for linear in linears(copy):
        if decision(linear):
            leave_weight(linear, ctx.scheme.weight_of(linear.name))
    Insert().run(copy, ranges, dataclasses.replace(ctx))  # a context of its own: this is not the model's insertion
    return copy
