"""equalize: cross-layer equalization (Nagel et al. 2019, section 4.1), folded where flow analysis finds it legal.

Between a Linear and the Linears that read it through layout, a ReLU or an attention product, each channel is scaled so
that both weights have the same range there. It is made for weights with one scale a tensor; with one scale an output
channel only the sinks and their inputs notice. So it is judged at each site, and often refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.observers.folds import FoldSample
from qcompiler.core import FoldPlan, Note, StatRequest
from qcompiler.graph.absorb import FoldError, fold
from qcompiler.graph.edit import array_of
from qcompiler.graph.flow import analyse
from qcompiler.graph.fold_site import FoldSite
from qcompiler.graph.linear import Linear
from qcompiler.numerics.affine import fake_quantize_dynamic, integer_range, scale_zero_point
from qcompiler.numerics.equalization import channel_absmax, equalization_scale
from qcompiler.numerics.smoothing import rounded_weight
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.judging import quantized, sample_request
from qcompiler.scheme import TensorSpec

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Equalize(Pass):
    """Even out the channels of neighbouring Linears' weights where that lowers their error; runs before ``smooth``.

    Attributes:
        gain: factor by which the sum of the source's and the sinks' relative squared errors must fall, on rows that did
            not set the ranges.
        rows: calibration rows each site is judged on.
    """

    name: ClassVar[str] = "equalize"
    float_exact: ClassVar[bool] = True
    gain: float = 1.02
    rows: int = 512

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        return [sample_request(linear, self.rows) for _, group in _sites(model, ctx) for linear in group]

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        notes: list[Note] = []
        plans: list[FoldPlan] = []
        touched: set[str] = set()
        for site, (source, *sinks) in _sites(model, ctx):
            if touched & {linear.name for linear in (source, *sinks)}:
                notes.append(Note(source.name, "not equalized", "a Linear of this site is at another one already"))
                continue
            scale = _scale(site, source, sinks)
            plain, error = (self._error(site, source, sinks, s, stats, ctx) for s in (np.ones_like(scale), scale))
            told = f"error {plain:.1e} -> {error:.1e}"
            if not error * self.gain < plain:
                notes.append(Note(source.name, "not equalized", f"no gain worth it: {told}"))
                continue
            try:
                plan = fold(model, site, scale, seed=ctx.seed)
            except FoldError as refused:
                notes.append(Note(source.name, "not equalized", str(refused)))
                continue
            touched |= {linear.name for linear in (source, *sinks)}
            notes.append(Note(source.name, "equalized", told))
            plans.append(dataclasses.replace(plan, why=f"equalized: {told}"))
        return PassResult(bool(plans), tuple(notes), tuple(plans))

    def _error(
        self, site: FoldSite, source: Linear, sinks: list[Linear], scale: Array, stats: Stats, ctx: Context
    ) -> float:
        """Relative squared error of the source's output and of each sink's, summed."""
        reduced = ctx.capability.reduce_range
        total = 0.0
        columns = {sink.linear: sink.columns for sink in site.sinks}
        for linear in (source, *sinks):
            weight = _numbers(linear)
            sample: FoldSample = stats[sample_request(linear, self.rows)]
            if linear is source:
                ones = np.ones(len(weight), np.float32)
                total += _relative_error(sample, weight / scale, ones, scale, ctx.scheme.activation, ctx, reduced)
            else:
                s = np.append(scale, np.float32(1))[columns[linear.name]]
                total += _relative_error(sample, weight, s, np.ones(1, np.float32), ctx.scheme.activation, ctx, reduced)
        return total


def _relative_error(
    sample: FoldSample, weight: Array, s: Array, out: Array, spec: TensorSpec | None, ctx: Context, reduced: bool
) -> float:
    """‖(Q(x / s) Q(s W) - x W) · out‖² / ‖x W · out‖², each row judged with a range of other folds."""
    rounded = rounded_weight(weight * s[:, None], ctx.scheme.weight, reduced)
    noise = signal = 0.0
    folds = np.arange(len(sample.low))
    for fold_number in folds:
        held = sample.rows[sample.fold == fold_number]
        others = folds != fold_number if len(folds) > 1 else folds == fold_number
        x = held / s
        low, high = (sample.low[others] / s).min(), (sample.high[others] / s).max()
        exact = (held @ weight) * out
        got = (_quantized_input(x, float(low), float(high), spec) @ rounded) * out
        noise += float(np.square(got - exact).sum())
        signal += float(np.square(exact).sum())
    return noise / signal if signal else 0.0


def _quantized_input(x: Array, low: float, high: float, spec: TensorSpec | None) -> Array:
    if spec is None:
        return x
    if spec.dynamic:
        return fake_quantize_dynamic(x, spec)
    scale, zero_point = scale_zero_point(low, high, spec)
    q_low, q_high = (q - int(zero_point) for q in integer_range(spec))
    return np.asarray(np.clip(np.rint(x / scale), q_low, q_high) * scale)


def _sites(model: ir.Model, ctx: Context) -> Iterator[tuple[FoldSite, list[Linear]]]:
    """Foldable sites whose source and sinks are quantized Linears; with the source, then the sinks."""
    chosen = {linear.name: linear for linear in quantized(model, ctx.scheme)}
    for site in analyse(model):
        names = [site.source.name or "", *(sink.linear for sink in site.sinks)]
        if site.kind == "linear" and site.foldable and all(name in chosen for name in names):
            yield site, [chosen[name] for name in names]


def _scale(site: FoldSite, source: Linear, sinks: list[Linear]) -> npt.NDArray[np.float32]:
    columns = {sink.linear: sink.columns for sink in site.sinks}
    reached = channel_absmax([(_numbers(sink), columns[sink.name]) for sink in sinks], site.channels)
    scale = equalization_scale(np.abs(_numbers(source)).max(0), reached)
    return np.where(site.scale_blocked, np.float32(1), scale)


def _numbers(linear: Linear) -> npt.NDArray[np.float32]:
    array = array_of(linear.weight)
    assert array is not None
    return np.asarray(array, np.float32)
