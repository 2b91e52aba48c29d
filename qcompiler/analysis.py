"""analyze(): where a quantized model's error comes from, layer by layer."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qcompiler.core import OptionError, unknown
from qcompiler.frontends.data import Batches
from qcompiler.graph.linear import linears
from qcompiler.graph.run import Feeds
from qcompiler.numerics.metrics import RowSumsMeter
from qcompiler.options import Options
from qcompiler.quantize import Quantized, Request, run_passes
from qcompiler.report.analysis import CUSTOM, METRICS, Analysis, Errors, Layer
from qcompiler.report.build import linear_row
from qcompiler.report.custom import Metric, custom_errors, metric_name
from qcompiler.report.errors import error_meters, fixed_batch, sliced
from qcompiler.report.ranges import measure_sites
from qcompiler.report.side_by_side import ACCUMULATED, ALONE, OUTPUT
from qcompiler.scheme import Scheme
from qcompiler.spelling import spell


def analyze(
    model: Any,
    *,
    scheme: str | Scheme = "w8a8",
    target: str = "ort-cpu",
    calibration: Any = None,
    data: Any = None,
    passes: str | None = None,
    ignore: Sequence[str] = (),
    bits: Mapping[str, int | str] | None = None,
    metric: str | Metric = "sqnr",
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    seed: int = 0,
    limit: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Analysis:
    """Quantize as :func:`compile` does, up to the fake-quant graph, and compare every Linear with its float twin.

    The float twin is that of the transformed graph, which computes the same function: a rotated or smoothed output is
    compared with the same output in float.

    Args:
        model, scheme, target, calibration, passes, ignore, bits, example_inputs, dynamic_shapes, seed, limit, seq_len,
            batch_size, trust_remote_code, progress: as of :func:`compile`; ``limit``, ``seq_len`` and ``batch_size``
            hold for ``data`` too. The target says what kernels there are; nothing is lowered to it.
        data: what to measure on, in any form of ``calibration``; None: the calibration data.
        metric: what to rank and plot layers by: "sqnr" (dB), "mse", "cosine", or a callable of the float and the
            quantized output, float32 [rows, channels] each, that returns a number, larger being worse. It is called for
            each Linear on some hundred rows (tokens) at a time, and averaged over rows; about 256 MB of outputs are
            held at once, and one more run over the data is made for each such part of the model.

    Returns:
        Errors of each Linear, alone and accumulated; ranges and outlier channels of each site before and after the
        transforms; errors of the model's outputs. ``to_text()`` is JSON, ``to_html()`` a page with plots.

    Raises:
        QCompilerError: one of its kinds, with one sentence, where model, data or options cannot be used.
    """
    options = Options(
        scheme=scheme,
        target=target,
        calibration=calibration,
        passes=passes,
        ignore=ignore,
        bits=bits,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        seed=seed,
        limit=limit,
        seq_len=seq_len,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return analyze_as(model, options, data, metric)


def analyze_as(model: Any, options: Options, data: Any = None, metric: str | Metric = "sqnr") -> Analysis:
    """:func:`analyze` with its options as one value."""
    if not callable(metric) and metric not in METRICS:
        raise unknown("metric", str(metric), METRICS)
    if options.calibration is None and data is None:
        raise OptionError("there is nothing to measure on: give calibration data, or data= (--data).")
    asked = Request.of(options)
    stages = asked.stages
    ready = run_passes(model, asked)
    batches = ready.batches if data is None else asked.data(data, ready.source)
    assert batches is not None
    work = ready.work
    with stages("ranges"):
        sites = measure_sites(ready.float_model, work.transformed, batches, work.notes, work.plans, options.progress)
    slices = _Slices(batches, fixed_batch(ready.float_model))
    with stages("errors"):
        meters, samples = error_meters(work.transformed, work.model, slices, cosine=True, outputs=True)
    own: dict[tuple[str, str], float] = {}
    if callable(metric):
        with stages("metric"):
            own = custom_errors(work.transformed, work.model, slices, metric)
    errors = {key: _errors(meter, own.get(key)) for key, meter in meters.items()}
    read = {name: site.name for site in sites for name in site.linears}
    return Analysis(
        model=ready.source.name,
        kind=ready.source.kind,
        scheme=asked.scheme.name,
        passes=",".join(spell(item.name, item) for item in asked.passes),
        metric=CUSTOM if callable(metric) else metric,
        metric_name=metric_name(metric) if callable(metric) else metric,
        samples=samples,
        layers=_layers(ready, read, errors),
        sites=sites,
        outputs={name: figures for (name, kind), figures in errors.items() if kind == OUTPUT},
    )


def _layers(ready: Quantized, read: dict[str, str], errors: dict[tuple[str, str], Errors]) -> tuple[Layer, ...]:
    notes = (*ready.source.notes, *ready.work.notes)
    return tuple(
        Layer(
            row=dataclasses.replace(linear_row(linear, None, {}, notes, ready.work.plans), kernel=""),
            site=read.get(linear.name, ""),
            alone=errors.get((linear.name, ALONE)),
            accumulated=errors.get((linear.name, ACCUMULATED)),
        )
        for linear in linears(ready.work.model)
    )


def _errors(meter: RowSumsMeter, custom: float | None) -> Errors:
    return Errors(meter.mse, meter.db, meter.cosine, custom)


@dataclasses.dataclass(frozen=True)
class _Slices:
    """All batches cut into runs of some hundred rows (where the model lets them), as often as they are read."""

    batches: Batches
    whole: bool

    def __iter__(self) -> Iterator[Feeds]:
        return sliced(self.batches, sys.maxsize, total=sys.maxsize, whole=self.whole)
