"""Whether a rotation pays: held-out errors of the Linears that it touches, before and after, from rows alone.

A rotation of rows is x Q, so that nothing has to run again. The exact ranges of the calibration data are of the
unrotated channels; both sides are therefore judged with the ranges of the sampled rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.observers.folds import FoldSample
from qcompiler.graph.edit import array_of
from qcompiler.graph.head_rotation import HeadSite, rotate_columns
from qcompiler.graph.linear import linear_named
from qcompiler.graph.residual import NormReader, Stream
from qcompiler.graph.stream_ends import norm_parts
from qcompiler.numerics.hadamard import Rotation
from qcompiler.numerics.site_judge import Reader
from qcompiler.numerics.site_search import ALPHAS, search_site
from qcompiler.passes.base import Context, Stats
from qcompiler.passes.judging import holds, quantized, rows_request, sampled_outputs
from qcompiler.scheme import TensorSpec

_OUTPUTS = 512  # output features that a site is judged on at most

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Sums over sites of the relative squared error of their outputs, before and after a rotation."""

    before: float
    after: float

    def gains(self, factor: float) -> bool:
        """Whether the sum falls by that factor at least."""
        return self.after * factor <= self.before and self.after < self.before

    def __str__(self) -> str:
        return f"summed error {self.before:.2e} -> {self.after:.2e}"


class Gate:
    """Judges rotations on samples of a model that nothing has rotated yet."""

    def __init__(self, model: ir.Model, stats: Stats, ctx: Context, rows: int, smoothed: bool) -> None:
        self._model, self._stats, self._ctx, self._rows = model, stats, ctx, rows
        self._alphas = ALPHAS if smoothed else ()
        self._quantized = {linear.name for linear in quantized(model, ctx.scheme)}

    def stream(self, stream: Stream, rotation: Rotation) -> Verdict:
        """Readers of the stream with their activations, writers by their weights alone: their inputs stay the same."""
        before = after = 0.0
        for norm in stream.norms:
            plain, rotated = self._reader(norm, rotation)
            before, after = before + plain, after + rotated
        for writer in stream.writers:
            if writer.linear is None or writer.linear.name not in self._quantized:
                continue
            sample = self._sample(writer.linear.x)
            weight = _numbers(writer.linear.weight)
            centred = weight - weight.mean(1, keepdims=True) if stream.centred else weight
            before += self._error(sample.rows, sample.fold, self._columns(weight), None)
            after += self._error(sample.rows, sample.fold, self._columns(rotation(centred)), None)
        return Verdict(before, after)

    def heads(self, heads: HeadSite, rotation: Rotation) -> Verdict:
        """The Linears behind attention, which read the rotated heads."""
        before = after = 0.0
        for sink in heads.site.sinks:
            if sink.linear not in self._quantized:
                continue
            linear = linear_named(self._model, sink.linear)
            sample, weight = self._sample(linear.x), self._columns(_numbers(linear.weight))
            blocks = np.arange(len(weight)).reshape(-1, heads.size)
            before += self._activated(sample.rows, sample.fold, weight)
            rows = rotate_columns(sample.rows, blocks, rotation).astype(np.float32)
            after += self._activated(rows, sample.fold, rotate_columns(weight.T, blocks, rotation).T.astype(np.float32))
        return Verdict(before, after)

    def _reader(self, norm: NormReader, rotation: Rotation) -> tuple[float, float]:
        """Errors of all Linears behind one norm, before and after."""
        read = [linear for linear in norm.linears if linear.name in self._quantized]
        x = norm.node.inputs[0]
        if not read or x is None:
            return 0.0, 0.0
        sample = self._sample(x)
        weight, bias, epsilon = norm_parts(norm.node)
        gamma = _numbers(weight)
        rows = sample.rows.astype(np.float64)
        if norm.node.op_type == "LayerNormalization":
            rows -= rows.mean(-1, keepdims=True)
        rows /= np.sqrt((rows**2).mean(-1, keepdims=True) + epsilon)
        normed = rows.astype(np.float32)
        readers = self._columns(np.concatenate([_numbers(linear.weight) for linear in read], axis=1))
        plain = normed * gamma if bias is None else normed * gamma + _numbers(bias)
        return (
            self._activated(plain, sample.fold, readers),
            self._activated(rotation(normed), sample.fold, rotation((gamma[:, None] * readers).T).T),
        )

    def _activated(self, rows: Array, fold: Array, weight: Array) -> float:
        """The error with the activation that the scheme would give the site."""
        scheme = self._ctx.scheme
        error = self._error(rows, fold, weight, scheme.activation)
        if scheme.fallback is None or holds(error, None):
            return error
        other = self._error(rows, fold, weight, scheme.fallback)
        return error if holds(error, other) else other

    def _error(self, rows: Array, fold: Array, weight: Array, activation: TensorSpec | None) -> float:
        _, fold = np.unique(fold, return_inverse=True)
        parts = [rows[fold == number] for number in range(fold.max() + 1)]
        low, high = (np.stack([extreme(part) for part in parts]) for extreme in (_low, _high))
        reader = Reader(rows, fold, low, high, np.ascontiguousarray(weight), np.arange(len(weight), dtype=np.int32))
        return search_site(
            [reader],
            activation,
            self._ctx.scheme.weight,
            channels=len(weight),
            alphas=self._alphas if activation is not None else (),
            reduce_range=self._ctx.capability.reduce_range,
        ).error

    def _sample(self, value: ir.Value) -> FoldSample:
        sample: FoldSample = self._stats[rows_request(value, self._rows)]
        return sample

    def _columns(self, weight: Array) -> Array:
        return weight if weight.shape[1] <= _OUTPUTS else sampled_outputs(weight, _OUTPUTS, self._ctx.seed)


def _low(rows: Array) -> Array:
    return np.asarray(rows.min(0))


def _high(rows: Array) -> Array:
    return np.asarray(rows.max(0))


def _numbers(value: ir.Value | None) -> Array:
    array = array_of(value)
    assert array is not None
    return array.astype(np.float32)
