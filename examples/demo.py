"""Compile the real MiniLM-L6 sentence embedder to int8; show what that costs and gains. Run by ``make demo``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from fetch_models import fetch_minilm, models_folder
from rich.console import Console

import qcompiler
from qcompiler.report.render import key_values, summary


def sentences() -> list[str]:
    """Real English that every Python ships: the sentences of its language reference."""
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    return [part.strip() + "." for part in text.split(". ") if 40 < len(part) < 200 and part[0].isupper()]


def main() -> None:
    console = Console()
    folder = fetch_minilm(models_folder())
    text = sentences()
    calibration, held_back = text[:128], text[128:328]
    with tempfile.TemporaryDirectory() as scratch:
        compiled = qcompiler.compile(
            folder, scheme="w8a8", calibration=calibration, output=Path(scratch) / "minilm-w8a8"
        )
        compiled = qcompiler.load(Path(scratch) / "minilm-w8a8")
        accuracy = qcompiler.evaluate(compiled, folder, held_back)
        speed = qcompiler.bench(compiled, folder)
    console.print(key_values(summary(compiled.report)))
    console.print(f"On {len(held_back)} held-back sentences:\n{accuracy}")
    console.print(f"Latency:\n{speed}")


if __name__ == "__main__":
    main()
