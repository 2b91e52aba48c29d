"""What an 8-bit Linear takes by its activation's granularity: a table for processors with VNNI, one for those without.

They are part of the package, so that the same model compiles to the same kernels on all processors of a kind; others
are measured with ``python -m qcompiler.targets.tvm.measure``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qcompiler.targets.ort.costs import CostTable, load_costs
from qcompiler.targets.tvm.kernels import INT8

KERNELS: Mapping[str, tuple[str, ...]] = {"static": (INT8,), "per_tensor": (INT8,), "per_token": (INT8,)}
ROWS = 1024
"""Tokens in one run, for which times are given."""


def costs_of(dot: str) -> CostTable:
    """The table of processors that multiply 8-bit integers so (:data:`qcompiler.targets.tvm.isa.DOTS`)."""
    name = "costs_vnni.json" if dot == "vnni" else "costs_avx2.json"
    return load_costs(Path(__file__).with_name(name))
