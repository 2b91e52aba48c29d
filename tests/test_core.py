"""core: errors with the nearest names."""

from __future__ import annotations

from qcompiler.core import unknown


def test_unknown_names_the_nearest() -> None:
    assert (
        str(unknown("pass", "smoth", ["smooth", "fold"]))
        == "unknown pass 'smoth': did you mean 'smooth'? Known: fold, smooth."
    )
    assert str(unknown("pass", "zzz", ["smooth"])) == "unknown pass 'zzz': known: smooth."
