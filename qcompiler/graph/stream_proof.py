"""Proof on numbers that a rotated stream is the old one in another basis: end by end, in float64.

A stream is all that its ends write and read, and sums between them commute with any matrix; so it is enough that each
writer gives x C Q for what it gave before as x, and each reader gives for x C Q what it gave for x.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import ModelError
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import Linear, as_linear
from qcompiler.graph.residual import NormReader, Stream, Writer
from qcompiler.graph.stream_ends import norm_parts
from qcompiler.numerics.hadamard import Rotation

_ROWS = 8  # random inputs of each end
_SAMPLE = 64  # output features of a reader, rows of a table

Array = npt.NDArray[Any]


class StreamProof:
    """Called before and after the writes of a rotation: what its ends compute, in the new basis, by name."""

    def __init__(self, stream: Stream, rotation: Rotation, seed: int) -> None:
        self._stream, self._rotation, self._seed = stream, rotation, seed
        self._after = False
        self._bridges: dict[ir.Value, tuple[ir.Value, Array | None]] = {}

    def rotated(self) -> None:
        """From now on the graph is the rotated one."""
        self._after = True

    def bridged(self, value: ir.Value, weight: ir.Value, bias: Array | None) -> None:
        """A Linear with this weight was put behind ``value``."""
        self._bridges[value] = weight, bias

    def __call__(self) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for i, writer in enumerate(self._stream.writers):
            found[f"writer {i}"] = self._writer(writer)
        for i, reader in enumerate(self._stream.norms):
            found.update({f"reader {i} {name}": array for name, array in self._reader(reader).items()})
        return found

    def _new_basis(self, x: Array) -> Array:
        return self._rotation(x - x.mean(-1, keepdims=True) if self._stream.centred else x)

    def _writer(self, writer: Writer) -> Array:
        rng = np.random.default_rng(self._seed)
        node = writer.node
        if node is None:
            x = rng.standard_normal((_ROWS, self._stream.channels))
            return x @ _double(self._bridges[writer.value][0]) if self._after else self._new_basis(x)
        if writer.kind == "linear":
            linear = as_linear(node)
            assert linear is not None
            made = _apply(linear, rng.standard_normal((_ROWS, linear.in_features)), np.arange(linear.out_features))
        elif writer.kind == "table":
            table = node.inputs[0]
            rows = array_of(table)
            if rows is None:
                raise ModelError("a table of the stream is not a constant any more")
            made = rows[rng.choice(len(rows), min(_SAMPLE, len(rows)), replace=False)].astype(np.float64)
        elif writer.kind == "conv":
            bias = _double(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0.0
            made = np.moveaxis(_double(node.inputs[1]), 0, -1) + bias
        else:
            constant = _double(node.inputs[writer.slot])
            made = np.broadcast_to(constant, (*constant.shape[:-1], self._stream.channels))
        return np.asarray(made if self._after else self._new_basis(made))

    def _reader(self, reader: NormReader) -> dict[str, Array]:
        rng = np.random.default_rng(self._seed)
        x = rng.standard_normal((_ROWS, self._stream.channels)) + 0.5  # a mean to take away
        y = _norm(reader.node, self._new_basis(x) if self._after else x)
        found = {}
        for linear in reader.linears:
            columns = np.arange(linear.out_features)
            if len(columns) > _SAMPLE:
                columns = rng.choice(len(columns), _SAMPLE, replace=False)
            now = as_linear(linear.matmul)
            assert now is not None
            found[f"linear {linear.name}"] = _apply(now, y, columns)
        for i, value in enumerate(reader.bridges):
            weight, bias = self._bridges.get(value, (None, None))
            z = y if weight is None else y @ _double(weight)
            found[f"bridge {i}"] = z if bias is None else z + bias
        return found


def _norm(node: ir.Node, x: Array) -> Array:
    weight, bias, epsilon = norm_parts(node)
    if node.op_type == "LayerNormalization":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * _double(weight)
    return np.asarray(y if bias is None else y + _double(bias))


def _apply(linear: Linear, x: Array, columns: Array) -> Array:
    """The Linear's output on x for some of its output features."""
    weight = array_of(linear.weight)
    if weight is None:
        raise ModelError(f"the weight of {linear.name!r} is not a constant any more")
    y = x @ weight[:, columns].astype(np.float64)
    return np.asarray(y if linear.bias is None else y + _double(linear.bias)[columns])


def _double(value: ir.Value | None) -> Array:
    array = array_of(value)
    if array is None:
        raise ModelError(f"{value.name if value is not None else 'an absent input'!r} is not a constant any more")
    return array.astype(np.float64)
