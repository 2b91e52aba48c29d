"""smooth: SmoothQuant (Xiao et al. 2023), with α searched at each site and kept only where it lowers the error.

The outliers of an activation's channels move into the weights: x' = x / s, W' = s · W with
s_j = max|x_j|^α / max|W_j|^(1-α) (equation 4). Where graph analysis finds a norm, a Linear or a constant Mul that may
absorb 1/s, it is folded there and costs nothing; elsewhere a Mul is inserted, if that pays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from qcompiler.core import StatRequest
from qcompiler.numerics.site_search import ALPHAS, Choice, SiteSearch, search_smoothing
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.site_choice import Price, Rules, choose_everywhere, readers_of, sample_requests
from qcompiler.passes.sites import Site


@dataclasses.dataclass(frozen=True)
class Smooth(Pass):
    """Move activation outliers into the weights, site by site.

    Attributes:
        alpha: the migration strength α for every site, kept whatever it does; None: search it at each.
        floor: channel maxima count as at least this times their median, because a channel that calibration left silent
            may fire later; 0 is the paper's own formula.
        fold_gain: a folded scale is kept where it lowers the site's squared error by this factor at least.
        insert_gain: the same for an inserted Mul, which costs time in every run.
        smooth_all_linears: False: only fold.
        rows: calibration rows each site is judged on.
    """

    name: ClassVar[str] = "smooth"
    float_exact: ClassVar[bool] = True
    alpha: float | None = None
    floor: float = 2.0
    fold_gain: float = 1.02
    insert_gain: float = 1.1
    smooth_all_linears: bool = True
    rows: int = 512

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        return sample_requests(model, ctx, self.rows)

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        rules = Rules(
            self._search,
            self.fold_gain,
            self.insert_gain,
            insert_scale=self.smooth_all_linears,
            insert_shift=False,
            keep_plain=self.alpha is None,
        )
        return choose_everywhere(model, rules, ctx, lambda site: readers_of(site, stats, self.rows, ctx))

    def _search(self, search: SiteSearch, price: Price, sites: Sequence[Site]) -> Choice:
        alphas = ALPHAS if self.alpha is None else (self.alpha,)
        return search_smoothing(search, alphas=alphas, floors=(self.floor,), keep_plain=self.alpha is None, price=price)
