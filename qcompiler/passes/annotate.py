"""annotate: decide what each Linear gets. Policy only: ``insert`` carries it out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from qcompiler.core import Note, StatRequest
from qcompiler.graph.linear import Linear, linears
from qcompiler.numerics.site_search import Choice, search_site
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.judging import by_input, holds, left_margin, quantized, reader, sample_request
from qcompiler.scheme import Scheme, TensorSpec

_WEIGHT, _ACTIVATION = "qcompiler.weight", "qcompiler.activation"


@dataclasses.dataclass(frozen=True)
class Annotate(Pass):
    """Give each Linear its specs, or a reason why it stays in float.

    A static min-max range gets the margin that calibration rows of other samples ask for. Where the scheme has a
    fallback and the static spec does not hold (see ``judging.holds``), the value gets the fallback: its outliers are
    tokens and not channels, which no scale by channel can even out.

    Attributes:
        rows: calibration rows each value is judged on.
    """

    name: ClassVar[str] = "annotate"
    rows: int = 512

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        if not self._judges(ctx.scheme):
            return []
        return [sample_request(linear, self.rows) for linear in quantized(model, ctx.scheme)]

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        notes = _reasons(model, ctx.scheme)
        for group in by_input(quantized(model, ctx.scheme)):
            spec, why = ctx.scheme.activation, ""
            if self._judges(ctx.scheme):
                spec, why = self._judge(group, stats, ctx)
            for linear in group:
                _leave(linear, ctx.scheme.weight, spec)
                if why:
                    notes.append(Note(linear.name, f"activation {spec}", why))
        return PassResult(True, tuple(notes))

    @staticmethod
    def _judges(scheme: Scheme) -> bool:
        """A static min-max range wants a margin, a fallback a decision."""
        spec = scheme.activation
        return spec is not None and not spec.dynamic and (spec.observer == "minmax" or scheme.fallback is not None)

    def _judge(self, group: Sequence[Linear], stats: Stats, ctx: Context) -> tuple[TensorSpec, str]:
        scheme = ctx.scheme
        assert scheme.activation is not None
        static = self._error(group, scheme.activation, stats, ctx)
        if scheme.fallback is not None and not holds(static.error, None):
            other = self._error(group, scheme.fallback, stats, ctx)
            if not holds(static.error, other.error):
                return scheme.fallback, (
                    f"error {static.error:.1e} static, {other.error:.1e} so: its outliers are tokens, not channels"
                )
        margin = left_margin(group) or static.margins[0]
        spec = scheme.activation
        if spec.observer == "minmax" and margin != 1:
            spec = dataclasses.replace(spec, observer=f"minmax{{margin={margin:g}}}")
        return spec, ""

    def _error(self, group: Sequence[Linear], spec: TensorSpec, stats: Stats, ctx: Context) -> Choice:
        return search_site(
            [reader(group, stats[sample_request(group[0], self.rows)], None, ctx.seed)],
            spec,
            ctx.scheme.weight,
            channels=group[0].in_features,
            alphas=(),
            reduce_range=ctx.capability.reduce_range,
        )


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
        Note(linear.name, "left in float", f"ignored by {glob!r}" if glob else "an output head; the scheme leaves it")
        for linear in linears(model)
        if linear.name not in chosen
        for glob in [scheme.ignored_by(linear.name)]
    ]
