"""smooth: SmoothQuant (Xiao et al. 2023), with α searched at each site and kept only where it lowers the error.

The outliers of an activation's channels move into the weights: x' = x / s, W' = s · W with
s_j = max|x_j|^α / max|W_j|^(1-α) (equation 4). Where graph analysis finds a norm, a Linear or a constant Mul that may absorb
1/s, it is folded there and costs nothing; elsewhere a Mul is inserted, if that pays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import FoldPlan, Note, StatRequest
from qcompiler.graph.absorb import FoldError, fold, insert_scale
from qcompiler.graph.edit import array_of
from qcompiler.graph.flow import FoldSite, Sink, analyse
from qcompiler.graph.linear import Linear
from qcompiler.numerics.smoothing import SiteError, smoothing_scale
from qcompiler.passes.annotate import Annotate, by_input, judged_on, quantized
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.scheme import Scheme, TensorSpec

Vector = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where a scale may go: the Linears that absorb it, and how 1/scale gets to their input.

    Attributes:
        name: the node that absorbs 1/scale, or the value after which a Mul is inserted.
        channels: number of channels of the scale.
        sinks: the quantized Linears, and which channel each of their rows belongs to.
        flow: the fold that analysis found legal; None: a Mul is inserted.
    """

    name: str
    channels: int
    sinks: tuple[tuple[Linear, npt.NDArray[np.int32]], ...]
    flow: FoldSite | None


@dataclasses.dataclass(frozen=True)
class Smooth(Pass):
    """Move activation outliers into the weights, site by site.

    Attributes:
        alpha: the migration strength α for every site, kept whatever it does; None: search it at each.
        steps: how many α from 0 to 1 a search tries.
        fold_gain: a folded scale is kept where it lowers the site's squared error by this factor at least.
        insert_gain: the same for an inserted Mul, which costs time in every run.
        insert: False: only fold.
        rows: calibration rows each site is judged on.
    """

    name: ClassVar[str] = "smooth"
    float_exact: ClassVar[bool] = True
    alpha: float | None = None
    steps: int = 11
    fold_gain: float = 1.02
    insert_gain: float = 1.25
    insert: bool = True
    rows: int = 512

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        if ctx.scheme.activation is None:
            return []
        return [request for linear in quantized(model, ctx.scheme) for request in judged_on(linear, self.rows)]

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        notes: list[Note] = []
        plans: list[FoldPlan] = []
        if ctx.scheme.activation is None:
            return PassResult(False)
        for site in _sites(model, ctx.scheme):
            if site.flow is None and not self.insert:
                continue
            scale, note = self._choose(site, stats, ctx)
            notes.append(note)
            if scale is None:
                continue
            try:
                plans.append(_apply(model, site, scale, ctx.seed))
            except FoldError as error:
                notes.append(Note(site.name, "not smoothed", str(error)))
        return PassResult(bool(plans), tuple(notes), tuple(plans))

    def _choose(self, site: Site, stats: Stats, ctx: Context) -> tuple[Vector | None, Note]:
        """The scale with the least error at this site, or None where it does not pay."""
        judge = _Judge(site, stats, ctx, self.rows)
        alphas = [self.alpha] if self.alpha is not None else [i / (self.steps - 1) for i in range(self.steps)]
        scales = {alpha: judge.scale(alpha) for alpha in alphas}
        spec, plain, errors = self._judged(judge, scales, ctx.scheme)
        best = min(errors, key=lambda alpha: errors[alpha])
        gain = plain / errors[best] if errors[best] > 0 else float("inf")
        told = f"error {plain:.1e} -> {errors[best]:.1e} ({spec})"
        if self.alpha is None and gain < (self.fold_gain if site.flow is not None else self.insert_gain):
            return None, Note(site.name, "not smoothed", f"no gain worth it at the best alpha={best:g}: {told}")
        return scales[best], Note(site.name, f"smooth alpha={best:g}", told)

    def _judged(
        self, judge: _Judge, scales: dict[float, Vector], scheme: Scheme
    ) -> tuple[TensorSpec, float, dict[float, float]]:
        """The spec that the site will have (see ``annotate``), its error without a scale, and with each."""
        judged = {
            spec: (judge.error(None, spec), {alpha: judge.error(scale, spec) for alpha, scale in scales.items()})
            for spec in (scheme.activation, scheme.fallback)
            if spec is not None
        }
        spec = scheme.activation
        assert spec is not None
        if scheme.fallback is not None:
            static, dynamic = (min(plain, *errors.values()) for plain, errors in judged.values())
            if not Annotate().holds(static, dynamic):
                spec = scheme.fallback
        return (spec, *judged[spec])


class _Judge:
    """Quantized output error of a site's Linears as a function of the scale."""

    def __init__(self, site: Site, stats: Stats, ctx: Context, rows: int) -> None:
        self._site, self._ctx = site, ctx
        self._groups = []
        for group in by_input([linear for linear, _ in site.sinks]):
            columns = next(columns for linear, columns in site.sinks if linear is group[0])
            extremes, sample = judged_on(group[0], rows)
            weights = [array for linear in group if (array := array_of(linear.weight)) is not None]
            self._groups.append((columns, stats[sample], stats[extremes], weights))
        self._errors: dict[TensorSpec, list[SiteError]] = {}

    def scale(self, alpha: float) -> Vector:
        """SmoothQuant's s over the source's channels; channels that no sink reads, or that are blocked, keep 1."""
        activation = np.zeros(self._site.channels, np.float32)
        weight = np.zeros(self._site.channels, np.float32)
        for columns, _, (low, high), weights in self._groups:
            carried = columns >= 0
            np.maximum.at(activation, columns[carried], np.maximum(-low, high)[carried])
            for array in weights:
                np.maximum.at(weight, columns[carried], np.abs(array).max(axis=1)[carried])
        if self._site.flow is not None:
            activation[self._site.flow.scale_blocked] = 0
        return smoothing_scale(activation, weight, alpha)

    def error(self, scale: Vector | None, spec: TensorSpec) -> float:
        """Relative squared error, the mean over the site's Linears."""
        if spec not in self._errors:
            self._errors[spec] = [
                SiteError(
                    rows,
                    weights,
                    spec,
                    self._ctx.scheme.weight,
                    reduce_range=self._ctx.capability.reduce_range,
                    low=low,
                    high=high,
                )
                for _, rows, (low, high), weights in self._groups
            ]
        total = sum(
            judge(None if scale is None else _spread(scale, columns))
            for judge, (columns, *_) in zip(self._errors[spec], self._groups, strict=True)
        )
        return total / len(self._site.sinks)


def _spread(scale: Vector, columns: npt.NDArray[np.int32]) -> Vector:
    """The scale of each input feature of a sink: its source channel's, or 1."""
    return np.where(columns >= 0, scale[columns], np.float32(1))


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
        every = np.arange(group[0].in_features, dtype=np.int32)
        yield Site(group[0].x.name or "", len(every), tuple((linear, every) for linear in group), None)


def _usable(sink: Sink, flow: FoldSite, free: dict[str, Linear]) -> bool:
    carried = sink.columns[sink.columns >= 0]
    return sink.linear in free and not flow.scale_blocked[carried].all()


def _apply(model: ir.Model, site: Site, scale: Vector, seed: int) -> FoldPlan:
    if site.flow is not None:
        return fold(model, site.flow, scale, seed=seed)
    linears: Sequence[Linear] = [linear for linear, _ in site.sinks]
    return insert_scale(model, linears[0].x, [linear.name for linear in linears], scale, seed=seed)
