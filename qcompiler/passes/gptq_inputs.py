"""What GPTQ knows of a Linear's inputs: which Linears read the same ones, and second moments of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.walk import Walk
from qcompiler.core import StatRequest
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.run import Feeds
from qcompiler.graph.weights import grid_of, on_integers
from qcompiler.numerics.grids import Grid

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments of what a Linear reads.

    Attributes:
        hessians: XᵀX for each fold of the samples, float64 [folds, in, in].
        cross: Xᵀ(F - X) of all samples, F what the Linear reads in the float model, float64 [in, in]; None: unknown.
    """

    hessians: npt.NDArray[np.float64]
    cross: npt.NDArray[np.float64] | None = None


class Inputs:
    """What each Linear reads, once those before it have been rounded, beside what it reads in the float model.

    Args:
        model: the model with fake-quants. Linears are asked for in its order, each before any that reads it is.
        float_model: the same graph without; None where there is none.
        batches: feeds of both.
        weight: of each batch.
    """

    def __init__(
        self, model: ir.Model, float_model: ir.Model | None, batches: Sequence[Feeds], weight: Sequence[float]
    ) -> None:
        self._walk = Walk(model, batches)
        self._weight = weight
        self._float_walk = None if float_model is None else Walk(float_model, batches)
        self._floats = {} if float_model is None else {linear.name: linear for linear in linears(float_model)}

    def in_order(self, groups: Iterable[list[Linear]]) -> list[list[Linear]]:
        return sorted(groups, key=lambda group: self._walk.place(read_by(group[0])))

    def moments(self, linear: Linear, folds: int) -> Moments:
        """The moments of one Linear's input.

        A batch's product is one of float32, half the time of float64; only sums over batches grow long.
        """
        size = linear.in_features
        hessians, cross = np.zeros((folds, size, size)), np.zeros((size, size))
        other = self._floats.get(linear.name)
        beside = None if other is None or self._float_walk is None else self._float_walk.rows(read_by(other))
        for (x, samples), weight in zip(self._walk.rows(read_by(linear)), self._weight, strict=True):
            for fold in range(folds):
                part = x[samples % folds == fold] if folds > 1 else x
                hessians[fold] += weight * (part.T @ part)
            if beside is not None:
                cross += weight * (x.T @ (next(beside)[0] - x))
        return Moments(hessians, None if beside is None else cross)


def quantized(model: ir.Model) -> list[Linear]:
    return [linear for linear in linears(model) if on_integers(linear)]


def read_by(linear: Linear) -> ir.Value:
    """What the MatMul reads: the fake-quantized value, if there is one."""
    read = linear.matmul.inputs[0]
    assert read is not None
    return read


def request(linear: Linear) -> StatRequest:
    return StatRequest(read_by(linear).name or "", "hessian", -1)


def together(candidates: Iterable[Linear]) -> list[list[Linear]]:
    """Linears in groups that are solved at once: those that read one value or, if they share weights, those."""
    shared: dict[ir.Value, list[Linear]] = {}
    for linear in candidates:
        shared.setdefault(linear.weight, []).append(linear)
    groups: dict[tuple[object, ...], list[Linear]] = {}
    for readers in shared.values():
        grid = given_grid(readers[0])
        layout = grid.low, grid.high, grid.group_size
        groups.setdefault((*dict.fromkeys(map(request, readers)), layout), []).extend(readers)
    return list(groups.values())


def spread_out(group: Sequence[Linear]) -> bool:
    """Whether its Linears read different values."""
    return len({request(linear) for linear in group}) > 1


def given_grid(linear: Linear) -> Grid:
    """The grid that stands in the graph."""
    assert linear.weight_quant is not None
    return grid_of(linear.weight_quant)
