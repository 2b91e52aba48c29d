"""Results on stdout: tables for people, or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.console import Console


def tell(options: argparse.Namespace, data: dict[str, Any], tables: Any) -> None:
    """Print ``data`` with --json, else ``tables``."""
    if options.json:
        print(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        show(tables)


def show(tables: Any) -> None:
    """Print tables as wide as the terminal, or 200 characters where there is none."""
    Console(width=None if sys.stdout.isatty() else 200).print(tables)
