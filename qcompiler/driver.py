"""compile(): the one place that wires a run together."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler import passes as pass_table
from qcompiler.core import (
    Capability,
    ModelError,
    OptionError,
    TargetError,
    spell,
)
from qcompiler.frontends import Source, open_data, open_source
from qcompiler.frontends.data import Batches
from qcompiler.graph.linear import linears
from qcompiler.passes.base import Context, Pass
from qcompiler.passes.pipeline import Pipeline
from qcompiler.report import build as build_report
from qcompiler.report.stages import Stages
from qcompiler.runtime.artefact import refuse_existing
from qcompiler.runtime.compiled import CompiledModel
from qcompiler.runtime.recipe import RECIPE_VERSION
from qcompiler.scheme import Scheme, resolve
from qcompiler.targets import make_target
from qcompiler.targets.ort.readback import integer_coverage


def compile(
    model: Any,
    *,
    scheme: str | Scheme = "w8a8",
    target: str = "ort-cpu",
    calibration: Any = None,
    output: str | os.PathLike[str] | None = None,
    passes: str | None = None,
    ignore: Sequence[str] = (),
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    seed: int = 0,
    limit: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    force: bool = False,
    dump: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> CompiledModel:
    """Quantize a float Transformer and lower it to integer operators.

    Args:
        model: torch.nn.Module, torch.export.ExportedProgram, path of an ``.onnx`` file or of a Hugging Face folder,
            onnx.ModelProto, or onnx_ir.Model. It is not changed.
        scheme: a preset's name (``qcompiler.scheme.PRESETS``) or a Scheme.
        target: "ort-cpu", "onnx" or "onnx{form=qoperator}".
        calibration: any iterable of dicts / tuples of arrays or tensors, a DataLoader, an ``.npz``, a text file, a list
            of sentences, or a folder of images. Dynamic schemes run without it (and without ``split`` and ``smooth``).
        output: a folder to save to; it must not exist, unless ``force``.
        passes: the pipeline as text, e.g. ``"smooth{alpha=0.5},annotate,insert,fold"``; None: the scheme's own.
        ignore: globs over Linear names that stay in float.
        example_inputs, dynamic_shapes: for torch modules where they cannot be derived.
        seed: for every random choice.
        limit, seq_len: how many calibration samples, of how many tokens.
        batch_size: samples in one run; None: 1 for a causal language model, else 8.
        dump: a folder where the model is saved after every pass.
        trust_remote_code: let a Hugging Face folder run its own code.
        progress: show what is going on, on stderr.

    Returns:
        The compiled model with its report.

    Raises:
        QCompilerError: one of its kinds, with one sentence, where model, data or options cannot be used.
    """
    chosen = resolve(scheme, tuple(ignore))
    backend = make_target(target)
    capability = backend.capability()
    check_target(chosen, capability)
    if output is not None:
        refuse_existing(Path(output), force)
    stages = Stages(progress)
    ready = run_passes(
        model,
        chosen,
        capability,
        stages,
        calibration=calibration,
        passes=passes,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        seed=seed,
        limit=limit,
        seq_len=seq_len,
        batch_size=batch_size,
        dump=dump,
        trust_remote_code=trust_remote_code,
    )
    source, batches, work = ready.source, ready.batches, ready.work
    canonical_quantized = work.model.clone()
    with stages("lower"):
        lowered = backend.lower(work.model)
        coverage = integer_coverage(work.model, lowered, canonical_quantized)
    with stages("report"):
        report = build_report(
            float_model=ready.float_model,
            transformed_model=work.transformed,
            quantized_model=canonical_quantized,
            lowered_model=work.model,
            notes=(*source.notes, *work.notes, *lowered.notes),
            plans=tuple(work.plans),
            coverage=coverage,
            batches=batches,
            seconds=stages.seconds,
        )
    compiled = CompiledModel(
        model=work.model,
        recipe=_recipe(source, chosen, ready.passes, target, backend.tables(), batches, seed),
        report=report,
        plans=tuple(work.plans),
        tokenizer=source.tokenizer,
    )
    if output is not None:
        compiled.save(output, force=force)
    return compiled


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What :func:`run_passes` leaves.

    Attributes:
        source: the opened model.
        batches: its calibration data, or None.
        passes: what ran after ``normalise``.
        float_model: the canonical float graph, before any of them.
        work: the fake-quant graph (``work.model``), the float graph that it is compared with, notes and plans.
    """

    source: Source
    batches: Batches | None
    passes: Sequence[Pass]
    float_model: ir.Model
    work: Pipeline


