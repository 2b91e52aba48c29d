"""SplitToSequence with constant indices behind it (how torch.split and chunk are exported) becomes one Split."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import users
from qcompiler.graph.rules.patterns import dims, rank, small_array
from qcompiler.graph.rules.rewriter import Rewriter

_SEQUENCES = {"SplitToSequence", "SequenceConstruct", "SequenceInsert", "SequenceErase", "SequenceEmpty", "SequenceMap"}


def raise_splits(rewriter: Rewriter) -> None:
    """One Split for each sequence that is only taken apart again."""
    for node in rewriter.nodes("SplitToSequence"):
        sizes = _sizes(node)
        readers = users(node.outputs[0])
        if sizes is None or node.outputs[0].is_graph_output() or node.attributes.get_int("keepdims", 1) != 1:
            continue
        positions = [_position(reader, len(sizes)) for reader in readers]
        if not readers or None in positions:
            continue
        _split(rewriter, node, sizes, list(zip(readers, positions, strict=True)))


def _sizes(node: ir.Node) -> list[int] | None:
    """Sizes of the parts along the axis."""
    split = small_array(node.inputs[1]) if len(node.inputs) > 1 else None
    shape = dims(node.inputs[0])
    if split is None:
        return None
    if split.ndim == 1:
        return [int(size) for size in split]
    total = shape[node.attributes.get_int("axis", 0)] if shape is not None else None
    size = int(split)
    if not isinstance(total, int) or size <= 0:
        return None
    return [min(size, total - start) for start in range(0, total, size)]


def _position(reader: ir.Node, count: int) -> int | None:
    index = small_array(reader.inputs[1]) if reader.op_type == "SequenceAt" and reader.domain == "" else None
    if index is None or not -count <= int(index) < count:
        return None
    return int(index) % count


def _split(rewriter: Rewriter, node: ir.Node, sizes: list[int], readers: list[tuple[ir.Node, int | None]]) -> None:
    x = node.inputs[0]
    axis = node.attributes.get_int("axis", 0)
    lengths = rewriter.constant(np.array(sizes, dtype=np.int64), f"{node.name}/sizes")
    first = rewriter.insert(node, "Split", [x, lengths], {"axis": axis}, name=node.name, outputs=len(sizes))
    split = first.producer()
    assert split is not None
    for size, output in zip(sizes, split.outputs, strict=True):
        output.type = first.type
        if x is not None and x.shape is not None and rank(x) is not None:
            shape = list(x.shape)
            shape[axis] = size
            output.shape = ir.Shape(shape)
    for reader, position in readers:
        assert position is not None
        rewriter.bypass(reader.outputs[0], split.outputs[position])


def infer_shapes(model: ir.Model) -> None:
    """ONNX shape inference where it can be done; sequences keep their type, which the pass would overwrite."""
    from onnx_ir.passes import common

    sequences = [node.outputs[0] for node in model.graph if node.op_type in _SEQUENCES]
    types = [value.type for value in sequences]
    common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    for value, type_ in zip(sequences, types, strict=True):
        value.type = type_
        value.shape = None
