"""Training on the graph itself: it comes back as a torch module, is trained, and what was learned is written back.

Everything here imports torch; nothing that ``import qcompiler`` loads imports anything here.
"""

from __future__ import annotations

from qcompiler.training.rebuild import Rebuilt, rebuild, write_back

__all__ = ["Rebuilt", "rebuild", "write_back"]
