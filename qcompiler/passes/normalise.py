"""normalise: bring the graph that came in into the canonical form that every other pass relies on."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qcompiler.core import DOMAIN
from qcompiler.graph.rules import canonicalise
from qcompiler.passes.base import Context, Pass, PassResult, Stats


@dataclasses.dataclass(frozen=True)
class Normalise(Pass):
    """Rewrite every spelling of Linears, norms, Gelu, rotary embeddings and attention into one.

    The rules are in graph/rules. What is not understood passes through untouched.
    """

    name: ClassVar[str] = "normalise"
    float_exact: ClassVar[bool] = True

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        _forget(model)
        return PassResult(True, tuple(canonicalise(model)))


def _forget(model: ir.Model) -> None:
    """Drop what passes decided about nodes before the model was saved: this run decides anew."""
    for node in model.graph:
        for key in [key for key in node.metadata_props if key.startswith(f"{DOMAIN}.")]:
            del node.metadata_props[key]
