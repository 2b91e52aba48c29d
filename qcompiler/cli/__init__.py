"""The command line: a file for each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata

from qcompiler.cli import analyze, bench, compile, evaluate, inspect
from qcompiler.core import QCompilerError

COMMANDS = (compile, analyze, inspect, evaluate, bench)

_EXAMPLES = """\
examples:
  qcompiler inspect minilm/                      which Linears and norms there are, and what could be folded
  qcompiler compile minilm/ -o minilm-int8 --scheme w8a8 --calibration sentences.txt --limit 128
  qcompiler analyze minilm/ --scheme w8a8 --calibration sentences.txt --html report.html
                                                 which Linears the error comes from
  qcompiler inspect minilm-int8                  what was done to each Linear, why, and what it cost
  qcompiler evaluate minilm-int8 --reference minilm/ --data held-out.txt
  qcompiler bench minilm-int8 --reference minilm/

Results go to stdout (as JSON with --json), progress to stderr. Exit code 2: the input cannot be used, and one sentence
on stderr says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0, or 2 where the input cannot be used)."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except QCompilerError as error:
        print(f"qcompiler: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qcompiler: interrupted.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qcompiler",
        description="Compile a float Transformer into an int8 one that is faster and still right.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qcompiler {metadata.version('qcompiler')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
