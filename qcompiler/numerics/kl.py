"""The clip range that keeps most information: the entropy calibration of TensorRT (Migacz 2017, "8-bit Inference")."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.histogram import SIDE, Histogram

Array = npt.NDArray[Any]
_CANDIDATES = 128
_FLOOR = 1e-4  # counts that an empty bin stands for, so that the divergence stays finite


def kl_range(histogram: Histogram, bits: int = 8, symmetric: bool = False) -> tuple[float, float]:
    """The range [low, high] that minimises KL(P || Q): P the clipped distribution, Q the same in 2^bits levels.

    A threshold t on |x| is searched, as TensorRT does; an asymmetric range [max(-t, min), min(t, max)] never reaches
    beyond what was seen, so that one-sided values use all levels. The mass at zero (after a ReLU, say) is not judged,
    for zero is always represented exactly: its bin counts as much as its neighbour.

    Args:
        symmetric: return (-t, t) and judge it with 2^bits - 1 levels.
    """
    reach = max(-histogram.low, histogram.high, 0.0)
    if reach == 0.0:
        return 0.0, 0.0
    levels = 2**bits - 1 if symmetric else 2**bits
    filled = np.flatnonzero(histogram.counts) - SIDE
    first, last = min(int(filled[0]), 0), max(int(filled[-1]) + 1, 0)
    far = max(-first, last)
    if symmetric:
        first, last = -far, far
    counts = histogram.counts.copy()
    counts[SIDE] = min(counts[SIDE], max(counts[SIDE - 1], counts[SIDE + 1]))
    best, threshold = np.inf, far
    # Longest first: of equal divergences the range that clips less wins. Fewer bins than levels would divide nothing.
    for t in np.unique(np.linspace(min(levels, far), far, _CANDIDATES).astype(int))[::-1]:
        divergence = _divergence(counts, max(first, -t) + SIDE, min(last, t) + SIDE, levels)
        if divergence < best:
            best, threshold = divergence, int(t)
    t = min(threshold * histogram.width, reach)
    if symmetric:
        return -t, t
    return max(-t, min(histogram.low, 0.0)), min(t, max(histogram.high, 0.0))


def _divergence(counts: Array, start: int, stop: int, levels: int) -> float:
    """KL(P || Q) of the bins [start, stop): P holds what is outside in its end bins, Q does not know of it."""
    inside = counts[start:stop].astype(np.float64)
    p = inside.copy()
    p[0] += counts[:start].sum()
    p[-1] += counts[stop:].sum()
    if inside.size <= levels:
        q = inside
    else:
        edges = np.linspace(0, inside.size, levels + 1).astype(int)
        filled = (p > 0).astype(np.float64)
        mean = np.add.reduceat(inside, edges[:-1]) / np.maximum(np.add.reduceat(filled, edges[:-1]), 1.0)
        q = np.repeat(mean, np.diff(edges)) * filled
    q_total = q.sum()
    if not q_total:
        return np.inf
    kept = p > 0
    p, q = p[kept] / p.sum(), np.maximum(q[kept], _FLOOR) / q_total
    return float(np.sum(p * np.log(p / q)))
