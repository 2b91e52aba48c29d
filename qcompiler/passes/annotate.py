"""annotate: decide what each Linear gets. Policy only: ``insert`` carries it out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from qcompiler.core import Note, StatRequest
from qcompiler.graph.edit import array_of
from qcompiler.graph.heads import output_heads
from qcompiler.graph.linear import Linear, linears
from qcompiler.numerics.smoothing import site_error
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.scheme import Scheme, TensorSpec

_WEIGHT, _ACTIVATION = "qcompiler.weight", "qcompiler.activation"


@dataclasses.dataclass(frozen=True)
class Annotate(Pass):
    """Give each Linear its specs, or a reason why it stays in float.

    Where the scheme has a fallback, the static spec must hold at each value that Linears read: its output error there,
    measured on calibration rows, may exceed the fallback's by ``tolerance`` at most. It does not hold where the outliers are
    tokens and not channels, which no scale by channel can even out.

    Attributes:
        tolerance: largest ratio of static to fallback error (both squared, relative) at which static holds.
        floor: static error below which no ratio matters (1e-4: 40 dB).
        rows: calibration rows each value is judged on.
    """

    name: ClassVar[str] = "annotate"
    tolerance: float = 4.0
    floor: float = 1e-4
    rows: int = 512

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        if ctx.scheme.fallback is None:
            return []
        return [request for group in by_input(quantized(model, ctx.scheme)) for request in judged_on(group[0], self.rows)]

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        notes = list(_reasons(model, ctx.scheme))
        for group in by_input(quantized(model, ctx.scheme)):
            spec = ctx.scheme.activation
            if ctx.scheme.fallback is not None:
                spec, note = self._static_or_fallback(group, stats, ctx)
                notes += [dataclasses.replace(note, node=linear.name) for linear in group if note]
            for linear in group:
                _leave(linear, ctx.scheme.weight, spec)
        return PassResult(True, tuple(notes))

    def _static_or_fallback(
        self, group: Sequence[Linear], stats: Stats, ctx: Context
    ) -> tuple[TensorSpec | None, Note | None]:
        scheme = ctx.scheme
        static, fallback = (
            group_error(group, spec, stats, ctx, self.rows) for spec in (scheme.activation, scheme.fallback)
        )
        if self.holds(static, fallback):
            return scheme.activation, None
        why = f"static error {static:.1e} against {fallback:.1e}: its outliers are tokens, not channels"
        return scheme.fallback, Note("", f"activation {scheme.fallback}", why)

    def holds(self, static: float, fallback: float) -> bool:
        """Whether the static spec is good enough at a value, by its errors."""
        return static <= max(self.floor, self.tolerance * fallback)


def quantized(model: ir.Model, scheme: Scheme) -> list[Linear]:
    """The Linears that the scheme quantizes."""
    heads = set() if scheme.head else output_heads(model)
    return [linear for linear in linears(model) if not scheme.ignored_by(linear.name) and linear.name not in heads]


def by_input(group: Sequence[Linear]) -> list[list[Linear]]:
    """The Linears in groups that read one value: they share its quantization."""
    groups: dict[ir.Value, list[Linear]] = {}
    for linear in group:
        groups.setdefault(linear.x, []).append(linear)
    return list(groups.values())


def judged_on(linear: Linear, rows: int) -> tuple[StatRequest, StatRequest]:
    """The statistics of a Linear's input that :func:`group_error` reads: extremes by channel, and a sample of rows."""
    value = linear.x.name or ""
    return StatRequest(value, "minmax", -1), StatRequest(value, f"rows{{count={rows}}}", -1)


def annotated(linear: Linear) -> tuple[TensorSpec | None, TensorSpec | None]:
    """The specs of weight and activation that ``annotate`` left on a Linear; None stands for float."""
    weight, activation = (linear.matmul.metadata_props.get(key) for key in (_WEIGHT, _ACTIVATION))
    return (
        TensorSpec(**json.loads(weight)) if weight else None,
        TensorSpec(**json.loads(activation)) if activation else None,
    )


def _leave(linear: Linear, weight: TensorSpec, activation: TensorSpec | None) -> None:
    linear.matmul.metadata_props[_WEIGHT] = json.dumps(dataclasses.asdict(weight))
    if activation is not None:
        linear.matmul.metadata_props[_ACTIVATION] = json.dumps(dataclasses.asdict(activation))


def _reasons(model: ir.Model, scheme: Scheme) -> list[Note]:
    """Why the others stay in float."""
    chosen = {linear.name for linear in quantized(model, scheme)}
    return [
        Note(linear.name, "left in float", f"ignored by {glob!r}" if glob else "the output head, which the scheme leaves")
        for linear in linears(model)
        if linear.name not in chosen
        for glob in [scheme.ignored_by(linear.name)]
    ]


def group_error(
    group: Sequence[Linear], spec: TensorSpec | None, stats: Stats, ctx: Context, rows: int
) -> float:
    """Mean relative squared output error of Linears that read one value with its quantization ``spec``."""
    extremes, sample = judged_on(group[0], rows)
    low, high = stats[extremes]
    weights = [array for linear in group if (array := array_of(linear.weight)) is not None]
    error = site_error(
        stats[sample],
        weights,
        None,
        spec,
        ctx.scheme.weight,
        reduce_range=ctx.capability.reduce_range,
        low=low,
        high=high,
    )
    return error / len(weights)
