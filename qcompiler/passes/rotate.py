"""rotate: QuaRot's offline rotations (Ashkboos et al. 2024), kept where they lower the quantization error.

A Hadamard rotation of the residual stream spreads outlier channels over all channels before every norm, for nothing:
the weights on both sides absorb it. The same is done to each attention head between v and o. Streams and heads are
found by data flow; what cannot be rotated is told with its reason.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qcompiler.core import FoldPlan, Note, StatRequest
from qcompiler.graph.flow import analyse
from qcompiler.graph.head_rotation import head_site, rotate_heads
from qcompiler.graph.residual import Stream, find_streams
from qcompiler.graph.rotation import rotate_stream
from qcompiler.graph.transaction import FoldError
from qcompiler.numerics.hadamard import make_rotation
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.judging import quantized, rows_request
from qcompiler.passes.rotation_gate import Gate, Verdict


@dataclasses.dataclass(frozen=True)
class Rotate(Pass):
    """Rotate residual streams and attention heads by randomised Hadamard matrices, offline.

    Attributes:
        residual: rotate residual streams.
        heads: rotate each head between v and o.
        random_signs: randomise the matrices' signs, from the run's seed.
        bridges: a stream whose ends are no Linears (an embedding's norm, the output itself) gets Linears of channels x
            channels there, if they add at most this share of multiplications to its own.
        gate: keep a rotation only where it lowers the held-out error of the Linears that it touches: of a stream as a
            whole, of each head site alone. None: true, but for calibrated weights of fewer than 8 bits with one scale
            an output channel and inputs in float. There GPTQ comes after, and the errors of rounding foretell nothing:
            summed over SmolLM2 and stories260k they rise, in full ranges, in clipped ones and by what GPTQ leaves of
            them (QuIP's theorem 1), and perplexity falls from 34.3 to 32.0 and from 3.817 to 3.806.
        gain: the factor by which it must lower it. A small gain in the sum is not one of the model: on SmolLM2, all
            static, smoothed both times, a rotated stream lowers the sum by 2 % and raises perplexity from 1.030 to
            1.050 of fp32's, because the inputs of the first layers' Linears, whose errors all others inherit, lose.
        smoothed: let the gate judge either side at its best smoothing scale, as pass ``smooth`` would then find it.
        rows: calibration rows the gate judges on.
    """

    name: ClassVar[str] = "rotate"
    float_exact: ClassVar[bool] = True
    residual: bool = True
    heads: bool = True
    random_signs: bool = True
    bridges: float = 0.1
    gate: bool | None = None
    gain: float = 1.1
    smoothed: bool = True
    rows: int = 512

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        if not self._judges(ctx):
            return []
        streams = [s for s in find_streams(model) if not self._refused(s)] if self.residual else []
        norms = [norm.node.inputs[0] for stream in streams for norm in stream.norms]
        wanted = [rows_request(value, self.rows) for value in norms if value is not None]
        read = {linear.name for stream in streams for norm in stream.norms for linear in norm.linears}
        written = {linear.name for stream in streams for linear in stream.linears} - read
        for linear in quantized(model, ctx.scheme):
            if linear.name in written or (self.heads and linear.name not in read):
                wanted.append(rows_request(linear.x, self.rows))
        return list(dict.fromkeys(wanted))

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        notes: list[Note] = []
        plans: list[FoldPlan] = []
        gate = Gate(model, stats, ctx, self.rows, self.smoothed) if self._judges(ctx) else None
        if self.residual:
            self._rotate_streams(model, gate, ctx, notes, plans)
        if self.heads:
            self._rotate_heads(model, gate, ctx, notes, plans)
        return PassResult(bool(plans), tuple(notes), tuple(plans))

    def _judges(self, ctx: Context) -> bool:
        if self.gate is not None:
            return self.gate
        weight = ctx.scheme.weight
        by_channel = weight.granularity == "per_channel" and weight.bits < 8
        return not (by_channel and ctx.scheme.activation is None and ctx.data is not None)

    def _refused(self, stream: Stream) -> str:
        if stream.refused:
            return stream.refused
        if stream.bridge_cost > self.bridges:
            return (
                f"{len(stream.bridges)} of its ends are no Linears: Linears of {stream.channels} x {stream.channels} "
                f"there would add {stream.bridge_cost:.0%} of its multiplications"
            )
        return ""

    def _rotate_streams(
        self, model: ir.Model, gate: Gate | None, ctx: Context, notes: list[Note], plans: list[FoldPlan]
    ) -> None:
        for stream in find_streams(model):
            if why := self._refused(stream):
                notes.append(Note(stream.name, "residual stream not rotated", why))
                continue
            rotation = make_rotation(stream.channels, ctx.seed, self.random_signs)
            verdict = gate.stream(stream, rotation) if gate is not None else None
            if verdict is not None and not verdict.gains(self.gain):
                notes.append(Note(stream.name, "residual stream not rotated", f"no gain: {verdict}"))
                continue
            try:
                plan = rotate_stream(model, stream, rotation, seed=ctx.seed)
            except FoldError as error:
                notes.append(Note(stream.name, "residual stream not rotated", str(error)))
                continue
            plans.append(dataclasses.replace(plan, why=_why(verdict)))
            notes.append(Note(stream.name, f"residual stream of {stream.channels} channels rotated", _why(verdict)))

    def _rotate_heads(
        self, model: ir.Model, gate: Gate | None, ctx: Context, notes: list[Note], plans: list[FoldPlan]
    ) -> None:
        for flow in analyse(model):
            site = head_site(model, flow)
            if site is None:
                continue
            name = flow.source.name or ""
            rotation = make_rotation(site.size, ctx.seed, self.random_signs)
            verdict = gate.heads(site, rotation) if gate is not None else None
            if verdict is not None and not verdict.gains(self.gain):
                notes.append(Note(name, "heads not rotated", f"no gain: {verdict}"))
                continue
            try:
                plan = rotate_heads(model, site, rotation, seed=ctx.seed)
            except FoldError as error:
                notes.append(Note(name, "heads not rotated", str(error)))
                continue
            plans.append(dataclasses.replace(plan, why=_why(verdict)))
            notes.append(Note(name, f"{len(site.blocks)} heads of {site.size} channels rotated", _why(verdict)))


def _why(verdict: Verdict | None) -> str:
    return str(verdict) if verdict is not None else "not judged"
