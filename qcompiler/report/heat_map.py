"""Errors of a deep model as a heat map: a row for each kind of Linear, a column for each layer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.report.analysis import METRICS, Analysis, Layer
from qcompiler.report.analysis_tables import by_metric, unit
from qcompiler.report.plots import INK, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS = 4
"""With fewer layers than this a line shows as much."""
WRITTEN = 36
"""Up to so many layers each cell has room for its number."""

Places = dict[str, dict[int, Layer]]
"""Kind of Linear -> number of the layer -> Linear."""


def places(analysis: Analysis) -> Places | None:
    """The quantized Linears by the first number in their names and by the rest; None where names are not like that.

    Only how the page looks depends on names, nothing that is measured.
    """
    found: Places = {}
    for layer in analysis.layers:
        match = re.search(r"(?<![^._/])\d+(?![^._/])", layer.row.name)
        if layer.accumulated is not None and match is not None:
            kind = f"{layer.row.name[: match.start()]}*{layer.row.name[match.end() :]}"
            found.setdefault(kind, {})[int(match[0])] = layer
    found = {kind: layers for kind, layers in found.items() if len(layers) > 1}
    numbers = {number for layers in found.values() for number in layers}
    return found if len(numbers) >= LAYERS and max(numbers) < 10 * len(numbers) else None


def heat_map_figure(analysis: Analysis, found: Places) -> Figure:
    """The error of each Linear that ``found`` places, alone above and accumulated below, on one scale of colours."""
    import matplotlib

    numbers = sorted({number for layers in found.values() for number in layers})
    start = _shared(list(found))
    tables = [
        np.array([[_value(analysis, layers.get(number), which) for number in numbers] for layers in found.values()])
        for which in ("alone", "accumulated")
    ]
    finite = np.concatenate([table[np.isfinite(table)] for table in tables])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    # Bright is bad, whichever way the metric runs.
    name = "viridis_r" if METRICS.get(analysis.metric, 1) < 0 else "viridis"
    colours = matplotlib.colormaps[name].resampled(32)
    with new_figure(11, 0.9 + 0.5 * len(found)) as figure:
        panels = figure.subplots(2, 1, sharex=True)
        for axes, table, title in zip(panels, tables, ("alone", "accumulated"), strict=True):
            mesh = axes.pcolormesh(np.ma.masked_invalid(table), cmap=colours, vmin=low, vmax=high or 1.0)
            axes.invert_yaxis()
            axes.grid(False)
            axes.set_title(title, fontsize=9, loc="left")
            axes.set_yticks(np.arange(len(found)) + 0.5, [kind[start:] for kind in found], fontsize=7)
            if len(numbers) <= WRITTEN:
                _write(axes, analysis, found, numbers, title, lambda value: (value - low) / ((high - low) or 1.0))
        step = -(-len(numbers) // WRITTEN)
        panels[1].set_xticks((np.arange(len(numbers)) + 0.5)[::step], [str(n) for n in numbers[::step]])
        panels[1].set_xlabel("layer")
        bar = figure.colorbar(mesh, ax=panels, label=unit(analysis), pad=0.01, aspect=30)
        assert bar.solids is not None
        bar.solids.set_rasterized(False)  # as shapes, like all the rest: no picture inside the SVG
        bar.outline.set_edgecolor(INK)
    return figure


def _value(analysis: Analysis, layer: Layer | None, which: str) -> float:
    errors = getattr(layer, which) if layer is not None else None
    return float("nan") if errors is None else errors.by(analysis.metric)


def _write(axes: Any, analysis: Analysis, found: Places, numbers: list[int], which: str, share: Any) -> None:
    """The number in each cell, black on the bright ones."""
    bright_is_high = METRICS.get(analysis.metric, 1) > 0
    for y, layers in enumerate(found.values()):
        for x, number in enumerate(numbers):
            value = _value(analysis, layers.get(number), which)
            if not np.isfinite(value):
                continue
            brightness = share(value) if bright_is_high else 1 - share(value)
            errors = getattr(layers[number], which)
            text = by_metric(analysis, errors) if analysis.metric != "cosine" else f"{value:.3f}"
            axes.text(
                x + 0.5,
                y + 0.5,
                text,
                ha="center",
                va="center",
                fontsize=5.5 if len(numbers) > 20 else 7,
                color="black" if brightness > 0.55 else "white",
            )


def _shared(kinds: list[str]) -> int:
    """Length of what all kinds start with."""
    first, last = min(kinds), max(kinds)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
