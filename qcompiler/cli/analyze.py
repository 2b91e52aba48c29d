"""``qcompiler analyze``: where the error of a scheme comes from."""

from __future__ import annotations

import argparse
from pathlib import Path

from qcompiler.cli.arguments import SRC, Commands, add_command, add_data, add_quantization, quantization
from qcompiler.cli.output import show
from qcompiler.core import OptionError
from qcompiler.report.analysis import METRICS
from qcompiler.report.analysis_tables import TOP
from qcompiler.runtime.artefact import refuse_file, write_text

_HELP = """\
quantizes as compile does, lowers and saves nothing, and measures the output of each Linear against the float model's:
alone (only this Linear is quantized) and accumulated (all are). Also the ranges and outlier channels of what the
Linears read, before and after the transforms.
examples:
  qcompiler analyze minilm/ --calibration text.txt --limit 64 --html report.html
  qcompiler analyze smollm2/ --scheme w8a8-dynamic --data wiki.txt --limit 8 --metric cosine --json out.json
  qcompiler analyze model.onnx --calibration data.npz --passes annotate,insert,fold --top 20"""


def add(commands: Commands) -> None:
    """The command and its options."""
    sub = add_command(
        commands, "analyze", run, "measure which Linears the error of a scheme comes from", _HELP, json_file=True
    )
    sub.add_argument("src", metavar="SRC", help=SRC)
    add_quantization(sub)
    sub.add_argument("--data", metavar="DATA", help="what to measure on (default: the calibration data)")
    add_data(sub)
    sub.add_argument("--metric", default="sqnr", help=f"what to rank by: {', '.join(METRICS)} (default sqnr)")
    sub.add_argument("--top", metavar="N", type=int, default=TOP, help=f"Linears to show (default {TOP})")
    sub.add_argument("--html", metavar="FILE", help="also write tables and plots as one page, here")
    sub.add_argument("--force", action="store_true", help="replace the files that are written")


def run(options: argparse.Namespace) -> None:
    """Measure, and write what was asked for."""
    from qcompiler.analysis import analyze_as
    from qcompiler.report.analysis_tables import to_rich
    from qcompiler.report.plots import require_matplotlib

    if options.top < 1:
        raise OptionError(f"top is {options.top}, but at least one Linear is to be shown.")
    texts = {"html": options.html, "json": options.json if isinstance(options.json, str) else None}
    files = {kind: Path(name) for kind, name in texts.items() if name is not None}
    for path in files.values():
        refuse_file(path, options.force)
    if options.html is not None:
        require_matplotlib()
    found = analyze_as(options.src, quantization(options), options.data, options.metric)
    for kind, path in files.items():
        write_text(path, found.to_html(options.top) if kind == "html" else found.to_text(), options.force)
    if options.json is True:
        print(found.to_text(), end="")
    else:
        show(to_rich(found, options.top))
