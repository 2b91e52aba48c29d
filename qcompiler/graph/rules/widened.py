"""Weights that are stored in 16 bits and widened where they are used become weights of the type they are used in.

So an fp16 or bf16 file (our own ``fp16`` and ``bf16``, exports under autocast) has Linears like any other.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.graph.rules.rewriter import Rewriter
from qcompiler.graph.stored import converted, on_disk


def widen_weights(rewriter: Rewriter) -> None:
    """Cast(W) of a floating initializer to a wider float becomes an initializer under W's name.

    A table that is only gathered from stays as it is stored: nothing multiplies by it, and it would take more bytes.
    """
    for node in rewriter.nodes("Cast"):
        source, output = node.inputs[0], node.outputs[0]
        if source is None or output.is_graph_output() or not _wider(node) or _only_gathered(output):
            continue
        name = source.name or "weight"
        if len(source.uses()) == 1 and not source.is_graph_output():
            rewriter.rename_initializer(source, f"{name}/stored")
        rewriter.bypass(output, rewriter.tensor(name, _widened(source, output), like=source))


def _wider(node: ir.Node) -> bool:
    source, to = node.inputs[0], ir.DataType(node.attributes.get_int("to", 0))
    return (
        source is not None
        and source.is_initializer()
        and not source.is_graph_input()
        and source.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        and to in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    )


def _only_gathered(value: ir.Value) -> bool:
    return all(user.op_type == "Gather" and index == 0 for user, index in value.uses())


def _widened(source: ir.Value, output: ir.Value) -> ir.TensorProtocol:
    """The numbers in the wider type; what is on disk stays there, and is widened by whoever reads it."""
    tensor = source.const_value
    assert tensor is not None
    assert output.dtype is not None
    if on_disk(tensor):
        return converted(tensor, output.dtype)
    return ir.tensor(np.asarray(tensor.numpy(), output.dtype.numpy()))
