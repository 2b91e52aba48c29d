"""Rules that bring a graph into canonical form, one file a family; :func:`canonicalise` applies them in order."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.core import DOMAIN, Note
from qcompiler.graph.edit import remove_dead
from qcompiler.graph.rules.attention import raise_attentions
from qcompiler.graph.rules.bmm import unflatten_attentions
from qcompiler.graph.rules.constants import simplify
from qcompiler.graph.rules.contrib import drop_unused_domains, expand_contrib
from qcompiler.graph.rules.experts import raise_experts
from qcompiler.graph.rules.gelu import raise_gelus
from qcompiler.graph.rules.linear import raise_linears
from qcompiler.graph.rules.naming import name_linears, record_parameters
from qcompiler.graph.rules.norms import raise_norms
from qcompiler.graph.rules.opset import convert_opset, convert_softmax, source_opset
from qcompiler.graph.rules.rewriter import Rewriter
from qcompiler.graph.rules.rotary import raise_rotary
from qcompiler.graph.rules.sequences import infer_shapes, raise_splits
from qcompiler.graph.rules.widened import widen_weights

_FAMILIES = (
    widen_weights,
    raise_splits,
    raise_experts,
    raise_linears,
    simplify,  # Reshapes behind Linears that kept their rank
    raise_norms,
    raise_gelus,
    raise_rotary,
    unflatten_attentions,
    raise_attentions,
)


def canonicalise(model: ir.Model) -> list[Note]:
    """Bring ``model`` into canonical form, in place; what is not understood stays as it is.

    Returns:
        A note for each kind of operator of another domain that stays.

    Raises:
        ModelError: an opset outside 11 to 23, or an operator that opset 21 does not have.
    """
    version = source_opset(model)
    if any(function.domain != DOMAIN for function in model.functions.values()):
        common.InlinePass(criteria=lambda function: function.domain != DOMAIN)(model)
    common.RemoveInitializersFromInputsPass()(model)  # old files list every weight as an input with a default
    record_parameters(model)
    name_nodes(model)
    rewriter = Rewriter(model)
    convert_opset(rewriter, version)
    infer_shapes(model)
    expand_contrib(rewriter)
    convert_softmax(rewriter, version)
    simplify(rewriter)
    common.CommonSubexpressionEliminationPass()(model)
    remove_dead(model)
    for rule in _FAMILIES:
        rule(rewriter)
        remove_dead(model)
    name_linears(rewriter)
    drop_unused_domains(model)
    return _left(model)


def name_nodes(model: ir.Model) -> None:
    """Every node gets a name of its own: reports, errors and passes name nodes, and ONNX Runtime refuses equal ones."""
    taken: set[str] = set()
    for index, node in enumerate(model.graph):
        name = base = node.name or f"{node.op_type}_{index}"
        number = 2
        while name in taken:
            name, number = f"{base}_{number}", number + 1
        taken.add(name)
        node.name = name


def _left(model: ir.Model) -> list[Note]:
    foreign = [node for node in model.graph if node.domain not in ("", DOMAIN)]
    return [
        Note(node.name or "", f"{node.domain}::{node.op_type} left as it is", "no rule expands it") for node in foreign
    ]
