"""smooth: SmoothQuant (Xiao et al. 2023), with α searched at each site and kept only where it lowers the error.

The outliers of an activation's channels move into the weights: x' = x / s, W' = s · W with
s_j = max|x_j|^α / max|W_j|^(1-α) (equation 4). Where graph analysis finds a norm, a Linear or a constant Mul that may
absorb 1/s, it is folded there and costs nothing; elsewhere a Mul is inserted, if that pays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.core import FoldPlan, Note, StatRequest
from qcompiler.graph.transaction import FoldError
from qcompiler.numerics.site_search import ALPHAS, Choice, search_site
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.judging import (
    by_input,
    holds,
    leave_decision,
    quantized,
    reader,
    sample_request,
    why_fallback,
    with_margin,
)
from qcompiler.passes.sites import Site, apply, sharing_weights, sites
from qcompiler.scheme import TensorSpec


@dataclasses.dataclass(frozen=True)
class Smooth(Pass):
    """Move activation outliers into the weights, site by site.

    Attributes:
        alpha: the migration strength α for every site, kept whatever it does; None: search it at each.
        floor: channel maxima count as at least this times their median, because a channel that calibration left silent
            may fire later; 0 is the paper's own formula.
        fold_gain: a folded scale is kept where it lowers the site's squared error by this factor at least.
        insert_gain: the same for an inserted Mul, which costs time in every run.
        insert: False: only fold.
        rows: calibration rows each site is judged on.
    """

    name: ClassVar[str] = "smooth"
    float_exact: ClassVar[bool] = True
    alpha: float | None = None
    floor: float = 2.0
    fold_gain: float = 1.02
    insert_gain: float = 1.1
    insert: bool = True
    rows: int = 512

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        if ctx.scheme.activation is None:
            return []
        return [sample_request(linear, self.rows) for linear in quantized(model, ctx.scheme)]

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        notes: list[Note] = []
        plans: list[FoldPlan] = []
        if ctx.scheme.activation is None:
            return PassResult(False)
        for together in sharing_weights(sites(model, ctx.scheme)):
            best, told = self._choose(together, stats, ctx)
            if best is None:
                notes += [Note(site.name, "not smoothed", f"no gain worth it: {told}") for site in together]
                continue
            what = f"smooth alpha={best.choice.candidate.alpha:g}"
            margins = iter(best.choice.margins)
            for site in best.sites:
                specs = [(group, with_margin(best.spec, next(margins))) for group in by_input(site.linears)]
                try:
                    plan = apply(model, site, best.choice.scale, None, ctx.seed)
                except FoldError as error:
                    notes.append(Note(site.name, "not smoothed", str(error)))
                    continue
                notes.append(Note(site.name, what, told))
                plans.append(dataclasses.replace(plan, why=f"{what}: {told}"))
                for group, spec in specs:
                    leave_decision(group, spec, best.why)
        return PassResult(bool(plans), tuple(notes), tuple(plans))

    def _choose(self, together: Sequence[Site], stats: Stats, ctx: Context) -> tuple[_Best | None, str]:
        """The scale with the least held-out error, folded or inserted, or None where none pays; and the errors."""
        first = together[0]
        options: list[tuple[float, Sequence[Site]]] = []
        if first.flow is not None:
            options.append((self.fold_gain, together))
        if self.insert and first.flow is None:
            options.append((self.insert_gain, together))
        elif self.insert and len(together) == 1 and first.shares_channels:
            options += [(self.insert_gain, [inserted]) for inserted in first.as_insertions()]
        told = "" if options else "nothing may be inserted"
        best: tuple[float, _Best] | None = None
        for needed, option in options:
            found = self._search(option, stats, ctx)
            choice = found.choice
            gain = choice.plain / choice.error if choice.error > 0 else 1.0
            told = told or _told(found)
            if choice.scale is not None and (self.alpha is not None or gain >= needed):
                worth = gain / needed
                if best is None or worth > best[0]:
                    best = (worth, found)
        return (best[1], _told(best[1])) if best is not None else (None, told)

    def _search(self, together: Sequence[Site], stats: Stats, ctx: Context) -> _Best:
        """The best scale for the spec that the sites will have: the static one where it holds, else the fallback."""
        scheme = ctx.scheme
        assert scheme.activation is not None
        choice = self._search_for(scheme.activation, together, stats, ctx)
        if scheme.fallback is not None and not holds(choice.error, None):
            other = self._search_for(scheme.fallback, together, stats, ctx)
            if not holds(choice.error, other.error):
                return _Best(together, scheme.fallback, other, why_fallback(choice.error, other.error))
        return _Best(together, scheme.activation, choice, "")

    def _search_for(self, spec: TensorSpec, together: Sequence[Site], stats: Stats, ctx: Context) -> Choice:
        columns = {linear.x: columns for site in together for linear, columns in site.sinks}
        flows = [site.flow for site in together if site.flow is not None]
        return search_site(
            [
                reader(group, stats[sample_request(group[0], self.rows)], columns[group[0].x], ctx.seed)
                for site in together
                for group in by_input(site.linears)
            ],
            spec,
            ctx.scheme.weight,
            channels=together[0].channels,
            blocked=np.any([flow.scale_blocked for flow in flows], axis=0) if flows else None,
            alphas=ALPHAS if self.alpha is None else (self.alpha,),
            floors=(self.floor,),
            keep_plain=self.alpha is None,
            reduce_range=ctx.capability.reduce_range,
        )


@dataclasses.dataclass(frozen=True)
class _Best:
    """What a search found for sites: the spec of their inputs and why, and the scale."""

    sites: Sequence[Site]
    spec: TensorSpec
    choice: Choice
    why: str


def _told(best: _Best) -> str:
    return f"error {best.choice.plain:.1e} -> {best.choice.error:.1e} ({best.spec})"
