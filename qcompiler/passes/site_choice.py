"""How smooth, shift, piecewise and adaptive choose a transform at each site, and carry it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.core import FoldPlan, Note, StatRequest
from qcompiler.graph.linear import linear_named
from qcompiler.graph.sources import as_source
from qcompiler.graph.transaction import FoldError
from qcompiler.numerics.site_judge import Reader, Transform
from qcompiler.numerics.site_search import Choice, SiteSearch
from qcompiler.passes.base import Context, PassResult, Stats
from qcompiler.passes.judging import (
    FallbackRule,
    by_input,
    leave_decision,
    quantized,
    reader,
    sample_request,
    why_fallback,
)
from qcompiler.passes.sites import Site, apply, sharing_weights, sites
from qcompiler.scheme import TensorSpec

Price = Callable[[Transform], float]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a pass asks of a transform before it keeps it.

    Attributes:
        search: finds the best transform of a site, given what each costs.
        fold_gain: one that is folded away must lower the site's squared error by this factor at least.
        insert_gain: the same for a Mul, a Sub or an Add (the bias that a norm lacks), which cost time in every run.
        insert_scale, insert_shift: whether operators may be inserted where nothing absorbs a scale, or a shift.
        keep_plain: False: ``search`` is to find the best transform whatever it gains, so its price counts for nothing.
    """

    search: Callable[[SiteSearch, Price, Sequence[Site]], Choice]
    fold_gain: float
    insert_gain: float
    insert_scale: bool
    insert_shift: bool
    keep_plain: bool = True


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found for sites: the kind of spec that their inputs get and why, and the transform."""

    sites: Sequence[Site]
    spec: TensorSpec | None
    choice: Choice
    why: str

    def __str__(self) -> str:
        return f"error {self.choice.plain:.1e} -> {self.choice.error:.1e} ({self.spec or 'float inputs'})"


class Chooser:
    """Chooses for groups of sites that must get one transform, and applies it.

    Args:
        read: the readers of a site: what each group of Linears on one input makes of it.

    Attributes:
        ranges: what the observers of the static specs would say of the transformed inputs.
    """

    def __init__(
        self, rules: Rules, ctx: Context, fallback: FallbackRule, read: Callable[[Site], list[Reader]]
    ) -> None:
        self._rules, self._ctx, self._fallback, self._read = rules, ctx, fallback, read
        self.ranges: dict[StatRequest, tuple[np.float32, np.float32]] = {}

    def transform(self, model: ir.Model, groups: Iterable[Sequence[Site]]) -> PassResult:
        """Give each group of sites what suits it, and leave the decision how to quantize their inputs."""
        notes: list[Note] = []
        plans: list[FoldPlan] = []
        for together in groups:
            found = self._choose(together)
            settled = iter(zip(found.choice.specs, found.choice.ranges, strict=True))
            for site in found.sites:
                decided = [(group, *next(settled)) for group in by_input(site.linears)]
                what, transform = str(found.choice.candidate), found.choice.transform
                if transform.scale is None and transform.shift is None:
                    notes.append(Note(site.name, "not transformed", f"no gain worth it: {found}"))
                else:
                    try:
                        plan = apply(model, site, transform.scale, transform.shift, self._ctx.seed)
                    except FoldError as error:
                        notes.append(Note(site.name, "not transformed", str(error)))
                        continue
                    notes.append(Note(site.name, what, str(found)))
                    plans.append(dataclasses.replace(plan, why=f"{what}: {found}"))
                for group, spec, extremes in decided:
                    if spec is None:
                        continue
                    leave_decision(group, spec, found.why)
                    x = linear_named(model, group[0].name).x
                    self.ranges[StatRequest(x.name or "", spec.observer)] = extremes
        return PassResult(bool(plans), tuple(notes), tuple(plans))

    def _choose(self, together: Sequence[Site]) -> Found:
        """What is worth most: nothing, a fold, or one insertion instead of a fold that several features must share."""
        first = together[0]
        found = [self._search(together)]
        if first.flow is not None and self._rules.insert_scale and len(together) == 1 and first.shares_channels:
            found += [self._search([inserted]) for inserted in first.as_insertions()]
        return max(found, key=self._worth)

    def _worth(self, found: Found) -> float:
        choice, price = found.choice, self._prices(found.sites[0])(found.choice.transform)
        return choice.plain / (choice.error * price) if choice.error > 0 else np.inf

    def _prices(self, site: Site) -> Price:
        """What the error of a transform of this site is multiplied by before it is compared."""
        rules = self._rules
        source = as_source(site.flow.source) if site.flow is not None else None
        scale = rules.fold_gain if site.flow is not None else rules.insert_gain if rules.insert_scale else np.inf
        if source is not None:
            shift = rules.fold_gain if source.bias is not None else rules.insert_gain
        else:
            shift = rules.insert_gain if rules.insert_shift else np.inf
        if not rules.keep_plain:
            scale, shift = (1.0 if np.isfinite(each) else each for each in (scale, shift))

        def price(transform: Transform) -> float:
            return (1.0 if transform.scale is None else scale) * (1.0 if transform.shift is None else shift)

        return price

    def _search(self, together: Sequence[Site]) -> Found:
        """The best transform for the spec that the sites will get: the static one if it holds, else the fallback."""
        scheme = self._ctx.scheme
        readers = [reader for site in together for reader in self._read(site)]
        choice = self._search_for(scheme.activation, together, readers)
        groups = [group for site in together for group in by_input(site.linears)]
        if scheme.fallback is not None and self._fallback.may_pay(groups, choice.error):
            other = self._search_for(scheme.fallback, together, readers)
            if self._fallback.pays(groups, choice.error, other.error):
                return Found(together, scheme.fallback, other, why_fallback(choice.error, other.error))
        return Found(together, scheme.activation, choice, "")

    def _search_for(self, spec: TensorSpec | None, together: Sequence[Site], readers: Sequence[Reader]) -> Choice:
        flows = [site.flow for site in together if site.flow is not None]
        search = SiteSearch(
            readers,
            spec,
            self._ctx.scheme.weight,
            channels=together[0].channels,
            blocked=np.any([flow.scale_blocked for flow in flows], axis=0) if flows else None,
            fixed=np.any([flow.shift_blocked for flow in flows], axis=0) if flows else None,
            reduce_range=self._ctx.capability.reduce_range,
        )
        return self._rules.search(search, self._prices(together[0]), together)


def choose_everywhere(model: ir.Model, rules: Rules, ctx: Context, read: Callable[[Site], list[Reader]]) -> PassResult:
    """Transform every site of the model, each judged on inputs as they are in the float model."""
    if ctx.scheme.activation is None:
        return PassResult(False)
    fallback = FallbackRule(model, ctx.scheme, ctx.capability)
    return Chooser(rules, ctx, fallback, read).transform(model, sharing_weights(sites(model, ctx.scheme)))


def sample_requests(model: ir.Model, ctx: Context, rows: int) -> list[StatRequest]:
    """The row samples that :func:`readers_of` reads, for every quantized Linear."""
    if ctx.scheme.activation is None:
        return []
    return [sample_request(linear, rows) for linear in quantized(model, ctx.scheme)]


def readers_of(site: Site, stats: Stats, rows: int, ctx: Context) -> list[Reader]:
    """What each group of Linears on one input of the site makes of it, on the row samples in ``stats``."""
    columns = {linear.x: columns for linear, columns in site.sinks}
    return [
        reader(group, stats[sample_request(group[0], rows)], columns[group[0].x], ctx.scheme, ctx.seed)
        for group in by_input(site.linears)
    ]
