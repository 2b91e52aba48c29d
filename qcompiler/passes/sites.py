"""Where a scale and a shift by channel may go: what smooth, shift, piecewise and adaptive choose for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import FoldPlan
from qcompiler.graph.absorb import fold, insert_scale
from qcompiler.graph.flow import analyse
from qcompiler.graph.fold_site import FoldSite, Sink
from qcompiler.graph.linear import Linear
from qcompiler.passes.judging import by_input, quantized
from qcompiler.scheme import Scheme

Vector = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where a scale and a shift may go: the Linears that absorb them, and how their input gets the inverse.

    Attributes:
        name: the node that absorbs the inverse, or the value after which Sub and Mul are inserted.
        channels: number of channels of scale and shift.
        sinks: the quantized Linears, and which channel each of their rows belongs to (-1: none).
        flow: the fold that analysis found legal; None: operators are inserted.
    """

    name: str
    channels: int
    sinks: tuple[tuple[Linear, npt.NDArray[np.int32]], ...]
    flow: FoldSite | None

    @property
    def linears(self) -> list[Linear]:
        return [linear for linear, _ in self.sinks]

    @property
    def shares_channels(self) -> bool:
        """Whether several features of one Linear hang on one channel of the source (v to o under grouped queries)."""
        return any(len(np.unique(c[c >= 0])) < (c >= 0).sum() for _, c in self.sinks)

    def as_insertions(self) -> list[Site]:
        """The same Linears with a scale of their own before each value they read; one site a value."""
        return [_insertion(group) for group in by_input(self.linears)]


def sites(model: ir.Model, scheme: Scheme) -> Iterator[Site]:
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


def sharing_weights(found: Iterable[Site]) -> list[list[Site]]:
    """Sites that write the same weights, in layers that are one layer called again: one scale keeps them shared."""
    groups: dict[object, list[Site]] = {}
    for site in found:
        weights = frozenset(linear.weight for linear in site.linears)
        groups.setdefault((weights, site.channels, site.flow is None), []).append(site)
    return list(groups.values())


def apply(model: ir.Model, site: Site, scale: Vector | None, shift: Vector | None, seed: int) -> FoldPlan:
    """Fold or insert scale and shift [channels] (None: leave it) at a site.

    Raises:
        FoldError: as :func:`qcompiler.graph.absorb.fold` and ``insert_scale``.
    """
    if site.flow is not None:
        return fold(model, site.flow, scale, shift, seed=seed)
    linears = site.linears
    scale = np.ones(site.channels, np.float32) if scale is None else scale
    return insert_scale(model, linears[0].x, [linear.name for linear in linears], scale, shift, seed=seed)


def _insertion(group: list[Linear]) -> Site:
    every = np.arange(group[0].in_features, dtype=np.int32)
    return Site(group[0].x.name or "", len(every), tuple((linear, every) for linear in group), None)


def _usable(sink: Sink, flow: FoldSite, free: dict[str, Linear]) -> bool:
    carried = sink.columns[sink.columns >= 0]
    return sink.linear in free and not flow.scale_blocked[carried].all()
