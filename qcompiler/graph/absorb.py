"""Fold a scale and a shift by channel into weights, or insert them before Linears, proved on numbers each time.

The identity of SmoothQuant (Xiao et al. 2023, eq. 3) with the shift of Outlier Suppression+ (Wei et al. 2023, sec. 4):
``y = x W + b = ((x - z) / s) (diag(s) W) + (b + z W)``. The source gives ``(x - z) / s`` out of its own weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import FoldPlan, OptionError
from qcompiler.graph.edit import add_initializer, array_of
from qcompiler.graph.fold_site import FoldSite, Sink
from qcompiler.graph.linear import as_linear, linear_named
from qcompiler.graph.shapes import SIZES, Fact
from qcompiler.graph.sources import Source, as_source
from qcompiler.graph.transaction import FoldError, Transaction, Write, checked_cast
from qcompiler.graph.verify import region_outputs

Vector = npt.NDArray[np.float32]


def fold(
    model: ir.Model,
    site: FoldSite,
    scale: npt.ArrayLike | None = None,
    shift: npt.ArrayLike | None = None,
    *,
    seed: int = 0,
) -> FoldPlan:
    """Let the site's source give (x - shift) / scale and its sinks undo it; the outputs stay what they were.

    Weights are written copy-on-write: other uses of a shared initializer keep the old numbers. Channels that the site
    blocks are left alone (scale 1, shift 0), whatever is asked for them; the plan holds what was really applied.

    Args:
        scale: [channels], finite and > 0; None: ones.
        shift: [channels], finite; None: zeros.
        seed: of the proof's random inputs.

    Raises:
        OptionError: scale or shift has another shape, is not finite, or scale is not positive.
        FoldError: every channel is blocked, a weight would overflow its dtype, or the region's proof fails.
    """
    s, z = _vectors(scale, shift, site.channels)
    s = np.where(site.scale_blocked, np.float32(1), s)
    z = np.where(site.shift_blocked, np.float32(0), z)
    source = as_source(site.source)
    if source is None or source.channels != site.channels:
        raise FoldError(f"{site.source.name!r} is no longer the source that was analysed")
    if not (s != 1).any() and not z.any():
        whys = "; ".join(dict.fromkeys(note.why for note in site.blockers)) or "scale is 1 and shift is 0 throughout"
        raise FoldError(f"nothing to fold at {site.source.name!r}: {whys}")
    edit = Transaction(model.graph)
    writes = [*_source_writes(edit, source, s, z), *_sink_writes(edit, site.sinks, s, z)]
    linears = [sink.linear for sink in site.sinks]
    proof = edit.apply(writes, lambda: region_outputs(model, site.boundary, linears, seed))
    return FoldPlan("fold", source.node.name or "", tuple(linears), s, z if z.any() else None, proof)


def insert_scale(
    model: ir.Model,
    value: ir.Value,
    linears: Sequence[str],
    scale: npt.ArrayLike,
    shift: npt.ArrayLike | None = None,
    *,
    seed: int = 0,
) -> FoldPlan:
    """Put Sub(shift) and Mul(1 / scale) between ``value`` and these Linears, which absorb the inverse.

    Other readers keep ``value`` as it is: for sites where folding is illegal (post-LN: the residual reads the norm).

    Raises:
        OptionError: scale or shift is not usable, or one of the Linears does not read ``value``.
        FoldError: a weight would overflow its dtype, or the proof fails.
    """
    readers = [linear_named(model, name) for name in linears]
    if not readers or any(linear.x is not value or linear.weight_quant is not None for linear in readers):
        raise OptionError(f"not all of {', '.join(linears) or 'no Linear'} read {value.name!r} with float weights")
    channels = readers[0].in_features
    s, z = _vectors(scale, shift, channels)
    rank = len(value.shape) if value.shape is not None else 3
    dtype = readers[0].weight.dtype
    assert dtype is not None
    boundary = {value.name or "": Fact((*SIZES[: rank - 1], channels), dtype)}
    edit = Transaction(model.graph)
    sinks = [Sink(name, np.arange(channels, dtype=np.int32)) for name in linears]

    def insert() -> None:
        order = {node: i for i, node in enumerate(model.graph)}
        first = min((linear.matmul for linear in readers), key=order.__getitem__)
        x = value
        if z.any():
            constant = add_initializer(model.graph, f"{value.name}.shift", checked_cast(z, dtype, "the shift"))
            x = edit.insert(first, "Sub", [x, constant], f"{value.name}.shifted", value)
        factor = add_initializer(model.graph, f"{value.name}.inverse_scale", checked_cast(1 / s, dtype, "1 / scale"))
        x = edit.insert(first, "Mul", [x, factor], f"{value.name}.scaled", value)
        for linear in readers:
            edit.set_input(linear.matmul, 0, x)

    writes = [insert, *_sink_writes(edit, sinks, s, z)]
    proof = edit.apply(writes, lambda: region_outputs(model, boundary, list(linears), seed))
    return FoldPlan("insert", value.name or "", tuple(linears), s, z if z.any() else None, proof)


def _vectors(scale: npt.ArrayLike | None, shift: npt.ArrayLike | None, channels: int) -> tuple[Vector, Vector]:
    s = np.ones(channels, np.float32) if scale is None else np.asarray(scale, dtype=np.float32)
    z = np.zeros(channels, np.float32) if shift is None else np.asarray(shift, dtype=np.float32)
    if s.shape != (channels,) or z.shape != (channels,):
        raise OptionError(f"scale and shift must have the source's {channels} channels, not {s.shape} and {z.shape}")
    if not (np.isfinite(s).all() and (s > 0).all() and np.isfinite(1 / s).all()):
        raise OptionError("scale must be finite and greater than 0 in every channel (a dead channel takes 1)")
    if not np.isfinite(z).all():
        raise OptionError("shift must be finite in every channel")
    return s, z


def _source_writes(edit: Transaction, source: Source, s: Vector, z: Vector) -> list[Write]:
    node, index = source.weight
    weight = _numbers(node.inputs[index])
    writes: list[Write] = [edit.weight(node, index, weight.astype(np.float32) / s, weight)]
    if source.bias is not None:
        add, slot = source.bias
        bias = _numbers(add.inputs[slot])
        writes.append(edit.weight(add, slot, (bias.astype(np.float32) - z) / s, bias))
    elif z.any():
        if source.no_shift:
            raise FoldError(f"{source.node.name!r} cannot absorb a shift: {source.no_shift}")
        array = checked_cast(-z / s, ir.DataType.from_numpy(weight.dtype), f"the bias of {source.node.name!r}")
        writes.append(functools.partial(edit.create_bias, source.node, array))
    return writes


def _sink_writes(edit: Transaction, sinks: Sequence[Sink], s: Vector, z: Vector) -> list[Write]:
    writes: list[Write] = []
    nodes = {node.name: node for node in edit.graph}
    for sink in sinks:
        matmul = nodes[sink.linear]
        weight = _numbers(matmul.inputs[1])
        rows = np.append(s, np.float32(1))[sink.columns]  # column -1 reads the 1 at the end
        writes.append(edit.weight(matmul, 1, weight.astype(np.float32) * rows[:, None], weight, rows.tobytes()))
        offset = np.append(z, np.float32(0))[sink.columns]
        linear = as_linear(matmul)
        if not offset.any():
            continue
        if linear is None:
            raise FoldError(f"{sink.linear!r} cannot absorb a shift: its weight has more than two axes")
        moved = (offset.astype(np.float64) @ weight.astype(np.float64)).astype(np.float32)
        if linear.add is None:
            array = checked_cast(moved, ir.DataType.from_numpy(weight.dtype), f"the bias of {sink.linear!r}")
            writes.append(functools.partial(edit.create_bias, matmul, array))
        else:
            slot = next(i for i, value in enumerate(linear.add.inputs) if value is linear.bias)
            bias = _numbers(linear.bias)
            writes.append(edit.weight(linear.add, slot, bias.astype(np.float32) + moved, bias))
    return writes


def _numbers(value: ir.Value | None) -> npt.NDArray[Any]:
    array = array_of(value)
    if array is None:
        raise FoldError(f"{value.name if value is not None else 'an absent input'!r} is not a constant any more")
    return array
