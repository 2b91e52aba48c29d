"""How the piecewise search judges: by the ranges and the loss that the caller names, on few rows and outputs.

A search over pieces asks some thirty times at each site. Part of the outputs tells candidates apart nearly as well;
what is found is judged once more, on everything, before it is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.core import unknown
from qcompiler.numerics.affine import integer_range
from qcompiler.numerics.piecewise import ALPHAS, FACTORS, PIECES, search_piecewise
from qcompiler.numerics.site_judge import LOSSES, Judge, Reader
from qcompiler.numerics.site_search import Candidate, SiteSearch
from qcompiler.scheme import TensorSpec

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float32]

WEIGHT_METHODS = ("abs_max_channel_wise", "abs_max", "avg")
ACTIVATION_METHODS = ("abs_max", "avg")
_SIGNED = TensorSpec("int8")
_ROWS, _OUTPUTS = 512, 512  # that a search looks at


@dataclasses.dataclass(frozen=True)
class Methods:
    """What the search takes for the range of a tensor, and for the distance of two outputs.

    Attributes:
        loss: "mse", "mae" or "cosine".
        weight: "abs_max_channel_wise": max|W| of each output channel (or as fine as the weight's spec is); "abs_max":
            of the whole weight; "avg": the mean over input channels of their max|W|, so that the loudest saturate.
        activation: "abs_max": the extremes of a fold; "avg": the mean over its tokens of their extremes. Either is
            widened as the site's own range would be. Where scales are dynamic, each token has its own whatever is said.

    Raises:
        OptionError: another name.
    """

    loss: str = "mse"
    weight: str = "abs_max_channel_wise"
    activation: str = "abs_max"

    def __post_init__(self) -> None:
        for what, name, known in (
            ("loss", self.loss, LOSSES),
            ("weight method", self.weight, WEIGHT_METHODS),
            ("activation method", self.activation, ACTIVATION_METHODS),
        ):
            if name not in known:
                raise unknown(f"{what} of the piecewise search", name, known)


class PieceJudge(Judge):
    """A judge whose ranges are those of :class:`Methods`."""

    def __init__(self, reader: Reader, site: SiteSearch, methods: Methods) -> None:
        super().__init__(reader, site.judged, site.weight, site.reduce_range, methods.loss)
        self._methods = methods
        self._reach = integer_range(_SIGNED, site.reduce_range)[1]

    def range_of(self, s: Vector | None, z: Vector | None, fold: int) -> tuple[np.float32, np.float32]:
        own = self.reader.rows[self.reader.fold == fold]
        if self._methods.activation == "abs_max" or not len(own):
            return super().range_of(s, z, fold)
        x = own if z is None else own - z
        x = x if s is None else x / s
        return x.min(1).mean(), x.max(1).mean()

    def rounded(self, weight: Array) -> Array:
        if self._methods.weight == "abs_max_channel_wise":
            return super().rounded(weight)
        magnitude = np.abs(weight)
        reach = magnitude.max() if self._methods.weight == "abs_max" else magnitude.max(1).mean()
        scale = np.float32(max(reach, np.finfo(np.float32).tiny) / self._reach)
        return np.asarray(np.clip(np.rint(weight / scale), -self._reach, self._reach) * scale)


def candidates(
    site: SiteSearch,
    methods: Methods = Methods(),
    *,
    pieces: int = PIECES,
    search_pieces: bool = False,
    alphas: Sequence[float] = ALPHAS,
    factors: Sequence[float] = FACTORS,
    floor: float = 0.0,
) -> list[Candidate]:
    """The best scale in one piece, and the best in several, for ``site.best`` to choose from.

    Both, because a search on part of the outputs may have found pieces where there are none. The arguments are those of
    :func:`qcompiler.numerics.piecewise.search_piecewise`.
    """
    error = cheap_error(site, methods, _ROWS, _OUTPUTS)
    channels = site.whole
    absmax = np.where(channels.weight > 0, np.maximum(np.abs(channels.low), np.abs(channels.high)), 0)
    return [
        search_piecewise(
            absmax, error, pieces=count, search_pieces=search_pieces, alphas=alphas, factors=factors, floor=floor
        )
        for count in sorted({1, pieces})
    ]


def cheap_error(site: SiteSearch, methods: Methods, rows: int, outputs: int) -> Callable[[Candidate], float]:
    """A candidate's held-out error by ``methods`` on at most so many rows and output features; it is told once.

    The mean over readers, relative to the loss of outputs that are all zero.
    """
    judges = [PieceJudge(thinned(reader, rows, outputs), site, methods) for reader in site.readers]
    errors: dict[Candidate, float] = {}

    def error(candidate: Candidate) -> float:
        if candidate not in errors:
            transforms = [candidate(fold) for fold in site.folds]
            errors[candidate] = float(np.mean([judge(transforms)[0] for judge in judges]))
        return errors[candidate]

    return error


def thinned(reader: Reader, rows: int, outputs: int) -> Reader:
    """The reader with at most so many rows and output features, evenly taken; the extremes stay those of all rows."""
    taken, columns = _evenly(len(reader.rows), rows), _evenly(reader.weight.shape[1], outputs)
    return dataclasses.replace(
        reader,
        rows=reader.rows[taken],
        fold=reader.fold[taken],
        weight=np.ascontiguousarray(reader.weight[:, columns]),
    )


def _evenly(number: int, count: int) -> npt.NDArray[np.int64]:
    return np.linspace(0, number - 1, min(number, count)).astype(np.int64)
