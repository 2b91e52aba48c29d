"""An analysis as tables for a terminal, and the words that they share with the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qcompiler.report.analysis import CUSTOM, OUTLIER, Analysis, Errors, Layer, Site
from qcompiler.report.render import key_values

TOP = 10
LAYER_HEADER = ("Linear", "shape", "weight", "activation", "alone", "accumulated")
SITE_HEADER = ("site, read by", "channels", "min .. max", "outlier ratio", "outlier channels", "transform")


def to_rich(analysis: Analysis, top: int = TOP) -> Group:
    """What a terminal shows: the worst Linears, their sites, then the totals."""
    layers = _table(LAYER_HEADER, f"worst Linears by {unit(analysis)}, alone")
    for layer in analysis.worst(top):
        layers.add_row(*(Text(cell) for cell in layer_cells(analysis, layer)))
    sites = _table(SITE_HEADER, "their inputs, before -> after the transforms")
    for site in analysis.worst_sites(top):
        sites.add_row(*(Text(cell) for cell in site_cells(site)))
    return Group(layers, Text(), sites, Text(), key_values(summary(analysis)))


def summary(analysis: Analysis) -> list[tuple[str, str]]:
    """The totals, each a name and a text."""
    quantized = sum(layer.row.quantized for layer in analysis.layers)
    pairs = [
        ("model", f"{analysis.model} ({analysis.kind})"),
        ("scheme", analysis.scheme),
        ("passes", analysis.passes),
        ("measured on", f"{analysis.samples} samples"),
        ("quantized", f"{quantized} of {len(analysis.layers)} Linears"),
    ]
    pairs += [
        (f"output {name}", f"SQNR {figure(e.sqnr_db)} dB, cosine {e.cosine:.6f}, MSE {figure(e.mse)}")
        for name, e in analysis.outputs.items()
    ]
    outliers = [site for site in analysis.sites if site.after.outliers]
    pairs.append(
        (
            "outlier channels",
            f"at {len(outliers)} of {len(analysis.sites)} inputs behind the transforms "
            f"(absmax above {OUTLIER:g} times the median of the input's channels)",
        )
    )
    return pairs


def layer_cells(analysis: Analysis, layer: Layer) -> Sequence[str]:
    """The cells of ``LAYER_HEADER``."""
    row = layer.row
    return (
        row.name,
        f"{row.in_features}x{row.out_features}",
        row.weight,
        row.activation,
        by_metric(analysis, layer.alone),
        by_metric(analysis, layer.accumulated),
    )


def site_cells(site: Site) -> Sequence[str]:
    """The cells of ``SITE_HEADER``; what changed is told as before -> after."""
    before, after = site.before, site.after
    return (
        f"{site.name}: {', '.join(site.linears)}",
        str(len(after.absmax)),
        f"{figure(after.low)} .. {figure(after.high)}"
        if before is None
        else _changed(f"{figure(before.low)} .. {figure(before.high)}", f"{figure(after.low)} .. {figure(after.high)}"),
        _changed(figure(before.ratio) if before is not None else "", figure(after.ratio)),
        _changed(channels(before.outliers) if before is not None else "", channels(after.outliers)),
        "; ".join(part.partition(": ")[0] for part in site.transform),
    )


def unit(analysis: Analysis) -> str:
    """The metric with its unit."""
    known = {"sqnr": "SQNR in dB", "mse": "mean squared error", "cosine": "cosine"}
    return analysis.metric_name if analysis.metric == CUSTOM else known[analysis.metric]


def by_metric(analysis: Analysis, errors: Errors | None) -> str:
    """A figure of the analysis's metric; "" where nothing was measured."""
    if errors is None:
        return ""
    value = errors.by(analysis.metric)
    if analysis.metric == "sqnr" and math.isfinite(value):
        return f"{value:.1f}"
    return f"{value:.6f}" if analysis.metric == "cosine" else figure(value)


def figure(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def channels(indices: Sequence[int], shown: int = 8) -> str:
    """The first few, and how many there are."""
    if not indices:
        return "none"
    more = f" and {len(indices) - shown} more" if len(indices) > shown else ""
    return ", ".join(map(str, indices[:shown])) + more


def _changed(before: str, after: str) -> str:
    return after if before in ("", after) else f"{before} -> {after}"


def _table(header: Sequence[str], title: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", show_edge=False, pad_edge=False
    )
    for name in header:
        right = name in ("alone", "accumulated", "channels")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table
