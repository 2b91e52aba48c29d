"""The report as Markdown and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from qcompiler.report.data import LinearRow, Report

_TOLD = ("calibration", "max_drop")  # decisions about the whole model
_HEADER = ("Linear", "shape", "weight", "activation", "kernel", "SQNR dB", "alone dB", "transform / reason")


def summary(report: Report) -> list[tuple[str, str]]:
    """The totals, each a name and a text."""
    quantized = sum(row.quantized for row in report.rows)
    lines = [
        ("Linears quantized", f"{quantized} of {len(report.rows)}"),
        ("size", f"{_mb(report.size_before)} -> {_mb(report.size_after)} MB"),
    ]
    if report.coverage_body is not None:
        head = "" if report.coverage_head is None else f", output head {report.coverage_head:.1%}"
        lines.append(("integer coverage", f"{report.coverage_body:.1%}{head}"))
    for name, value in report.output_sqnr_db.items():
        lines.append((f"SQNR of {name}", f"{value:.1f} dB ({report.samples} calibration samples)"))
    lines += [(note.node, f"{note.what}: {note.why}") for note in report.notes if note.node in _TOLD]
    if report.seconds:
        stages = ", ".join(f"{name} {took:.1f}" for name, took in report.seconds.items())
        lines.append(("seconds", f"{sum(report.seconds.values()):.1f} ({stages})"))
    if report.peak_rss:
        lines.append(("peak memory", f"{_mb(report.peak_rss)} MB"))
    return lines


def to_markdown(report: Report) -> str:
    """The text of report.md."""
    lines = ["# Report", "", *(f"- {name}: {text}" for name, text in summary(report)), ""]
    lines += ["| " + " | ".join(_HEADER) + " |", "|" + "---|" * len(_HEADER)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |" for row in report.rows]
    if report.notes:
        lines += ["", "## Decisions", ""]
        lines += [f"- `{note.node}`: {note.what}: {note.why}" for note in report.notes]
    return "\n".join(lines) + "\n"


def to_rich(report: Report) -> Group:
    """What a terminal shows: the table, then the totals."""
    table = Table(title=None, header_style="bold", show_edge=False, pad_edge=False)
    for header in _HEADER:
        table.add_column(header, justify="right" if header.endswith("dB") else "left", overflow="fold")
    for row in report.rows:
        table.add_row(*(Text(cell) for cell in _cells(row)))
    return Group(table, Text(), key_values(summary(report)))


def key_values(pairs: Sequence[tuple[str, str]]) -> Table:
    """Two columns: names and texts."""
    table = Table.grid(padding=(0, 2))
    for name, text in pairs:
        table.add_row(Text(name, style="dim"), Text(text))
    return table


def show(report: Report, console: Console | None = None) -> None:
    """Print the tables."""
    (console or Console()).print(to_rich(report))


def _cells(row: LinearRow) -> Sequence[str]:
    return (
        row.name,
        f"{row.in_features}x{row.out_features}",
        row.weight,
        row.activation,
        row.kernel,
        _db(row.sqnr_db),
        _db(row.alone_db),
        row.reason or row.transform,
    )


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}"
