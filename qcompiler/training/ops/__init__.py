"""The torch function of each ONNX operator, in tables by kind.

A function takes the node's inputs by position and its attributes by keyword; an attribute that it has no argument for
is refused. To support another operator, add a line (and, where torch has nothing that fits, a function) to the table of
its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qcompiler.core import DOMAIN
from qcompiler.training.fake_quant import FAKE_QUANTS
from qcompiler.training.ops.arithmetic import ARITHMETIC
from qcompiler.training.ops.nn import LOCAL, NN
from qcompiler.training.ops.shapes import SHAPES

OPS: Mapping[tuple[str, str], Callable[..., Any]] = {
    **{("", name): function for name, function in {**ARITHMETIC, **SHAPES, **NN}.items()},
    **{(DOMAIN, name): function for name, function in {**LOCAL, **FAKE_QUANTS}.items()},
}
"""By domain and op_type."""

ONLY: Mapping[tuple[str, str], Any] = {
    ("Conv", "auto_pad"): "NOTSET",
    ("CumSum", "exclusive"): 0,
    ("CumSum", "reverse"): 0,
    ("GatherND", "batch_dims"): 0,
    ("LayerNormalization", "stash_type"): 1,
    ("TopK", "sorted"): 1,
}
"""Attributes that the functions do not read, and the one value, ONNX's default, that they hold for."""
