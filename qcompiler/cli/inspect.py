"""``qcompiler inspect``: what a source holds, or what was done to a compiled one."""

from __future__ import annotations

import argparse

from qcompiler.cli.arguments import SRC, Commands, add_command
from qcompiler.cli.output import tell
from qcompiler.frontends import open_source
from qcompiler.graph.rules import canonicalise
from qcompiler.report.render import to_rich as report_tables
from qcompiler.runtime.load import is_compiled, load


def add(commands: Commands) -> None:
    """The command and its options."""
    sub = add_command(commands, "inspect", run, "show what a source holds, or the report of a compiled folder")
    sub.add_argument("path", metavar="SRC|OUT", help=f"{SRC}, or a folder that compile made")


def run(options: argparse.Namespace) -> None:
    """Tell what a source or a compiled folder holds."""
    if is_compiled(options.path):
        compiled = load(options.path)
        tell(options, {"recipe": compiled.recipe, "report": compiled.report.to_json()}, report_tables(compiled.report))
        return
    from qcompiler.report.overview import overview, to_rich

    source = open_source(options.path, trust_remote_code=options.trust_remote_code)
    canonicalise(source.model)
    found = overview(source.model)
    tell(options, found.to_json(), to_rich(found))
