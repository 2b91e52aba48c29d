"""Where to spend time for accuracy, and how sure a figure from few samples is: the arithmetic of ``max_drop``."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Option = tuple[float, float]
"""(cost, error) of one way to compute a site."""

CONFIDENCE = 0.99


@dataclasses.dataclass(frozen=True)
class Upgrade:
    """Site ``site`` goes over to its option ``option``: better, and dearer."""

    site: int
    option: int


def upgrades(sites: Sequence[Sequence[Option]]) -> tuple[list[int], list[Upgrade]]:
    """The one order in which sites get better options: by error decrease per cost, largest first.

    Errors of sites are taken as additive. The greedy order over the lower convex hulls of the options is then the
    optimal solution of the linear relaxation of this multiple-choice knapsack, for every budget that it meets exactly
    (Sinha and Zoltners 1979). Options that are dearer and no better than another never appear.

    Args:
        sites: the options of each; an error that is no number counts as infinite.

    Returns:
        The option that each site starts with (its cheapest), and the upgrades.
    """
    start: list[int] = []
    steps: list[tuple[float, int, int, Upgrade]] = []
    for number, options in enumerate(sites):
        hull = _hull(options)
        start.append(hull[0])
        for before, after in itertools.pairwise(hull):
            (cheap, worse), (dear, better) = options[before], options[after]
            steps.append((-_slope(worse, better, dear - cheap), number, len(steps), Upgrade(number, after)))
    return start, [step[-1] for step in sorted(steps, key=lambda step: step[:3])]


def taken(start: Sequence[int], order: Sequence[Upgrade], count: int) -> tuple[int, ...]:
    """The option of each site after the first ``count`` upgrades."""
    options = list(start)
    for upgrade in order[:count]:
        options[upgrade.site] = upgrade.option
    return tuple(options)


def spread(low: int, high: int, points: int) -> list[int]:
    """At most ``points`` integers from ``low`` to ``high``, both included, as evenly as may be."""
    count = max(min(points, high - low + 1), 1)
    return sorted({int(number) for number in np.linspace(low, high, count).round()}) if count > 1 else [high]


def first_safe(holds: Sequence[bool]) -> int | None:
    """The first of ordered candidates, cheapest first, that holds together with all dearer ones; None: the last fails.

    Tests in a fixed order, from the safest on until one fails, need no correction for their number (fixed sequence
    testing; Angelopoulos et al. 2021, "Learn then Test", section 3). The first that holds, counted from the cheap end,
    would be one that was lucky on these samples.
    """
    safe = next((number for number in reversed(range(len(holds))) if not holds[number]), -1) + 1
    return safe if safe < len(holds) else None


def ratio_bound(
    numerators: npt.ArrayLike, denominators: npt.ArrayLike, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Σ numerators / Σ denominators over samples, and a bound that it stays below on as many new samples.

    The bound is the upper end of the one-sided prediction interval: the ratio + t · √2 · its standard error, the error
    by linearisation over samples (Cochran 1977, section 6.3), √2 since the new samples vary as these do.

    Args:
        numerators, denominators: [samples], at least two.
        confidence: of the bound.

    Returns:
        Ratio and bound; NaN where the denominators sum to 0 or a number is not finite.
    """
    n, d = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    total = float(d.sum())
    if not (total != 0 and np.isfinite(n).all() and np.isfinite(d).all()):
        return math.nan, math.nan
    ratio = float(n.sum()) / total
    residuals = n - ratio * d
    error = math.sqrt(len(n) / (len(n) - 1) * float(residuals @ residuals)) / abs(total)
    return ratio, ratio + student_t(confidence, len(n) - 1) * math.sqrt(2) * error


def student_t(confidence: float, freedom: int) -> float:
    """Quantile of Student's t distribution, by its expansion about the normal one (Abramowitz and Stegun 26.7.5).

    Within 0.5 % from 3 degrees of freedom on, at 0.95.
    """
    z = statistics.NormalDist().inv_cdf(confidence)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull from the cheapest to the best: error falls, and ever less for each cost."""
    errors = [error if not math.isnan(error) else math.inf for _, error in options]
    hull: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i][0], errors[i], i)):
        cost = options[index][0]
        if hull and not errors[index] < errors[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            before = _slope(errors[a], errors[b], options[b][0] - options[a][0])
            if before > _slope(errors[b], errors[index], cost - options[b][0]):
                break
            hull.pop()
        hull.append(index)
    return hull


def _slope(worse: float, better: float, cost: float) -> float:
    """Error decrease per cost; infinite errors are as bad as can be, whatever they turn into."""
    return math.inf if not math.isfinite(worse) else (worse - better) / cost
