"""Which scale, which shift, and which range or zero point suit a site: judged on data that did not make them.

Scales that are judged on the rows that set them overfit: every site gains, and the model loses. So scale, shift and
range come from one fold of the calibration samples, the error from rows of the others; the final ones are made of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.site_channels import Channels, channels_of
from qcompiler.numerics.site_judge import Judge, Reader, Transform
from qcompiler.numerics.smoothing import smoothing_scale
from qcompiler.scheme import TensorSpec

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float32]

ALPHAS = (0.5, 0.65, 0.8, 0.9, 1.0)
FLOORS = (2.0,)
MARGINS = (1.0, 1.2, 1.5, 2.0)
ZERO_POINTS = (128, 96, 64, 48, 32, 24, 16, 8, 160, 192, 208, 224, 240)
SHIFTS = ("mean", "midpoint")


class Candidate(Protocol):
    """A way to make a transform of what is known of a site's channels."""

    def __call__(self, channels: Channels) -> Transform: ...


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """SmoothQuant's scale after Outlier Suppression+'s shift (Wei et al. 2023, equation 3), each if it is asked for.

    Attributes:
        alpha: migration strength; None: no scale.
        floor: see :func:`qcompiler.numerics.smoothing.smoothing_scale`.
        shift: "none", "midpoint" (of each channel's range) or "mean".
        by: "max": the paper's max|x| and max|W|; "rms": max|x| and the root mean square of W; "fourth": the fourth
            root of the mean x^4, and of W as before.
    """

    alpha: float | None = None
    floor: float = 0.0
    shift: str = "none"
    by: str = "max"

    def __call__(self, channels: Channels) -> Transform:
        shift = None
        if self.shift != "none":
            middle = channels.mean if self.shift == "mean" else (channels.low + channels.high) / 2
            shift = np.where(channels.fixed, np.float32(0), middle)
        if self.alpha is None:
            return Transform(None, shift)
        loud = channels.fourth_moment(shift) if self.by == "fourth" else channels.absmax(shift)
        weight = channels.weight if self.by == "max" else channels.weight_rms
        return Transform(smoothing_scale(loud, weight, self.alpha, floor=self.floor), shift)

    def __str__(self) -> str:
        of = {"max": "", "rms": ", rms of W", "fourth": ", fourth moment"}[self.by]
        parts = [] if self.alpha is None else [f"smooth alpha={self.alpha:g}{of}"]
        return " + ".join(([f"shift {self.shift}"] if self.shift != "none" else []) + parts) or "nothing"


PLAIN = Smoothing()
SCALES = (
    *(Smoothing(alpha, floor, by="rms") for alpha in (0.5, 0.65, 0.8, 1.0) for floor in (1.0, 2.0)),
    *(Smoothing(alpha, 1.0, by="fourth") for alpha in (0.35, 0.5, 0.65)),
)
"""The best of many on held-out rows of MiniLM and SmolLM2: by maxima where ranges are static and saturate, by fourth
moments where each token has a range of its own, which the rarest maxima do not set."""


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """The candidate of least error.

    Attributes:
        candidate: which one.
        transform: what it makes of all folds.
        specs: for each reader, how to quantize its activation.
        ranges: for each reader, the least and the greatest x' of all folds, times the spec's margin.
        error: mean over readers of ‖Q(x') Q(W') + z W - x W‖² / ‖x W‖² on held-out rows, weighed as ``Judge`` does.
        plain: the same without a transform.
    """

    candidate: Candidate
    transform: Transform
    specs: tuple[TensorSpec | None, ...]
    ranges: tuple[tuple[np.float32, np.float32], ...]
    error: float
    plain: float


Judged = tuple[float, tuple[int, ...]]


