"""Plots of an analysis as inline SVG, by matplotlib (optional: ``pip install "qcompiler[plot]"``).

The same analysis gives the same bytes: no date, ids hashed with a fixed salt. Text is text, in the colour of the page.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcompiler.core import OptionError
from qcompiler.report.analysis import METRICS, Analysis, Layer, Ranges
from qcompiler.report.analysis_tables import unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK = "#7f7e7d"
"""Stands for the page's own text colour: replaced by ``currentColor`` in the SVG."""
ALONE_COLOUR, ACCUMULATED_COLOUR = "#2f7ed8", "#d9822b"
BEFORE_COLOUR, AFTER_COLOUR = "#d9822b", "#2f7ed8"
KINDS = {"static": "#2f7ed8", "dynamic": "#3a9d5d", "float": "#d9822b"}
NAMED = 64
"""Linears that an axis can name one by one; beyond it, it names every few."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # a "$" in a layer's name is no formula
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


def require_matplotlib() -> None:
    """Say what to install, before any work is done.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError(
            'plots need matplotlib, which is not installed: pip install "qcompiler[plot]", or do without the HTML page.'
        ) from None


def error_figure(analysis: Analysis) -> Figure:
    """The error of each quantized Linear in graph order, alone and accumulated."""
    layers = [layer for layer in analysis.layers if layer.accumulated is not None]
    with new_figure(11, 4.6) as figure:
        axes = figure.subplots()
        places = np.arange(len(layers))
        for label, colour, marker, errors in (
            ("alone: only this Linear is quantized", ALONE_COLOUR, "o", [layer.alone for layer in layers]),
            ("accumulated: all are", ACCUMULATED_COLOUR, "s", [layer.accumulated for layer in layers]),
        ):
            values = [np.nan if e is None else e.by(analysis.metric) for e in errors]
            finite = np.where(np.isfinite(values), values, np.nan)
            axes.plot(places, finite, color=colour, marker=marker, markersize=3, linewidth=1, label=label)
        if analysis.metric == "mse" and any(
            e is not None and e.mse > 0 for e in (layer.accumulated for layer in layers)
        ):
            _log(axes, axes.yaxis)
        better = "higher" if METRICS.get(analysis.metric, 1) < 0 else "lower"
        axes.set_ylabel(f"{unit(analysis)} ({better} is better)")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        _name_layers(axes, layers)
    return figure


