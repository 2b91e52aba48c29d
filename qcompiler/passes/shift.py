"""shift: the channel-wise shift of Outlier Suppression+ (Wei et al. 2023, equation 2), searched at each site.

x' = x - z, and the Linears that read it get z W more bias. A channel that lies off zero costs the whole tensor's range;
shifted to its middle it costs its own width only. Where a norm or a Linear has a bias, -z goes there and is free;
elsewhere a bias, or a Sub, is put in if that pays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import StatRequest, unknown
from qcompiler.numerics.site_channels import Channels
from qcompiler.numerics.site_judge import Transform
from qcompiler.numerics.site_search import SHIFTS, Candidate, Choice, SiteSearch, Smoothing
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.judging import quantized
from qcompiler.passes.site_choice import Price, Rules, choose_everywhere, readers_of, sample_requests
from qcompiler.passes.sites import Site

SAMPLERS = {"extremes": None, "ema": "ema", "multi_step": "moving"}
"""What a channel's range is: its extremes, their exponential moving average over batches, or their mean over them."""


@dataclasses.dataclass(frozen=True)
class Shift(Pass):
    """Move each channel's middle to zero, site by site.

    Attributes:
        kind: "midpoint" of each channel's range or its "mean", for every site, kept whatever it does; None: the best of
            both and no shift at each.
        sampler: what the range of "midpoint" is: "extremes", "ema" or "multi_step". Outlier tokens drag extremes.
        fold_gain: a shift that a bias absorbs is kept where it lowers the site's squared error by this factor at least.
        insert_gain: the same where a bias or a Sub must be put in, which costs time in every run.
        shift_all_linears: True: put a Sub in where nothing absorbs the shift, if that pays.
        rows: calibration rows each site is judged on.
    """

    name: ClassVar[str] = "shift"
    float_exact: ClassVar[bool] = True
    kind: str | None = None
    sampler: str = "extremes"
    fold_gain: float = 1.02
    insert_gain: float = 1.1
    shift_all_linears: bool = False
    rows: int = 512

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in SHIFTS:
            raise unknown("kind of pass 'shift'", self.kind, SHIFTS)
        if self.sampler not in SAMPLERS:
            raise unknown("sampler of pass 'shift'", self.sampler, SAMPLERS)

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        requests = sample_requests(model, ctx, self.rows)
        if requests and (observer := SAMPLERS[self.sampler]) is not None:
            requests += [_range_request(linear.x, observer) for linear in quantized(model, ctx.scheme)]
        return requests

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        def search(search: SiteSearch, price: Price, sites: Sequence[Site]) -> Choice:
            return search.best(self._candidates(stats, sites), price, self.kind is None)

        rules = Rules(
            search,
            self.fold_gain,
            self.insert_gain,
            insert_scale=False,
            insert_shift=self.shift_all_linears,
            keep_plain=self.kind is None,
        )
        return choose_everywhere(model, rules, ctx, lambda site: readers_of(site, stats, self.rows, ctx))

    def _candidates(self, stats: Stats, sites: Sequence[Site]) -> list[Candidate]:
        kinds = SHIFTS if self.kind is None else (self.kind,)
        observer = SAMPLERS[self.sampler]
        found: list[Candidate] = []
        for kind in kinds:
            if kind == "midpoint" and observer is not None:
                found.append(_Sampled(self.sampler, _midpoint(stats, sites, observer)))
            else:
                found.append(Smoothing(shift=kind))
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Sampled:
    """The midpoint of a range that a sampler made of all batches; averages over them hardly depend on one fold."""

    sampler: str
    shift: npt.NDArray[np.float32]

    def __call__(self, channels: Channels) -> Transform:
        return Transform(None, np.where(channels.fixed, np.float32(0), self.shift))

    def __str__(self) -> str:
        return f"shift midpoint ({self.sampler})"


def _midpoint(stats: Stats, sites: Sequence[Site], observer: str) -> npt.NDArray[np.float32]:
    """The middle of each channel's range over all values that carry it."""
    low, high = (np.full(sites[0].channels, bound, np.float32) for bound in (np.inf, -np.inf))
    for site in sites:
        for linear, columns in site.sinks:
            lowest, highest = stats[_range_request(linear.x, observer)]
            carried = columns >= 0
            np.minimum.at(low, columns[carried], lowest[carried])
            np.maximum.at(high, columns[carried], highest[carried])
    return np.where(low <= high, (low + high) / 2, np.float32(0))


def _range_request(value: ir.Value, observer: str) -> StatRequest:
    return StatRequest(value.name or "", observer, -1)
