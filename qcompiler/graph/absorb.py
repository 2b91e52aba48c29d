"""Fold a scale and a shift by channel into weights, or insert them before Linears, proved on numbers each time.

The identity of SmoothQuant (Xiao et al. 2023, eq. 3) with the shift of Outlier Suppression+ (Wei et al. 2023, eq. 4):
``y = x W + b = ((x - z) / s) (diag(s) W) + (b + z W)``. The source gives ``(x - z) / s`` out of its own weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import FoldPlan, ModelError, OptionError, QCompilerError
from qcompiler.graph.edit import add_initializer, array_of, insert_node, unique_name, write_input
from qcompiler.graph.flow import FoldSite, Sink
from qcompiler.graph.linear import as_linear, linear_named
from qcompiler.graph.shapes import SIZES, Fact
from qcompiler.graph.sources import Source, as_source
from qcompiler.graph.verify import region_outputs, relative_error

Vector = npt.NDArray[np.float32]

_TOLERANCE = 64
"""How many units of rounding of the weights' dtype the proof may be off."""


class FoldError(QCompilerError):
    """A fold that would be wrong, or that cannot be proved; the model is as it was."""


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
    edit = _Edit(model.graph)
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
    edit = _Edit(model.graph)
    sinks = [Sink(name, np.arange(channels, dtype=np.int32)) for name in linears]

    def insert() -> None:
        order = {node: i for i, node in enumerate(model.graph)}
        first = min((linear.matmul for linear in readers), key=order.__getitem__)
        x = value
        if z.any():
            constant = add_initializer(model.graph, f"{value.name}.shift", _cast(z, dtype, "the shift"))
            x = edit.insert(first, "Sub", [x, constant], f"{value.name}.shifted", value)
        factor = add_initializer(model.graph, f"{value.name}.inverse_scale", _cast(1 / s, dtype, "1 / scale"))
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


Write = Callable[[], Any]


def _source_writes(edit: _Edit, source: Source, s: Vector, z: Vector) -> list[Write]:
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
        array = _cast(-z / s, ir.DataType.from_numpy(weight.dtype), f"the bias of {source.node.name!r}")
        writes.append(functools.partial(edit.create_bias, source.node, array))
    return writes


def _sink_writes(edit: _Edit, sinks: Sequence[Sink], s: Vector, z: Vector) -> list[Write]:
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
            array = _cast(moved, ir.DataType.from_numpy(weight.dtype), f"the bias of {sink.linear!r}")
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


def _cast(array: npt.NDArray[Any], dtype: ir.DataType, what: str) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype.numpy())
    if not np.isfinite(cast.astype(np.float64)).all():
        raise FoldError(f"{what} would overflow {dtype.name.lower()}")
    return cast


class _Edit:
    """Writes to one graph that are all kept or all undone."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.initializers = dict(graph.initializers)
        self.undo: list[Callable[[], None]] = []
        self.copies: dict[tuple[ir.Value, bytes], ir.Value] = {}
        self.epsilon = 0.0

    def apply(self, writes: Sequence[Write], outputs: Callable[[], dict[str, npt.NDArray[Any]]]) -> float:
        """Do the writes; the relative error of ``outputs`` by them. Where it is too large, undo and raise."""
        try:
            before = outputs()
            for write in writes:
                write()
            proof = relative_error(before, outputs())
        except ModelError as error:
            self.roll_back()
            raise FoldError(f"no proof, no fold: {error}") from error
        if not proof <= _TOLERANCE * self.epsilon:
            self.roll_back()
            raise FoldError(f"the fold changes the outputs of its region by {proof:.1e} of their largest")
        self.inherit_names()
        return proof

    def inherit_names(self) -> None:
        """A weight whose last reader went over to a copy is dropped, and the copy takes its name."""
        for (old, _), new in self.copies.items():
            name = old.name or ""
            if name in self.graph.initializers and self.graph.initializers[name] is old and not old.uses():
                self.graph.initializers.pop(name)
                new.name = name

    def roll_back(self) -> None:
        for step in reversed(self.undo):
            step()
        self.graph.initializers.clear()
        for value in self.initializers.values():
            self.graph.register_initializer(value)

    def weight(
        self, node: ir.Node, index: int, array: npt.NDArray[np.float32], old: npt.NDArray[Any], key: bytes = b""
    ) -> Write:
        """A write of ``array`` in the dtype of ``old``, checked for overflow now and done later.

        Nodes that read one weight and change it alike (a Linear called twice) share the new one: ``key`` tells them.
        """
        value = node.inputs[index]
        assert value is not None
        dtype = ir.DataType.from_numpy(old.dtype)
        cast = _cast(array, dtype, repr(value.name))
        self.epsilon = max(self.epsilon, _epsilon(dtype))

        def write() -> None:
            self.set_input(node, index, value)
            if key and (value, key) in self.copies:
                node.replace_input_with(index, self.copies[value, key])
            else:
                new = write_input(node, index, cast)
                new.metadata_props.update(value.metadata_props)
                self.copies[value, key] = new

        return write

    def set_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        old = node.inputs[index]
        self.undo.append(lambda: node.replace_input_with(index, old))
        node.replace_input_with(index, value)

    def insert(self, before: ir.Node, op_type: str, inputs: list[ir.Value], name: str, like: ir.Value) -> ir.Value:
        node = insert_node(self.graph, before, op_type, inputs, name=name, like=like)
        self.undo.append(lambda: self.graph.remove(node, safe=True))
        return node.outputs[0]

    def create_bias(self, node: ir.Node, array: npt.NDArray[Any]) -> None:
        """Give a LayerNormalization or a Linear without bias this one; the value that others read keeps its name."""
        bias = add_initializer(self.graph, f"{node.name}.bias", array)
        if node.op_type == "LayerNormalization":
            width = len(node.inputs)
            node.resize_inputs(3)
            self.undo.append(lambda: node.resize_inputs(width))
            node.replace_input_with(2, bias)
            return
        product = node.outputs[0]
        name = product.name or ""
        readers = list(product.uses())
        outputs = [i for i, output in enumerate(self.graph.outputs) if output is product]
        add = ir.node("Add", [product, bias], name=unique_name(self.graph, f"{node.name}.add"))
        add.outputs[0].type, add.outputs[0].shape = product.type, product.shape
        self.graph.insert_after(node, add)

        def read(value: ir.Value) -> None:
            for reader, index in readers:
                reader.replace_input_with(index, value)
            for i in outputs:
                self.graph.outputs[i] = value

        def undo() -> None:
            read(product)
            self.graph.remove(add, safe=True)
            product.name = name

        read(add.outputs[0])
        product.name = unique_name(self.graph, f"{name}.product")
        add.outputs[0].name = name
        self.undo.append(undo)


def _epsilon(dtype: ir.DataType) -> float:
    """Spacing of that floating-point type at 1, e.g. 2^-23 of float32."""
    return float(ml_dtypes.finfo(dtype.numpy()).eps)
