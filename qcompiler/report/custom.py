"""A metric of the user's own, on whole outputs: as many Linears in one run as a fixed memory holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import OptionError
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.run import Feeds, Runner
from qcompiler.report.errors import SLICE, unmasked
from qcompiler.report.side_by_side import side_by_side, whole

Metric = Callable[[npt.NDArray[Any], npt.NDArray[Any]], float]
"""Of the float and the quantized output of one Linear, float32 [rows, channels] each; larger is worse."""

BUDGET = 256 << 20
"""Bytes of outputs that one run may return: float, accumulated and alone, of ``SLICE`` rows (tokens) each."""


def custom_errors(
    float_model: ir.Model, quantized: ir.Model, batches: Iterable[Feeds], metric: Metric, threads: int = 0
) -> dict[tuple[str, str], float]:
    """Call ``metric`` for each Linear and batch; its results are averaged, weighted by rows.

    Each run returns the outputs of as many Linears as ``BUDGET`` holds (of one at least), so the data is read once for
    each such group, and memory grows neither with the data nor with the depth of the model.

    Args:
        float_model, quantized: as of ``errors.layer_errors``.
        batches: feeds of about ``SLICE`` rows, readable as often as needed.

    Returns:
        The mean by (Linear, kind), kinds as in ``side_by_side.Pair``.

    Raises:
        OptionError: the metric raises, or returns something else than a finite number.
    """
    means: dict[tuple[str, str], float] = {}
    for group in _groups([linear for linear in linears(quantized) if linear.weight_quant is not None]):
        merged, pairs = side_by_side(float_model, quantized, only={linear.name for linear in group})
        if not pairs:
            continue
        taps = whole(merged, pairs)
        runner = Runner(merged, threads=threads, in_order=True)
        totals, rows = dict.fromkeys([(pair.name, pair.kind) for pair in pairs], 0.0), dict[tuple[str, str], int]()
        for feeds in batches:
            results = runner(feeds)
            for pair, (want, have) in zip(pairs, taps, strict=True):
                keep = unmasked(feeds, results[want].shape[:-1])
                reference, got = results[want][keep], results[have][keep]
                if not len(reference):
                    continue
                key = (pair.name, pair.kind)
                totals[key] += _call(metric, reference, got, pair.name) * len(reference)
                rows[key] = rows.get(key, 0) + len(reference)
        means.update({key: total / rows[key] for key, total in totals.items() if key in rows})
    return means


def metric_name(metric: Metric) -> str:
    """What a callable is called in tables and errors."""
    return str(getattr(metric, "__name__", type(metric).__name__))


def _call(metric: Metric, reference: npt.NDArray[Any], got: npt.NDArray[Any], linear: str) -> float:
    where = f"metric {metric_name(metric)!r} at Linear {linear!r}"
    try:
        value = metric(reference, got)
    except Exception as error:
        raise OptionError(f"{where} failed: {type(error).__name__}: {_first_line(error)}.") from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise OptionError(f"{where} returned a {type(value).__name__}: one number is wanted.") from None
    if not math.isfinite(number):
        raise OptionError(f"{where} returned {number}: a finite number is wanted.")
    return number


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "").rstrip(".")


def _groups(found: list[Linear]) -> Iterator[list[Linear]]:
    """Neighbours whose outputs fit ``BUDGET`` together."""
    group: list[Linear] = []
    size = 0
    for linear in found:
        needed = 3 * 4 * SLICE * linear.out_features
        if group and size + needed > BUDGET:
            yield group
            group, size = [], 0
        group.append(linear)
        size += needed
    if group:
        yield group
