"""annotate: decide what each Linear gets. Policy only: ``insert`` carries it out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from qcompiler.core import Note, StatRequest
from qcompiler.graph.linear import Linear
from qcompiler.numerics.site_search import Choice, search_site
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.judging import (
    FallbackRule,
    by_input,
    decision,
    leave_decision,
    left_in_float,
    quantized,
    reader,
    sample_request,
    why_fallback,
)
from qcompiler.scheme import TensorSpec

_WEIGHT = "qcompiler.weight"


@dataclasses.dataclass(frozen=True)
class Annotate(Pass):
    """Give each Linear its specs, or a reason why it stays in float.

    A static min-max range gets the margin that calibration rows of other samples ask for. Where the scheme has a
    fallback and that pays (see ``judging.FallbackRule``), the value gets it: outliers that are tokens and not channels
    no scale by channel can even out.

    Attributes:
        rows: calibration rows each value is judged on.
    """

    name: ClassVar[str] = "annotate"
    rows: int = 512

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        if not self._judges(ctx):
            return []
        return [sample_request(linear, self.rows) for linear in quantized(model, ctx.scheme) if not decision(linear)]

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        notes = left_in_float(model, ctx.scheme)
        chosen = quantized(model, ctx.scheme)
        if ctx.scheme.activation is not None:
            rule = FallbackRule(model, ctx.scheme, ctx.capability)
            for group in by_input([linear for linear in chosen if not decision(linear)]):
                spec, why = self._judge(group, stats, rule, ctx) if self._judges(ctx) else (ctx.scheme.activation, "")
                leave_decision(group, spec, why)
        for linear in chosen:
            if _WEIGHT not in linear.matmul.metadata_props:
                leave_weight(linear, ctx.scheme.weight_of(linear.name))
            spec_and_why = decision(linear)
            if spec_and_why is not None and spec_and_why[1]:
                notes.append(Note(linear.name, f"activation {spec_and_why[0]}", spec_and_why[1]))
        return PassResult(True, tuple(notes))

    @staticmethod
    def _judges(ctx: Context) -> bool:
        """A static min-max range wants a margin, an asymmetric per-token scale a zero point, a fallback a decision."""
        spec = ctx.scheme.activation
        if spec is None:
            return False
        if spec.dynamic:
            return (
                ctx.collect is not None
                and spec.granularity == "per_token"
                and not spec.symmetric
                and spec.zero_point is None
            )
        return spec.observer == "minmax" or ctx.scheme.fallback is not None

    def _judge(self, group: Sequence[Linear], stats: Stats, rule: FallbackRule, ctx: Context) -> tuple[TensorSpec, str]:
        scheme = ctx.scheme
        assert scheme.activation is not None
        static = self._error(group, scheme.activation, stats, ctx)
        if scheme.fallback is not None and rule.may_pay([group], static.error):
            other = self._error(group, scheme.fallback, stats, ctx)
            if rule.pays([group], static.error, other.error):
                return _settled(other), why_fallback(static.error, other.error)
        return _settled(static), ""

    def _error(self, group: Sequence[Linear], spec: TensorSpec, stats: Stats, ctx: Context) -> Choice:
        return search_site(
            [reader(group, stats[sample_request(group[0], self.rows)], None, ctx.scheme, ctx.seed)],
            spec,
            ctx.scheme.weight,
            channels=group[0].in_features,
            alphas=(),
            reduce_range=ctx.capability.reduce_range,
        )


def leave_weight(linear: Linear, spec: TensorSpec) -> None:
    """Write on a Linear how its weight is to be quantized; what is there already, ``annotate`` leaves."""
    linear.matmul.metadata_props[_WEIGHT] = json.dumps(dataclasses.asdict(spec))


def _settled(choice: Choice) -> TensorSpec:
    (spec,) = choice.specs
    assert spec is not None
    return spec


def annotated(linear: Linear) -> tuple[TensorSpec | None, TensorSpec | None]:
    """The specs of weight and activation that ``annotate`` left on a Linear; None stands for float."""
    weight, activation = linear.matmul.metadata_props.get(_WEIGHT), decision(linear)
    return TensorSpec(**json.loads(weight)) if weight else None, activation[0] if activation else None
