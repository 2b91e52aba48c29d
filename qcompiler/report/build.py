"""Build the report of one compile from the graphs before and after, the decisions, and a measurement."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import onnx_ir as ir

from qcompiler.core import Executable, FoldPlan, Note
from qcompiler.graph.functions import is_call
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.run import Feeds
from qcompiler.report.data import LinearRow, Report
from qcompiler.report.errors import LayerError, layer_errors, output_errors
from qcompiler.scheme import TensorSpec

SAMPLES = 32
"""Calibration samples that errors are measured on: SQNR over some thousand tokens moves by less than 0.2 dB."""


class CoverageLike(Protocol):
    """What was read back from the optimised graph (``targets.ort.readback.Coverage``)."""

    @property
    def body(self) -> float | None: ...
    @property
    def head(self) -> float | None: ...
    @property
    def kernels(self) -> Mapping[str, str]: ...


def build(
    *,
    float_model: ir.Model,
    quantized_model: ir.Model,
    lowered_model: ir.Model,
    transformed_model: ir.Model | None = None,
    notes: Sequence[Note] = (),
    plans: Sequence[FoldPlan] = (),
    coverage: CoverageLike | None = None,
    batches: Iterable[Feeds] | None = None,
    seconds: Mapping[str, float] | None = None,
    samples: int = SAMPLES,
    threads: int = 0,
    executable: Executable | None = None,
) -> Report:
    """Measure and tell.

    Args:
        float_model: the canonical float graph; outputs and size are compared with it.
        quantized_model: the canonical graph after ``fold``, before lowering.
        lowered_model: what the target made of it; its outputs are measured.
        transformed_model: the float graph just before ``insert``, with smooth's folds applied; with it the error of
            each Linear alone is told beside the accumulated one. None: ``float_model`` serves.
        notes, plans: what passes and target decided.
        coverage: the read-back of the optimised graph.
        batches: calibration feeds; None: nothing is measured.
        seconds: wall seconds of the stages so far.
        samples: how many calibration samples to measure on.
        threads: intra-op threads of the measurement.
        executable: what runs in place of ``lowered_model``, where the target made something else than a graph.
    """
    errors: dict[str, LayerError] = {}
    outputs: dict[str, float] = {}
    seen = 0
    if batches is not None:
        errors, seen = layer_errors(transformed_model or float_model, quantized_model, batches, samples, threads)
        outputs = output_errors(float_model, executable or lowered_model, batches, samples, threads)
    kernels = coverage.kernels if coverage is not None else {}
    rows = tuple(
        linear_row(linear, errors.get(linear.name), kernels, notes, plans) for linear in linears(quantized_model)
    )
    return Report(
        rows=rows,
        size_before=initializer_bytes(float_model),
        size_after=initializer_bytes(lowered_model),
        coverage_body=coverage.body if coverage is not None else None,
        coverage_head=coverage.head if coverage is not None else None,
        output_sqnr_db=outputs,
        samples=seen,
        seconds=dict(seconds or {}),
        peak_rss=peak_rss(),
        notes=tuple(notes),
    )


def initializer_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the main graph."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def peak_rss() -> int:
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def linear_row(
    linear: Linear,
    error: LayerError | None,
    kernels: Mapping[str, str],
    notes: Sequence[Note],
    plans: Sequence[FoldPlan],
) -> LinearRow:
    """What the fake-quant graph and the decisions say of one Linear."""
    quantized = linear.weight_quant is not None
    return LinearRow(
        name=linear.name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        weight=_weight_spec(linear) if quantized else "float",
        activation=_activation_spec(linear),
        kernel=kernels.get(linear.name, "MatMul" if not quantized else ""),
        transform=transform_of(linear, notes, plans),
        sqnr_db=error.accumulated if error is not None else None,
        alone_db=error.alone if error is not None else None,
        reason="" if quantized else _reason(linear, notes),
    )


def _annotated(linear: Linear, which: str) -> str | None:
    """The spec that ``annotate`` left on the MatMul, spelled; None where there is none."""
    text = linear.matmul.metadata_props.get(f"qcompiler.{which}")
    return str(TensorSpec(**json.loads(text))) if text and text.startswith("{") else None


def _weight_spec(linear: Linear) -> str:
    if spelled := _annotated(linear, "weight"):
        return spelled
    assert linear.weight_quant is not None
    scale = linear.weight_quant.inputs[1]
    rank = len(scale.shape) if scale is not None and scale.shape is not None else 0
    dtype = str(linear.weight.dtype).lower() if linear.weight.dtype is not None else "int8"
    return f"{dtype if 'int' in dtype else 'int8'} {'per_channel' if rank else 'per_tensor'} static"


def _activation_spec(linear: Linear) -> str:
    """What the graph says; the annotation is asked for its words only where there is a fake-quant."""
    quant = linear.activation_quant
    if quant is None:
        return "float"
    if spelled := _annotated(linear, "activation"):
        return spelled
    if is_call(quant, "FakeQuantPerToken"):
        return "uint8 per_token dynamic"
    if is_call(quant, "FakeQuantPerTensor"):
        return "uint8 per_tensor dynamic"
    zero_point = quant.inputs[2]
    dtype = str(zero_point.dtype).lower() if zero_point is not None and zero_point.dtype is not None else "uint8"
    return f"{dtype} per_tensor static"


def transform_of(linear: Linear, notes: Sequence[Note], plans: Sequence[FoldPlan]) -> str:
    """The plans that scaled this Linear's weight, each with why; why its input got another spec than the scheme's."""
    parts = folds_of(linear.name, plans)
    parts += [f"{n.what}: {n.why}" for n in notes if n.node == linear.name and n.what.startswith("activation ")]
    return "; ".join(parts)


def folds_of(name: str, plans: Sequence[FoldPlan]) -> list[str]:
    """What transforms did to the weight of the Linear of that name, each with why."""
    parts = []
    for plan in plans:
        if name in plan.sinks:
            what = " and ".join(word for word, v in (("scale", plan.scale), ("shift", plan.shift)) if v is not None)
            did = f"{plan.kind} {what}" if what else plan.kind
            parts.append(f"{did} at {plan.source}{': ' if plan.why else ''}{plan.why}")
    return parts


def _reason(linear: Linear, notes: Sequence[Note]) -> str:
    own = [note for note in notes if note.node == linear.name]
    said = next((note for note in own if "float" in note.what), own[-1] if own else None)
    return said.why if said is not None else "no pass of the pipeline quantizes it"
