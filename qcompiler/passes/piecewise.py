"""piecewise: smoothing with a strength and a factor for each of K pieces of channels, searched at each site.

After PaddleSlim's PieceWiseSearch. The channels of an activation are parted by their absmax, and the pieces get their
scales one by one, the loudest first. What is found is kept as ``smooth`` keeps its own: folded where that is legal,
inserted where that pays, and left where all rows and outputs, quantized as the site will be, do not confirm it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.core import OptionError, StatRequest
from qcompiler.numerics import piecewise
from qcompiler.numerics.piecewise_judge import Methods, candidates
from qcompiler.numerics.site_search import Candidate, Choice, SiteSearch
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.site_choice import Price, Rules, choose_everywhere, readers_of, sample_requests
from qcompiler.passes.sites import Site


@dataclasses.dataclass(frozen=True)
class Piecewise(Pass):
    """Move activation outliers into the weights, piece by piece of each site's channels.

    Attributes:
        pieces: K, into how many pieces channels are parted by loudness.
        search_pieces: True: the best of 1 to K.
        alpha_min, alpha_max, alphas: the strengths that each piece tries: so many, evenly spaced.
        scale_min, scale_max, scales: the factors on the best of them: so many, geometrically spaced.
        loss: "mse", "mae" or "cosine" of the outputs.
        weight_method: "abs_max_channel_wise", "abs_max" or "avg": what the search takes for the range of weights.
        activation_method: "abs_max" or "avg": the same for static activations.
        floor: see :class:`qcompiler.passes.smooth.Smooth`.
        fold_gain: a folded scale is kept where it lowers the site's error by this factor at least.
        insert_gain: the same for an inserted Mul, which costs time in every run.
        smooth_all_linears: False: only fold.
        rows: calibration rows that a scale is judged on in the end.
    """

    name: ClassVar[str] = "piecewise"
    float_exact: ClassVar[bool] = True
    pieces: int = piecewise.PIECES
    search_pieces: bool = False
    alpha_min: float = 0.5
    alpha_max: float = 1.0
    alphas: int = 5
    scale_min: float = 1.0
    scale_max: float = 5.0
    scales: int = 4
    loss: str = "mse"
    weight_method: str = "abs_max_channel_wise"
    activation_method: str = "abs_max"
    floor: float = 2.0
    fold_gain: float = 1.02
    insert_gain: float = 1.1
    smooth_all_linears: bool = True
    rows: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.alpha_min <= self.alpha_max <= 1:
            raise OptionError(f"alpha_min={self.alpha_min:g}, alpha_max={self.alpha_max:g}: 0 <= min <= max <= 1.")
        if not 0 < self.scale_min <= self.scale_max < np.inf:
            raise OptionError(f"scale_min={self.scale_min:g}, scale_max={self.scale_max:g}: 0 < min <= max.")
        if not min(self.pieces, self.alphas, self.scales) >= 1:
            raise OptionError(f"pieces={self.pieces}, alphas={self.alphas}, scales={self.scales}: at least one each.")
        self._methods()

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        return sample_requests(model, ctx, self.rows)

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        def search(site: SiteSearch, price: Price, sites: Sequence[Site]) -> Choice:
            return site.best(self._candidates(site), price)

        rules = Rules(search, self.fold_gain, self.insert_gain, self.smooth_all_linears, insert_shift=False)
        return choose_everywhere(model, rules, ctx, lambda site: readers_of(site, stats, self.rows, ctx))

    def _candidates(self, site: SiteSearch) -> list[Candidate]:
        return candidates(
            site,
            self._methods(),
            pieces=self.pieces,
            search_pieces=self.search_pieces,
            alphas=np.linspace(self.alpha_min, self.alpha_max, self.alphas).round(3).tolist(),
            factors=np.geomspace(self.scale_min, self.scale_max, self.scales).tolist(),
            floor=self.floor,
        )

    def _methods(self) -> Methods:
        return Methods(self.loss, self.weight_method, self.activation_method)
