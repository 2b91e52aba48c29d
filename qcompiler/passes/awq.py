"""awq: activation-aware weight quantization (Lin et al. 2023), its scale searched at each site.

The error of a weight in few bits counts at the output by the activation that it meets. A scale s by input channel,
x' = x / s and W' = s · W, gives channels of large activations finer steps; s = mean|x|^α, and α is what leaves least
error at the output of the rounded Linears on held-out rows. Where graph analysis finds a norm, a Linear (v before o, up
before down) or a constant Mul that may absorb 1/s, it is folded there; elsewhere a Mul is inserted, if that pays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from qcompiler.core import OptionError, StatRequest
from qcompiler.numerics.activation_aware import ALPHAS, ActivationAware
from qcompiler.numerics.site_search import Choice, SiteSearch
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.judging import FallbackRule, quantized, sample_request
from qcompiler.passes.site_choice import Chooser, Price, Rules, readers_of
from qcompiler.passes.sites import Site, sharing_weights, sites


@dataclasses.dataclass(frozen=True)
class Awq(Pass):
    """Scale weights by what they meet, site by site; it serves weight-only schemes too, which ``smooth`` leaves alone.

    The paper's second search, for the range of each group, is ``clip_weights``, after ``insert``.

    Attributes:
        alpha: the power for every site, kept whatever it does; None: search it at each.
        floor: channels' magnitudes count as at least this times their median; 0 is the paper's own formula.
        fold_gain: a folded scale is kept where it lowers the site's squared error by this factor at least.
        insert_gain: the same for an inserted Mul, which costs time in every run.
        scale_all_linears: False: only fold.
        rows: calibration rows each site is judged on.
    """

    name: ClassVar[str] = "awq"
    float_exact: ClassVar[bool] = True
    alpha: float | None = None
    floor: float = 0.0
    fold_gain: float = 1.0
    insert_gain: float = 1.1
    scale_all_linears: bool = True
    rows: int = 512

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise OptionError(f"awq{{alpha={self.alpha:g}}}: a power from 0 to 1 is wanted.")

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        return [sample_request(linear, self.rows) for linear in quantized(model, ctx.scheme)]

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        rules = Rules(
            self._search,
            self.fold_gain,
            self.insert_gain,
            insert_scale=self.scale_all_linears and not ctx.capability.fixed_graph,
            insert_shift=False,
            keep_plain=self.alpha is None,
        )
        fallback = FallbackRule(model, ctx.scheme, ctx.capability)
        chooser = Chooser(rules, ctx, fallback, lambda site: readers_of(site, stats, self.rows, ctx))
        return chooser.transform(model, sharing_weights(sites(model, ctx.scheme)))

    def _search(self, search: SiteSearch, price: Price, sites: Sequence[Site]) -> Choice:
        alphas = ALPHAS if self.alpha is None else (self.alpha,)
        return search.best([ActivationAware(alpha, self.floor) for alpha in alphas], price, self.alpha is None)
