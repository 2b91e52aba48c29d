"""Rotate each attention head between v and o: attention mixes positions, so any matrix on a head's channels commutes.

QuaRot (Ashkboos et al. 2024, section 4, stage 1c): V's output channels of a head are multiplied by Q, o's rows of that
head by Qᵀ. Heads are found from the flow analysis' columns, so that grouped queries and fused projections are the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import FoldPlan
from qcompiler.graph.edit import array_of
from qcompiler.graph.fold_site import FoldSite
from qcompiler.graph.functions import is_call
from qcompiler.graph.rotation import record
from qcompiler.graph.sources import as_source
from qcompiler.graph.transaction import FoldError, Transaction, Write
from qcompiler.graph.verify import region_outputs
from qcompiler.numerics.hadamard import Rotation

_LAYOUT = (
    "Identity",
    "Cast",
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Expand",
    "Slice",
    "Split",
    "Gather",
    "GatherND",
)

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class HeadSite:
    """A Linear whose heads reach other Linears through attention only.

    Attributes:
        site: of the flow analysis.
        size: channels of a head.
        blocks: int [heads, size], the source channels of each head.
    """

    site: FoldSite
    size: int
    blocks: npt.NDArray[np.int32]


def head_site(model: ir.Model, site: FoldSite) -> HeadSite | None:
    """The heads between a Linear and its sinks, or None where anything but layout and attention lies between them."""
    if site.kind != "linear" or not site.sinks:
        return None
    nodes = {node.name: node for node in model.graph}
    sizes = {_head_size(nodes[sink.linear].inputs[0], site.value) for sink in site.sinks}
    size = sizes.pop() if len(sizes) == 1 else None
    if not size or size < 2 or any(len(sink.columns) % size for sink in site.sinks):
        return None
    blocks = np.unique(np.concatenate([sink.columns.reshape(-1, size) for sink in site.sinks]), axis=0)
    if (blocks < 0).any() or len(np.unique(blocks)) != blocks.size or site.scale_blocked[blocks].any():
        return None
    return HeadSite(site, size, blocks)


def rotate_heads(model: ir.Model, heads: HeadSite, rotation: Rotation, *, seed: int = 0) -> FoldPlan:
    """Multiply each head by the same Q in the source's weight and by Qᵀ in its sinks'; outputs stay what they were.

    Raises:
        FoldError: a weight would overflow its dtype, or the region's proof fails; nothing is changed then.
    """
    site = heads.site
    source = as_source(site.source)
    if source is None or source.channels != site.channels:
        raise FoldError(f"{site.source.name!r} is no longer the source that was analysed")
    edit = Transaction(model.graph)
    key = heads.blocks.tobytes()
    writes: list[Write] = []
    for node, slot in filter(None, (source.weight, source.bias)):
        old = _numbers(node.inputs[slot])
        writes.append(edit.weight(node, slot, rotate_columns(old, heads.blocks, rotation), old, key))
    nodes = {node.name: node for node in model.graph}
    for sink in site.sinks:
        node = nodes[sink.linear]
        old = _numbers(node.inputs[1])
        rows = np.arange(len(old)).reshape(-1, heads.size)
        writes.append(edit.weight(node, 1, rotate_columns(old.T, rows, rotation).T, old, b"rows" + key))
    linears = [sink.linear for sink in site.sinks]
    proof = edit.apply(writes, lambda: region_outputs(model, site.boundary, linears, seed))
    sinks = (source.node.name or "", *linears)
    return FoldPlan("rotate", source.node.name or "", sinks, None, proof=proof, rotation=record(rotation))


def rotate_columns(array: Array, blocks: npt.NDArray[np.integer], rotation: Rotation) -> Array:
    """``array`` [..., channels] with the channels of each block multiplied by Q; float64."""
    wide = array.astype(np.float64)
    wide[..., blocks] = rotation(wide[..., blocks])
    return wide


def _head_size(value: ir.Value | None, source: ir.Value) -> int | None:
    """Width of what attention mixes on the way back from a sink's input to ``source``, if only layout is on it too."""
    size = None
    while value is not None and value is not source:
        node = value.producer()
        if node is None:
            return None
        if is_call(node, "Attention", "MaskedAttention"):
            value = node.inputs[2]
        elif node.op_type == "MatMul" and node.domain == "" and array_of(node.inputs[1]) is None:
            value = node.inputs[1]
        elif node.op_type in _LAYOUT and node.domain == "":
            value = node.inputs[0]
            continue
        else:
            return None
        width = value.shape[-1] if value is not None and value.shape is not None else None
        if size is not None or not isinstance(width, int):
            return None
        size = width
    return size


def _numbers(value: ir.Value | None) -> Array:
    array = array_of(value)
    if array is None:
        raise FoldError(f"{value.name if value is not None else 'an absent input'!r} is not a constant any more")
    return array