def run_passes(
    model: Any,
    scheme: Scheme,
    capability: Capability,
    stages: Stages,
    *,
    calibration: Any = None,
    passes: str | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    seed: int = 0,
    limit: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    dump: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> Quantized:
    """Open a model and its data and run the pipeline up to the fake-quant graph; arguments as of :func:`compile`."""
    spelled = passes if passes is not None else default_passes(scheme, calibration is not None)
    pipeline = pass_table.parse_pipeline(spelled)
    with stages("open"):
        source = open_source(
            model,
            example_inputs=example_inputs,
            dynamic_shapes=dynamic_shapes,
            trust_remote_code=trust_remote_code,
        )
        batches = None
        if calibration is not None:
            batches = open_data(calibration, source, limit=limit, seq_len=seq_len, batch_size=batch_size)
    work = Pipeline(
        source.model,
        batches,
        Context(scheme, capability, seed),
        stages=stages,
        progress=stages.progress,
        dump=Path(dump) if dump is not None else None,
    )
    work.apply(pass_table.make_pass("normalise", {}))
    if not linears(work.model):
        raise ModelError(
            f"{source.name} has no Linear (MatMul or Gemm with a constant 2-D weight): nothing to quantize."
        )
    _check_ignore(work.model, scheme)
    canonical_float = work.model.clone()
    for item in pipeline:
        work.apply(item)
    return Quantized(source, batches, pipeline, canonical_float, work)


def default_passes(scheme: Scheme, calibrated: bool) -> str:
    """The pipeline of a scheme: ``split`` and ``smooth`` need calibration data, and activations that are quantized."""
    quantize = "annotate,insert,fold"
    return f"split,smooth,{quantize}" if calibrated and scheme.activation is not None else quantize


def check_target(scheme: Scheme, capability: Capability) -> None:
    """Refuse a scheme that no kernel of the target runs."""
    for spec in (scheme.activation, *([scheme.fallback] if scheme.fallback is not None else [])):
        if not capability.runs(scheme.weight, spec):
            offered = ", ".join(dict.fromkeys(kernel.name for kernel in capability.kernels))
            raise TargetError(
                f"target {capability.target!r} cannot run scheme {scheme.name!r}: none of its kernels ({offered}) "
                f"takes weight {scheme.weight} with activation {spec or 'float'}."
            )


def _check_ignore(model: ir.Model, scheme: Scheme) -> None:
    """An ignore glob that matches nothing is a mistake the user wants to hear of."""
    names = [linear.name for linear in linears(model)]
    for glob in scheme.ignore:
        if not fnmatch.filter(names, glob):
            raise OptionError(
                f"ignore={glob!r} matches no Linear; their names look like {names[0]!r} (qcompiler inspect lists them)."
            )


def _recipe(
    source: Source,
    scheme: Scheme,
    pipeline: Sequence[Pass],
    target: str,
    tables: Mapping[str, str],
    batches: Batches | None,
    seed: int,
) -> dict[str, Any]:
    """What makes this artefact again, as JSON-ready data; the same input gives the same recipe."""
    return {
        "version": RECIPE_VERSION,
        "qcompiler": version("qcompiler"),
        "source": {"name": source.name, "kind": source.kind, "sha256": source.sha256},
        "scheme": scheme.to_json(),
        "passes": ",".join(spell(item.name, item) for item in pipeline),
        "target": target,
        "tables": dict(tables),
        "seed": seed,
        "calibration": {"samples": batches.samples} if batches is not None else None,
    }
