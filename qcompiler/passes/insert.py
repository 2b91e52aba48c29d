"""insert: put a fake-quant where ``annotate`` said, on the weight and on the input of each Linear."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.core import Note, StatRequest
from qcompiler.graph.edit import add_initializer, array_of, first_of
from qcompiler.graph.functions import insert_call
from qcompiler.graph.linear import Linear, linears
from qcompiler.numerics.affine import quantize_weight, row_zero_point, scale_zero_point
from qcompiler.numerics.grids import weight_grid
from qcompiler.passes.annotate import annotated
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.float_weights import insert_codebook, insert_float, overflow
from qcompiler.passes.tables import insert_on_tables
from qcompiler.scheme import FLOATS, TensorSpec

_DYNAMIC = {
    "per_token": "FakeQuantPerToken",
    "per_tensor": "FakeQuantPerTensor",
    "per_group": "FakeQuantPerGroup",
}


@dataclasses.dataclass(frozen=True)
class Insert(Pass):
    """Simulate the integers in float: MatMul(FakeQuant(x), FakeQuant(W)).

    Weight scales come from the weight itself; static activation scales from the observer that the TensorSpec names. One
    fake-quant serves all Linears that read the same value with the same spec.
    """

    name: ClassVar[str] = "insert"
    by_weight: ClassVar[bool] = True

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        return [_request(linear, spec) for linear, _, spec in _quantized(model) if spec and not spec.dynamic]

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        ctx.float_model = model.clone()
        weights: dict[tuple[ir.Value, TensorSpec], ir.Value] = {}
        activations: dict[tuple[ir.Value, TensorSpec], ir.Value] = {}
        notes: list[Note] = []
        changed = False
        for linear, weight_spec, activation_spec in list(_quantized(model)):
            if linear.weight_quant is None:
                if (why := overflow(linear, weight_spec)) is not None:
                    notes.append(Note(linear.name, "left in float", why))
                    continue
                key = (linear.weight, weight_spec)
                if key not in weights:
                    weights[key] = _insert_on_weight(model, linear, weight_spec, ctx.capability.reduce_range)
                linear.matmul.replace_input_with(1, weights[key])
            if activation_spec is not None and linear.activation_quant is None:
                key = (linear.x, activation_spec)
                if key not in activations:
                    activations[key] = _insert_on_activation(model, linear, activation_spec, stats)
                linear.matmul.replace_input_with(0, activations[key])
            changed = True
        if ctx.scheme.embedding is not None:
            notes += insert_on_tables(model, ctx.scheme.embedding)
        return PassResult(changed or bool(notes), tuple(notes))


def _quantized(model: ir.Model) -> Iterator[tuple[Linear, TensorSpec, TensorSpec | None]]:
    for linear in linears(model):
        weight, activation = annotated(linear)
        wanting = linear.weight_quant is None or (activation is not None and linear.activation_quant is None)
        if weight is not None and wanting:
            yield linear, weight, activation


def _request(linear: Linear, spec: TensorSpec) -> StatRequest:
    return StatRequest(linear.x.name or "", spec.observer)


def _insert_on_weight(model: ir.Model, linear: Linear, spec: TensorSpec, reduce_range: bool) -> ir.Value:
    array = array_of(linear.weight)
    assert array is not None
    if spec.by_table:
        return insert_codebook(model, linear, spec, array)
    if spec.dtype in FLOATS:
        return insert_float(model, linear, spec)
    if spec.group_size is not None or spec.bits != 8 or not spec.symmetric:
        return _insert_blocks(model, linear, spec, array)
    _, scale = quantize_weight(array, spec, reduce_range)
    return _fake_quant(model, linear.matmul, linear.weight, scale, np.zeros(scale.shape, np.int8))


def _insert_blocks(model: ir.Model, linear: Linear, spec: TensorSpec, array: np.ndarray) -> ir.Value:
    """Blocks along the inputs; one scale an output channel is one block."""
    grid = weight_grid(array, spec)
    assert grid.scale is not None
    assert grid.zero_point is not None
    graph, name = model.graph, linear.weight.name
    shape = (-1, array.shape[1])
    scale, zero_point = (np.broadcast_to(a, (1, *a.shape)[-2:]) for a in (grid.scale, grid.zero_point))
    inputs = [
        linear.weight,
        add_initializer(graph, f"{name}_scale", scale.reshape(shape)),
        add_initializer(graph, f"{name}_zero_point", zero_point.reshape(shape)),
    ]
    attributes = {"block_size": grid.group_size or len(array), "low": float(grid.low), "high": float(grid.high)}
    return insert_call(model, linear.matmul, "FakeQuantBlocks", inputs, f"{name}_fake_quant", **attributes)


def _insert_on_activation(model: ir.Model, linear: Linear, spec: TensorSpec, stats: Stats) -> ir.Value:
    if spec.dynamic:
        function, name = _DYNAMIC[spec.granularity], f"{linear.x.name}_{spec.granularity}"
        options: dict[str, float] = {} if spec.group_size is None else {"block_size": spec.group_size}
        if spec.granularity == "per_token":
            options["zero_point"] = float(row_zero_point(spec))
        return insert_call(model, _first_reader(linear), function, [linear.x], name, **options)
    low, high = stats[_request(linear, spec)]
    scale, zero_point = scale_zero_point(low, high, spec)
    return _fake_quant(
        model,
        _first_reader(linear),
        linear.x,
        np.asarray(scale, np.float32),
        np.asarray(zero_point, np.dtype(spec.dtype)),
    )


def _first_reader(linear: Linear) -> ir.Node:
    """The first node in graph order that reads x, so that the shared fake-quant stands before all its readers."""
    graph = linear.matmul.graph
    assert isinstance(graph, ir.Graph)
    return first_of(graph, {node for node, _ in linear.x.uses()})


def _fake_quant(
    model: ir.Model,
    before: ir.Node,
    value: ir.Value,
    scale: np.ndarray,
    zero_point: np.ndarray,
) -> ir.Value:
    graph = model.graph
    inputs = [
        value,
        add_initializer(graph, f"{value.name}_scale", scale),
        add_initializer(graph, f"{value.name}_zero_point", zero_point),
    ]
    return insert_call(model, before, "FakeQuant", inputs, f"{value.name}_fake_quant", axis=1)
