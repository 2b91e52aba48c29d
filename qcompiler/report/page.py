"""An analysis as one HTML page that needs nothing else: plain CSS for light and dark, inline SVG, tables that sort."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from qcompiler.report import plots
from qcompiler.report.analysis import CUSTOM, METRICS, OUTLIER, Analysis, Errors, Layer, Site
from qcompiler.report.analysis_tables import channels, figure, summary, unit
from qcompiler.report.heat_map import heat_map_figure, places

SITES_SHOWN = 4
Cell = tuple[str, float | str]
"""Text, and what it sorts by."""

_CSS = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note { opacity: .75; max-width: 60rem; }
svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884; }
th { white-space: nowrap; } th[scope=col] { cursor: pointer; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { font-family: ui-monospace, monospace; font-size: 12px; overflow-wrap: anywhere; min-width: 14rem; }
td.long { min-width: 16rem; }
"""

_JS = """
for (const head of document.querySelectorAll("th[scope=col]")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], i = head.cellIndex;
  const up = head.ariaSort !== "ascending";
  for (const other of head.parentNode.cells) other.ariaSort = null;
  head.ariaSort = up ? "ascending" : "descending";
  const key = row => { const v = row.cells[i].dataset.v; return v === "" || isNaN(v) ? v : Number(v); };
  const order = (a, b) => (a === b ? 0 : a === "" ? 1 : b === "" ? -1 : (a < b ? -1 : 1) * (up ? 1 : -1));
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
};
"""


def to_html(analysis: Analysis, top: int) -> str:
    """The page.

    Raises:
        OptionError: matplotlib is not installed.
    """
    plots.require_matplotlib()
    title = f"Where the error comes from: {analysis.model}, {analysis.scheme}"
    better = "lower" if METRICS.get(analysis.metric, 1) > 0 else "higher"
    what = f"{unit(analysis)}; {better} is better"
    shown = min(SITES_SHOWN, len(analysis.worst_sites()))
    parts = [
        f"<h1>{escape(title)}</h1>",
        _pairs(summary(analysis)),
        f"<h2>The {min(top, len(analysis.worst()))} worst Linears</h2>",
        _note(
            f"By their error alone ({escape(what)}). <b>Alone</b>: only this Linear is quantized, its input comes from "
            "the float model. <b>Accumulated</b>: the whole model is. A Linear that is bad alone is where to act; one "
            "that is bad only when accumulated passes on what it was given."
        ),
        _layers(analysis, analysis.worst(top)),
        f"<h2>Error by layer</h2>{plots.to_svg(lambda: plots.error_figure(analysis), 'error')}",
        _heat_map(analysis),
        f"<h2>Channel ranges of the {shown} worst inputs</h2>",
        _note(
            "max|x| of each channel over all rows of the data, in the float model and behind the transforms. A channel "
            "of zeros, such as one that split takes out, is drawn at the bottom."
        ),
        plots.to_svg(lambda: plots.ranges_figure(analysis, SITES_SHOWN), "ranges"),
        f"<h2>Bits by layer</h2>{plots.to_svg(lambda: plots.bits_figure(analysis), 'bits')}",
        "<h2>All inputs of Linears</h2>",
        _note(
            "Outlier ratio: largest channel absmax / median channel absmax. An outlier channel's is above "
            f"{OUTLIER:g} times the median. A click on a column's head sorts."
        ),
        _sites(analysis.sites),
        "<h2>All Linears</h2>",
        _note(f"In graph order. Ranked above by {escape(what)}."),
        _layers(analysis, analysis.layers),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_CSS}</style>\n</head>\n<body>\n" + "\n".join(parts) + f"\n<script>{_JS}</script>\n</body>\n</html>\n"
    )


def _heat_map(analysis: Analysis) -> str:
    found = places(analysis)
    return plots.to_svg(lambda: heat_map_figure(analysis, found), "heat map") if found is not None else ""


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in pairs)
    return f'<div class="scroll"><table>{rows}</table></div>'


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def _layers(analysis: Analysis, layers: Sequence[Layer]) -> str:
    metrics = [("SQNR dB", "sqnr"), ("cosine", "cosine"), ("MSE", "mse")]
    if analysis.metric == CUSTOM:
        metrics.insert(0, (analysis.metric_name, CUSTOM))
    header = ["Linear", "shape", "weight", "activation"]
    header += [f"{name}, {kind}" for name, _ in metrics for kind in ("alone", "accumulated")] + ["transform / reason"]
    rows = []
    for layer in layers:
        row = layer.row
        texts: list[Cell] = [(text, text) for text in (row.name, f"{row.in_features}x{row.out_features}")]
        texts += [(text, text) for text in (row.weight, row.activation)]
        figures = [_error(errors, metric) for _, metric in metrics for errors in (layer.alone, layer.accumulated)]
        why = row.reason or row.transform
        rows.append([*texts, *figures, (why, why)])
    return _table(header, rows)


def _sites(sites: Sequence[Site]) -> str:
    header = ["read by", "channels", "min before", "after", "max before", "after"]
    header += ["outlier ratio before", "after", "outlier channels before", "after", "transform"]
    rows = []
    for site in sites:
        before, after = site.before, site.after
        rows.append(
            [
                (", ".join(site.linears), site.name),
                _number(len(after.absmax)),
                _number(before.low if before is not None else None),
                _number(after.low),
                _number(before.high if before is not None else None),
                _number(after.high),
                _number(before.ratio if before is not None else None),
                _number(after.ratio),
                (channels(before.outliers), float(len(before.outliers))) if before is not None else ("", ""),
                (channels(after.outliers), float(len(after.outliers))),
                ("; ".join(site.transform),) * 2,
            ]
        )
    return _table(header, rows)


def _error(errors: Errors | None, metric: str) -> Cell:
    if errors is None:
        return "", ""
    value = errors.by(metric)
    texts = {"sqnr": f"{value:.1f}", "cosine": f"{value:.6f}"}
    return texts.get(metric, figure(value)), value


def _number(value: float | None) -> Cell:
    return ("", "") if value is None else (figure(value), value)


def _table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "\n".join(
        f"<tr>{''.join(_cell(cell, number, len(header)) for number, cell in enumerate(row))}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _cell(cell: Cell, number: int, columns: int) -> str:
    text, key = cell
    numeric = not isinstance(key, str)
    listed = "," in text or text == "none"
    kind = "name" if number == 0 else "long" if number == columns - 1 else "n" if numeric and not listed else ""
    if not isinstance(key, str):
        key = {math.inf: "1e999", -math.inf: "-1e999"}.get(key, repr(float(key)))  # JavaScript reads 1e999 as Infinity
    return f'<td class="{kind}" data-v="{escape(key)}">{escape(text)}</td>'