class SiteSearch:
    """Judges candidates at one site.

    Args:
        readers: all that read the site's channels.
        activation: static (min-max range times a margin), dynamic, or None: float. A static min-max range gets the one
            of ``margins``, an asymmetric per-token scale the one of ``zero_points`` that does best.
        weight: spec of the weights.
        channels: of the site.
        blocked, fixed: bool [channels], where the scale must stay 1, and the shift 0; None: nowhere.

    With fewer than two folds there is nothing to hold out: rows are judged by the transforms they made.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        activation: TensorSpec | None,
        weight: TensorSpec,
        *,
        channels: int,
        blocked: Array | None = None,
        fixed: Array | None = None,
        margins: Sequence[float] = MARGINS,
        zero_points: Sequence[int] = ZERO_POINTS,
        reduce_range: bool = False,
        loss: str = "mse",
    ) -> None:
        variants = _variants(activation, margins, zero_points)
        self.readers, self.weight, self.reduce_range = readers, weight, reduce_range
        self._specs = [(spec, margin) for spec, _, margin in variants]
        self.judged = [(judged, margin) for _, judged, margin in variants]
        self._judges = [Judge(reader, self.judged, weight, reduce_range, loss) for reader in readers]
        folds = min(len(reader.low) for reader in readers)
        self._errors: dict[Candidate, Judged] = {}
        parts = [channels_of(readers, fold, channels, blocked, fixed) for fold in [*range(folds), None]]
        self.folds, self.whole = parts[:-1], parts[-1]

    def judge(self, transforms: Sequence[Transform]) -> Judged:
        """The error of a transform made from each fold, and the number of each reader's spec."""
        results = [judge(transforms) for judge in self._judges]
        return float(np.mean([error for error, _ in results])), tuple(best for _, best in results)

    def error(self, candidate: Candidate) -> Judged:
        """The error of a candidate, and the number of each reader's spec."""
        if candidate not in self._errors:
            self._errors[candidate] = self.judge([candidate(fold) for fold in self.folds])
        return self._errors[candidate]

    def best(
        self, candidates: Sequence[Candidate], price: Callable[[Transform], float], keep_plain: bool = True
    ) -> Choice:
        """The candidate whose error times its price is least; PLAIN competes unless ``keep_plain`` is False.

        A candidate of infinite price is never chosen; PLAIN is, where no other may be.
        """
        prices = {each: price(each(self.whole)) for each in candidates}
        tried = [each for each in candidates if np.isfinite(prices[each]) and each != PLAIN]
        if keep_plain or not tried:
            tried.insert(0, PLAIN)
        best = min(tried, key=lambda each: self.error(each)[0] * prices.get(each, 1.0))
        (error, numbers), transform = self.error(best), best(self.whole)
        chosen = [self._specs[number] for number in numbers]
        return Choice(
            best,
            transform,
            tuple(spec for spec, _ in chosen),
            tuple(reader.extremes(transform, margin) for reader, (_, margin) in zip(self.readers, chosen, strict=True)),
            error,
            self.error(PLAIN)[0],
        )


def free(transform: Transform) -> float:
    """The price of transforms that cost nothing."""
    return 1.0


def search_smoothing(
    search: SiteSearch,
    *,
    alphas: Sequence[float] = ALPHAS,
    floors: Sequence[float] = FLOORS,
    scales: Sequence[Smoothing] = (),
    shifts: Sequence[str] = (),
    keep_plain: bool = True,
    price: Callable[[Transform], float] = free,
) -> Choice:
    """Try no transform, each scale, each shift, and each shift with the best scale.

    Args:
        alphas, floors: SmoothQuant's equation 4 with each of these.
        scales: other scales to try.
        price: factor on the error of a transform, for what it costs at run time.
    """
    papers = [Smoothing(alpha, floor) for alpha in alphas for floor in floors]
    choice = search.best([*papers, *scales], price, keep_plain)
    if not shifts:
        return choice
    found = choice.candidate
    assert isinstance(found, Smoothing)
    kept = [found] if found == PLAIN or not keep_plain else [PLAIN, found]
    shifted = [dataclasses.replace(each, shift=shift) for each in kept for shift in shifts]
    return search.best([found, *shifted] if keep_plain else shifted, price, keep_plain)


def search_site(
    readers: Sequence[Reader],
    activation: TensorSpec | None,
    weight: TensorSpec,
    *,
    channels: int,
    alphas: Sequence[float] = ALPHAS,
    reduce_range: bool = False,
) -> Choice:
    """:func:`search_smoothing` without shifts, at a site where every channel may be scaled."""
    search = SiteSearch(readers, activation, weight, channels=channels, reduce_range=reduce_range)
    return search_smoothing(search, alphas=alphas)


def _variants(
    spec: TensorSpec | None, margins: Sequence[float], zero_points: Sequence[int]
) -> list[tuple[TensorSpec | None, TensorSpec | None, float]]:
    """The specs to choose from: what is to be written down, what to judge with, and the factor on its range."""
    if spec is None or (spec.dynamic and (spec.symmetric or spec.granularity != "per_token")):
        return [(spec, spec, 1.0)]
    if spec.dynamic:
        made = [dataclasses.replace(spec, zero_point=zero_point) for zero_point in zero_points]
        return [(each, each, 1.0) for each in made]
    return [(with_margin(spec, margin), spec, margin) for margin in margins]


def with_margin(spec: TensorSpec, margin: float) -> TensorSpec:
    """A static min-max spec with this margin on its range; other observers set their range themselves."""
    if spec.dynamic or spec.observer != "minmax" or margin == 1:
        return spec
    return dataclasses.replace(spec, observer=f"minmax{{margin={margin:g}}}")
