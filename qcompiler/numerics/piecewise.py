"""Piecewise search: channels in pieces by loudness, each piece with a smoothing strength and a factor of its own.

After PaddleSlim's PieceWiseSearch. One α for all channels is a compromise between a few that are loud and the many that
are not. Here the channels are parted by their absmax; the loudest piece gets its α and its factor first, then the next.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.site_channels import Channels
from qcompiler.numerics.site_judge import Transform
from qcompiler.numerics.smoothing import smoothing_scale

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float32]

ALPHAS = (0.5, 0.625, 0.75, 0.875, 1.0)
FACTORS = (1.7, 3.0, 5.0)
PIECES = 3
_STEPS = 50  # of Lloyd's algorithm at most; in one dimension a few will do


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece's scale: factor · s_j, with s_j SmoothQuant's of strength alpha; None: s_j = 1."""

    alpha: float | None = None
    factor: float = 1.0

    def __str__(self) -> str:
        alpha = "1" if self.alpha is None else f"alpha={self.alpha:g}"
        return alpha if self.factor == 1 else f"{self.factor:g} x {alpha}"


@dataclasses.dataclass(frozen=True)
class Piecewise:
    """A scale made of pieces, as data: a candidate of :class:`qcompiler.numerics.site_search.SiteSearch`.

    Attributes:
        bounds: absmax that part the pieces, falling: one fewer than there are pieces.
        pieces: from the loudest on.
        floor: see :func:`qcompiler.numerics.smoothing.smoothing_scale`.
    """

    bounds: tuple[float, ...]
    pieces: tuple[Piece, ...]
    floor: float = 0.0

    def __call__(self, channels: Channels) -> Transform:
        """The scale of what is known of the channels, be it from one fold or from all."""
        absmax = np.maximum(np.abs(channels.low), np.abs(channels.high))
        return Transform(self.scale(absmax, channels.weight))

    def scale(self, activation_absmax: Array, weight_absmax: Array) -> Vector:
        """float32 [channels], positive; 1 for dead channels (activation or weights all zero)."""
        live = (activation_absmax > 0) & (weight_absmax > 0)
        which = np.searchsorted(-np.asarray(self.bounds), -activation_absmax, side="right")
        scale = np.ones(len(activation_absmax), np.float32)
        for number, piece in enumerate(self.pieces):
            chosen = live & (which == number)
            if piece.alpha is not None:
                smooth = smoothing_scale(activation_absmax, weight_absmax, piece.alpha, floor=self.floor)
                scale[chosen] = smooth[chosen]
            scale[chosen] *= np.float32(piece.factor)
        return scale

    def __str__(self) -> str:
        return f"piecewise [{', '.join(map(str, self.pieces))}]"


def bounds_between(absmax: Array, pieces: int) -> tuple[float, ...]:
    """Where to part channels by loudness: halfway (in the logarithm) between 1-D k-means of log absmax.

    Args:
        absmax: float [channels]; dead channels (0) do not count.
        pieces: how many at most: as many as there are different channels, at least one.

    Returns:
        falling absmax, one fewer than there are pieces; the same input gives the same output.
    """
    logs = np.log(np.asarray(absmax, np.float64)[np.asarray(absmax) > 0])
    if pieces <= 1 or not len(logs):
        return ()
    centres = np.linspace(logs.min(), logs.max(), pieces)
    for _ in range(_STEPS):
        nearest = np.abs(logs[:, None] - centres).argmin(1)
        moved = np.array([logs[nearest == i].mean() for i in range(len(centres)) if (nearest == i).any()])
        if len(moved) == len(centres) and np.allclose(moved, centres, rtol=0, atol=1e-9):
            break
        centres = moved
    return tuple(float(np.exp((a + b) / 2)) for a, b in itertools.pairwise(centres[::-1]))


def search_piecewise(
    absmax: Array,
    error: Callable[[Piecewise], float],
    *,
    pieces: int = PIECES,
    search_pieces: bool = False,
    alphas: Sequence[float] = ALPHAS,
    factors: Sequence[float] = FACTORS,
    floor: float = 0.0,
) -> Piecewise:
    """Coordinate search for the piecewise scale of least error, from the loudest piece on.

    It starts from the best single alpha (none at all is tried too), so that it ends no worse by ``error`` than
    SmoothQuant's own search over ``alphas``. Each piece then tries every alpha, and every factor on the best of them.

    Args:
        absmax: float [channels] of the activation over all data: where the pieces are parted.
        error: what a candidate costs, on rows that did not make its scale if it can be had. Called about
            ``pieces * (len(alphas) + len(factors))`` times; ties go to the first.
        pieces: how many, or at most how many.
        search_pieces: try every number of pieces up to ``pieces``.
        alphas, factors: what each piece tries.
        floor: see :func:`qcompiler.numerics.smoothing.smoothing_scale`.
    """
    rules = [Piece(), *map(Piece, alphas)]
    least, best = _least([Piecewise((), (rule,), floor) for rule in rules], error)
    uniform = least, best.pieces[0]
    for count in range(2, pieces + 1) if search_pieces else (pieces,):
        bounds = bounds_between(absmax, count)
        if not bounds:
            continue
        loss, current = uniform[0], Piecewise(bounds, (uniform[1],) * (len(bounds) + 1), floor)
        for number in range(len(current.pieces)):
            loss, current = _least([_with(current, number, rule) for rule in rules], error, (loss, current))
            scaled = [dataclasses.replace(current.pieces[number], factor=float(factor)) for factor in factors]
            loss, current = _least([_with(current, number, piece) for piece in scaled], error, (loss, current))
        if loss < least:
            least, best = loss, current
    return best


def _with(candidate: Piecewise, number: int, piece: Piece) -> Piecewise:
    pieces = list(candidate.pieces)
    pieces[number] = piece
    return dataclasses.replace(candidate, pieces=tuple(pieces))


def _least(
    candidates: Sequence[Piecewise],
    error: Callable[[Piecewise], float],
    known: tuple[float, Piecewise] | None = None,
) -> tuple[float, Piecewise]:
    """The least error and whose it is; ``known`` wins ties, and is not judged again."""
    judged = [known] if known else []
    judged += [(error(each), each) for each in candidates if known is None or each != known[1]]
    return min(judged, key=lambda pair: pair[0])