def bits_figure(analysis: Analysis) -> Figure:
    """Bits of each Linear's weight and activation, coloured by how their scales come about."""
    with new_figure(11, 4.8) as figure:
        from matplotlib.patches import Patch

        above, below = figure.subplots(2, 1, sharex=True)
        places = np.arange(len(analysis.layers))
        for axes, what, index in ((above, "weight", 0), (below, "activation", 1)):
            specs = [getattr(layer.row, what) for layer in analysis.layers]
            colours = [KINDS[_kind(spec)] for spec in specs]
            axes.bar(places, [layer.bits[index] for layer in analysis.layers], width=0.8, color=colours)
            axes.set_ylabel(f"{what}\nbits")
            axes.set_yscale("log", base=2)
            axes.set_ylim(1, 40)
            axes.set_yticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
            axes.minorticks_off()
            axes.grid(axis="x", visible=False)
        words = {"static": "static", "dynamic": "dynamic (at run time)", "float": "float"}
        patches = [Patch(color=colour, label=words[kind]) for kind, colour in KINDS.items()]
        above.legend(handles=patches, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
        _name_layers(below, list(analysis.layers))
    return figure


def ranges_figure(analysis: Analysis, top: int = 4) -> Figure:
    """absmax of each channel before and after the transforms, for the inputs of the worst Linears.

    Channels stand in the order of their absmax before; where a transform made the site, or changed how many channels
    there are, in that of each.
    """
    from matplotlib.lines import Line2D

    sites = analysis.worst_sites(top)
    rows = max(1, -(-len(sites) // 2))
    with new_figure(11, 0.5 + 2.5 * rows) as figure:
        grid = figure.subplots(rows, 2, squeeze=False).ravel()
        for axes, site in zip(grid, sites, strict=False):
            before, after = site.before, site.after
            paired = before is not None and len(before.absmax) == len(after.absmax)
            order = np.argsort(-(before if paired and before is not None else after).absmax, kind="stable")
            places = np.arange(1, len(order) + 1)
            floor = _floor(before, after)
            _dots(axes, places, np.maximum(after.absmax[order], floor), AFTER_COLOUR)
            if before is not None:
                own = order if paired else np.argsort(-before.absmax, kind="stable")
                axes.plot(
                    np.arange(1, len(own) + 1),
                    np.maximum(before.absmax[own], floor),
                    color=BEFORE_COLOUR,
                    label="before",
                )
            _log(axes, axes.xaxis, axes.yaxis)  # ranks too: the few largest channels are what matters
            more = f" and {len(site.linears) - 1} more" if len(site.linears) > 1 else ""
            axes.set_title(_short(site.linears[0], 48) + more, fontsize=9, loc="left")
            axes.set_xlabel("channels, from the largest before")
            axes.set_ylabel("max|x|")
        for axes in grid[len(sites) :]:
            axes.set_axis_off()
        handles = [
            Line2D([], [], color=BEFORE_COLOUR, label="before"),
            Line2D([], [], color=AFTER_COLOUR, marker=".", linestyle="", label="after"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return figure


def to_svg(make: Callable[[], Figure], salt: str) -> str:
    """The figure as an ``<svg>`` element; ``salt`` keeps the ids of several on one page apart."""
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = make()
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    return text.replace(INK, "currentColor").strip()


@contextlib.contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of this size in inches in our style; it belongs to no window and no global list of figures."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def _dots(axes: Axes, x: npt.NDArray[Any], y: npt.NDArray[Any], colour: str) -> None:
    """Points as one path of strokes of no length with round ends: in SVG a fifth of what as many markers take."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    ends = np.repeat(np.stack([x, y], axis=1), 2, axis=0)
    path = Path(ends, np.tile([Path.MOVETO, Path.LINETO], len(x)))
    path.should_simplify = False
    axes.add_patch(PathPatch(path, fill=False, edgecolor=colour, linewidth=2.2, capstyle="round"))


def _log(axes: Axes, *chosen: Axis) -> None:
    """Make axes logarithmic, with plain labels: matplotlib's own would be formulas."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis in chosen:
        (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
        axis.set_major_locator(LogLocator(subs=(1, 3), numticks=9))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())


def _kind(spec: str) -> str:
    """What the colour of a bar says of a spec as text ("uint8 per_token dynamic")."""
    return spec if spec == "float" else spec.rpartition(" ")[2]


def _floor(*ranges: Ranges | None) -> float:
    """What stands for 0 on a logarithmic axis: a tenth of the smallest number above it."""
    positive = [x for r in ranges if r is not None for x in (r.absmax[r.absmax > 0],) if len(x)]
    return min((float(x.min()) for x in positive), default=1.0) / 10


def _name_layers(axes: Axes, layers: list[Layer]) -> None:
    names = [layer.row.name for layer in layers]
    step = max(1, -(-len(names) // NAMED))
    start = _common_prefix(names)
    shown = range(0, len(names), step)
    axes.set_xticks(list(shown), [_short(names[i][start:]) for i in shown], rotation=90, fontsize=7)
    axes.set_xlim(-0.8, max(len(names), 1) - 0.2)
    if start:
        axes.set_xlabel(f"all names begin with {names[0][:start]}", fontsize=8)


def _common_prefix(names: list[str]) -> int:
    """Length of what all names start with, up to a dot."""
    if len(names) < 2:
        return 0
    first, last = min(names), max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length].rfind(".") + 1


def _short(name: str, limit: int = 34) -> str:
    return name if len(name) <= limit else f"…{name[1 - limit :]}"
