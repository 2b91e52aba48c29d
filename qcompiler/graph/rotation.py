"""Rotate a residual stream, or the heads between two Linears, offline: into the weights, proved on numbers each time.

QuaRot (Ashkboos et al. 2024, section 4) and SliceGPT (Ashkboos et al. 2024, section 3.2): with x' = x C Q, where Q is
orthogonal and C = I - 11ᵀ/n takes the mean away (LayerNormalization only), rms(x') = rms(x C); so a norm without
weights gives n' = n Q, and a Linear that reads γ·n + β takes W' = Qᵀ diag(γ) W and b' = b + βW.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import DOMAIN, FoldPlan
from qcompiler.graph.edit import add_initializer, array_of, unique_name
from qcompiler.graph.functions import ensure_function
from qcompiler.graph.linear import Linear, as_linear
from qcompiler.graph.residual import NormReader, Stream, Writer
from qcompiler.graph.stream_ends import norm_parts
from qcompiler.graph.stream_proof import StreamProof
from qcompiler.graph.transaction import FoldError, Transaction, Write, checked_cast
from qcompiler.numerics.hadamard import Rotation

Array = npt.NDArray[Any]


def rotate_stream(model: ir.Model, stream: Stream, rotation: Rotation, *, seed: int = 0) -> FoldPlan:
    """Multiply everything that writes the stream by Q and everything that reads it by Qᵀ; outputs stay what they were.

    Weights are written copy-on-write; norms lose their weights to the Linears behind them, and a LayerNormalization
    becomes an RMSNorm of the same output name. Each of ``stream.bridges`` gets a Linear of channels x channels.

    Args:
        stream: of :func:`qcompiler.graph.residual.find_streams`, of this model as it stands.
        seed: of the proof's random inputs.

    Raises:
        FoldError: the stream is refused, a weight would overflow its dtype, or the proof fails; nothing is changed.
    """
    if stream.refused:
        raise FoldError(f"the stream at {stream.name!r} cannot be rotated: {stream.refused}")
    proof = StreamProof(stream, rotation, seed)
    edit = _Rotation(model.graph, stream, rotation, proof)
    try:
        error = edit.apply(edit.writes(), proof)
    except FoldError:
        edit.roll_back()
        raise
    ensure_function(model, "RMSNorm")
    sinks = tuple(dict.fromkeys(linear.name for linear in stream.linears))
    return FoldPlan("rotate", stream.name, sinks, None, proof=error, rotation=record(rotation))


def record(rotation: Rotation) -> npt.NDArray[np.float32]:
    """What makes a rotation again: its signs where it is the Hadamard matrix of its size, else itself."""
    return (rotation.signs if rotation.exact else rotation.matrix()).astype(np.float32)


def centred(x: Array) -> Array:
    """x C: without its mean over the last axis."""
    return np.asarray(x - x.mean(-1, keepdims=True))


class _Rotation(Transaction):
    """The writes of one stream. Each reads its weight when it is its turn: copies are made one at a time."""

    def __init__(self, graph: ir.Graph, stream: Stream, rotation: Rotation, proof: StreamProof) -> None:
        super().__init__(graph)
        self.stream, self.rotation, self.proof = stream, rotation, proof

    def roll_back(self) -> None:
        super().roll_back()
        self.undo.clear()  # a write that refuses is rolled back by the caller, a proof that fails by ``apply``

    def writes(self) -> list[Write]:
        writes: list[Write] = [functools.partial(self._writer, writer) for writer in self.stream.writers]
        for norm in self.stream.norms:
            writes.append(functools.partial(self._norm, norm))
        return [*writes, self.proof.rotated]

    def _written(self, array: Array) -> Array:
        """What writes the stream, along its last axis, in the new basis; float64."""
        wide = array.astype(np.float64)
        return self.rotation(centred(wide) if self.stream.centred else wide)

    def _write(self, node: ir.Node, slot: int, change: Callable[[Array], Array], key: bytes = b"") -> None:
        old = _numbers(node.inputs[slot])
        self.weight(node, slot, change(old.astype(np.float64)), old, key)()

    def _writer(self, writer: Writer) -> None:
        if writer.kind == "bridge":
            matrix = self._written(np.eye(self.stream.channels))
            uses, outputs = list(writer.value.uses()), _outputs(self.graph, writer.value)
            self._bridge(writer.value, matrix, None, uses, outputs, "rotate")
            return
        node, n = writer.node, self.stream.channels
        assert node is not None
        if writer.kind == "conv":
            self._write(node, 1, lambda w: np.moveaxis(self._written(np.moveaxis(w, 0, -1)), -1, 0), b"conv")
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                self._write(node, 2, self._written, b"written")
        elif writer.kind == "constant":
            self._write(node, writer.slot, lambda c: self._written(np.broadcast_to(c, (*c.shape[:-1], n))))
        else:
            self._write(node, writer.slot, self._written, b"written")
            linear = as_linear(node)
            if linear is not None and linear.bias is not None:
                self._write(*bias_slot(linear), self._written, b"written")

    def _norm(self, reader: NormReader) -> None:
        node = reader.node
        weight, bias, _ = norm_parts(node)
        gamma = _numbers(weight).astype(np.float64)
        beta = _numbers(bias).astype(np.float64) if bias is not None else np.zeros_like(gamma)
        for linear in reader.linears:
            self._read(linear.matmul, gamma, beta)
        unrotate = self.rotation(np.diag(gamma)).T
        for value in reader.bridges:
            kept = {linear.matmul for linear in reader.linears}
            uses = [use for use in value.uses() if use[0] not in kept and use[0] not in self._carriers(reader)]
            self._bridge(value, unrotate, beta if beta.any() else None, uses, _outputs(self.graph, value), "unrotate")
        self._without_weights(node, len(gamma))

    def _carriers(self, reader: NormReader) -> set[ir.Node]:
        """Nodes that carry the norm's output on: to Linears that read it rotated, or to bridges of their own."""
        ends = [*(linear.x for linear in reader.linears), *reader.bridges]
        found: set[ir.Node] = set()
        for value in ends:
            while value is not reader.node.outputs[0]:
                node = value.producer()
                assert node is not None
                assert node.inputs[0] is not None
                found.add(node)
                value = node.inputs[0]
        return found

    def _read(self, matmul: ir.Node, gamma: Array, beta: Array) -> None:
        moved = beta @ _numbers(matmul.inputs[1]).astype(np.float64)
        self._write(matmul, 1, lambda w: self.rotation((gamma[:, None] * w).T).T, gamma.tobytes())
        linear = as_linear(matmul)
        if linear is None or not beta.any():
            return
        if linear.bias is not None:
            self._write(*bias_slot(linear), lambda b: b + moved)
        else:
            dtype = linear.weight.dtype
            assert dtype is not None
            self.create_bias(matmul, checked_cast(moved, dtype, f"the bias of {linear.name!r}"))

    def _without_weights(self, node: ir.Node, channels: int) -> None:
        """RMSNorm with a weight of ones, in the node's place."""
        _, _, epsilon = norm_parts(node)
        old = _numbers(node.inputs[1])
        self.weight(node, 1, np.ones(channels, np.float32), old)()
        if node.op_type == "RMSNorm":
            return
        inputs, attributes = list(node.inputs), dict(node.attributes)

        def undo() -> None:
            node.resize_inputs(len(inputs))
            node.op_type, node.domain = "LayerNormalization", ""
            for i, value in enumerate(inputs[2:], start=2):
                node.replace_input_with(i, value)
            node.attributes.clear()
            node.attributes.update(attributes)

        node.resize_inputs(2)
        node.resize_outputs(1)
        node.op_type, node.domain = "RMSNorm", DOMAIN
        node.attributes.clear()
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
        self.undo.append(undo)

    def _bridge(
        self,
        value: ir.Value,
        matrix: Array,
        bias: Array | None,
        uses: Sequence[tuple[ir.Node, int]],
        outputs: list[int],
        verb: str,
    ) -> None:
        """Put a Linear between ``value`` and these uses of it; a graph output gives its name to the Linear's."""
        graph, name = self.graph, value.name or ""
        dtype = value.dtype or ir.DataType.FLOAT
        made = []
        weight = add_initializer(graph, f"{name}.{verb}.weight", checked_cast(matrix, dtype, f"a bridge at {name!r}"))
        made.append(ir.node("MatMul", [value, weight], name=unique_name(graph, f"{name}.{verb}")))
        if bias is not None:
            added = add_initializer(graph, f"{name}.{verb}.bias", checked_cast(bias, dtype, f"a bridge at {name!r}"))
            made.append(ir.node("Add", [made[0].outputs[0], added], name=unique_name(graph, f"{name}.{verb}.add")))
        for node in made:
            node.outputs[0].name = unique_name(graph, node.name or "")
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        producer = value.producer()
        if producer is not None:
            graph.insert_after(producer, made)
        else:
            graph.insert_before(next(iter(graph)), made)
        end = made[-1].outputs[0]
        own = end.name

        def read(new: ir.Value) -> None:
            for node, slot in uses:
                node.replace_input_with(slot, new)
            for i in outputs:
                graph.outputs[i] = new

        def undo() -> None:
            read(value)
            end.name, value.name = own, name
            graph.remove(list(reversed(made)), safe=True)

        read(end)
        if outputs:
            value.name = unique_name(graph, f"{name}.rotated")
            end.name = name
        self.undo.append(undo)
        self.proof.bridged(value, weight, bias)


def bias_slot(linear: Linear) -> tuple[ir.Node, int]:
    """The Add behind a Linear that has a bias, and which of its inputs the bias is."""
    assert linear.add is not None
    return linear.add, next(i for i, value in enumerate(linear.add.inputs) if value is linear.bias)


def _outputs(graph: ir.Graph, value: ir.Value) -> list[int]:
    return [i for i, output in enumerate(graph.outputs) if output is value]


def _numbers(value: ir.Value | None) -> Array:
    array = array_of(value)
    if array is None:
        raise FoldError(f"{value.name if value is not None else 'an absent input'!r} is not a constant any more")
    return array
