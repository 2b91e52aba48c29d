"""smooth: SmoothQuant (Xiao et al. 2023), with α searched at each site and kept only where it lowers the error.

The outliers of an activation's channels move into the weights: x' = x / s, W' = s · W with
s_j = max|x_j|^α / max|W_j|^(1-α) (equation 4). Where graph analysis finds a norm, a Linear or a constant Mul that may
absorb 1/s, it is folded there and costs nothing; elsewhere a Mul is inserted, if that pays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import FoldPlan, Note, StatRequest
from qcompiler.graph.absorb import FoldError, fold, insert_scale
from qcompiler.graph.flow import FoldSite, Sink, analyse
from qcompiler.graph.linear import Linear
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
from qcompiler.scheme import Scheme, TensorSpec


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where a scale may go: the Linears that absorb it, and how 1/scale gets to their input.

    Attributes:
        name: the node that absorbs 1/scale, or the value after which a Mul is inserted.
        channels: number of channels of the scale.
        sinks: the quantized Linears, and which channel each of their rows belongs to (-1: none).
        flow: the fold that analysis found legal; None: a Mul is inserted.
    """

    name: str
    channels: int
    sinks: tuple[tuple[Linear, npt.NDArray[np.int32]], ...]
    flow: FoldSite | None

    @property
    def linears(self) -> list[Linear]:
        return [linear for linear, _ in self.sinks]


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
        for sites in _sharing_weights(_sites(model, ctx.scheme)):
            best, told = self._choose(sites, stats, ctx)
            if best is None:
                notes += [Note(site.name, "not smoothed", f"no gain worth it: {told}") for site in sites]
                continue
            what = f"smooth alpha={best.choice.candidate.alpha:g}"
            margins = iter(best.choice.margins)
            for site in best.sites:
                specs = [(group, with_margin(best.spec, next(margins))) for group in by_input(site.linears)]
                try:
                    plan = _apply(model, site, best.choice, ctx.seed)
                except FoldError as error:
                    notes.append(Note(site.name, "not smoothed", str(error)))
                    continue
                notes.append(Note(site.name, what, told))
                plans.append(dataclasses.replace(plan, why=f"{what}: {told}"))
                for group, spec in specs:
                    leave_decision(group, spec, best.why)
        return PassResult(bool(plans), tuple(notes), tuple(plans))

    def _choose(self, sites: Sequence[Site], stats: Stats, ctx: Context) -> tuple[_Best | None, str]:
        """The scale with the least held-out error, folded or inserted, or None where none pays; and the errors."""
        first = sites[0]
        options: list[tuple[float, Sequence[Site]]] = []
        if first.flow is not None:
            options.append((self.fold_gain, sites))
        if self.insert and first.flow is None:
            options.append((self.insert_gain, sites))
        elif self.insert and len(sites) == 1 and _shares_channels(first):
            options += [(self.insert_gain, [inserted]) for inserted in _as_insertions(first)]
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

    def _search(self, sites: Sequence[Site], stats: Stats, ctx: Context) -> _Best:
        """The best scale for the spec that the sites will have: the static one where it holds, else the fallback."""
        scheme = ctx.scheme
        assert scheme.activation is not None
        choice = self._search_for(scheme.activation, sites, stats, ctx)
        if scheme.fallback is not None and not holds(choice.error, None):
            other = self._search_for(scheme.fallback, sites, stats, ctx)
            if not holds(choice.error, other.error):
                return _Best(sites, scheme.fallback, other, why_fallback(choice.error, other.error))
        return _Best(sites, scheme.activation, choice, "")

    def _search_for(self, spec: TensorSpec, sites: Sequence[Site], stats: Stats, ctx: Context) -> Choice:
        columns = {linear.x: columns for site in sites for linear, columns in site.sinks}
        flows = [site.flow for site in sites if site.flow is not None]
        return search_site(
            [
                reader(group, stats[sample_request(group[0], self.rows)], columns[group[0].x], ctx.seed)
                for site in sites
                for group in by_input(site.linears)
            ],
            spec,
            ctx.scheme.weight,
            channels=sites[0].channels,
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


def _shares_channels(site: Site) -> bool:
    """Whether several features of one Linear hang on one channel of the source (v to o under grouped queries)."""
    return any(len(np.unique(c[c >= 0])) < (c >= 0).sum() for _, c in site.sinks)


def _as_insertions(site: Site) -> list[Site]:
    """The same Linears with a scale of their own before each value they read; one site a value."""
    return [_insertion(group) for group in by_input(site.linears)]


def _insertion(group: list[Linear]) -> Site:
    every = np.arange(group[0].in_features, dtype=np.int32)
    return Site(group[0].x.name or "", len(every), tuple((linear, every) for linear in group), None)


def _sites(model: ir.Model, scheme: Scheme) -> Iterator[Site]:
    """Folds first, wherever they are legal; then one insertion for each value that other Linears read.

    Each Linear belongs to one site: the statistics of the next would no longer fit it.
    """
    free = {linear.name: linear for linear in quantized(model, scheme)}
    for flow in analyse(model):
        sinks = [(free[sink.linear], sink.columns) for sink in flow.sinks if _usable(sink, flow, free)]
        if flow.foldable and sinks:
            for linear, _ in sinks:
                del free[linear.name]
            yield Site(flow.source.name or "", flow.channels, tuple(sinks), flow)
    for group in by_input(list(free.values())):
        yield _insertion(group)


def _sharing_weights(sites: Iterable[Site]) -> list[list[Site]]:
    """Sites that write the same weights, in layers that are one layer called again: one scale keeps them shared."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        weights = frozenset(linear.weight for linear in site.linears)
        groups.setdefault((weights, site.channels, site.flow is None), []).append(site)
    return list(groups.values())


def _usable(sink: Sink, flow: FoldSite, free: dict[str, Linear]) -> bool:
    carried = sink.columns[sink.columns >= 0]
    return sink.linear in free and not flow.scale_blocked[carried].all()


def _apply(model: ir.Model, site: Site, choice: Choice, seed: int) -> FoldPlan:
    assert choice.scale is not None
    if site.flow is not None:
        return fold(model, site.flow, choice.scale, seed=seed)
    linears = site.linears
    return insert_scale(model, linears[0].x, [linear.name for linear in linears], choice.scale, seed=seed)
