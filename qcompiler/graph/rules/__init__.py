"""Rules that bring a graph into canonical form, one file a family; :func:`canonicalise` applies them in order."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.core import Note
from qcompiler.graph.edit import remove_dead
from qcompiler.graph.rules.attention import raise_attentions
from qcompiler.graph.rules.constants import simplify
from qcompiler.graph.rules.gelu import raise_gelus
from qcompiler.graph.rules.linear import raise_linears
from qcompiler.graph.rules.naming import name_linears, record_parameters
from qcompiler.graph.rules.norms import raise_norms
from qcompiler.graph.rules.rewriter import Rewriter
from qcompiler.graph.rules.rotary import raise_rotary
from qcompiler.graph.rules.sequences import infer_shapes, raise_splits


def canonicalise(model: ir.Model) -> list[Note]:
    """Bring ``model`` into canonical form, in place; what is not understood stays as it is.

    Raises:
        ModelError: an opset outside 11 to 23, or an operator that opset 21 does not have.
    """
    record_parameters(model)
    infer_shapes(model)
    rewriter = Rewriter(model)
    simplify(rewriter)
    common.CommonSubexpressionEliminationPass()(model)
    remove_dead(model)
    for rule in (raise_splits, raise_linears, raise_norms, raise_gelus, raise_rotary, raise_attentions):
        rule(rewriter)
        remove_dead(model)
    name_linears(rewriter)
    return []
