"""What a run is doing and how long each part took: a line on stderr while it lasts, seconds afterwards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console


class Stages:
    """Names and times the stages of a run.

    Attributes:
        seconds: wall seconds by stage, in the order they first ran.
    """

    def __init__(self, progress: bool = True) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._console = Console(stderr=True, quiet=not progress)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run the block as stage ``name``."""
        start = time.perf_counter()
        with self._console.status(name):
            yield
        took = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        self._console.print(f"[dim]{took:6.1f} s[/dim]  {name}")
