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
from qcompiler.budget import Budget, check_budget
from qcompiler.core import (
    Capability,
    ModelError,
    OptionError,
    TargetError,
    spell,
)
from qcompiler.frontends import Source, open_data, open_source
from qcompiler.frontends.data import Batches
from qcompiler.frontends.holdout import hold_back
from qcompiler.frontends.inputs import Inputs
from qcompiler.graph.linear import linears
from qcompiler.passes.base import Context, Pass
from qcompiler.passes.pipeline import Pipeline
from qcompiler.report import build as build_report
from qcompiler.report.stages import Stages
from qcompiler.runtime.artefact import refuse_existing
from qcompiler.runtime.compiled import CompiledModel
from qcompiler.runtime.drop import MaxDrop, float_outputs
from qcompiler.runtime.recipe import RECIPE_VERSION
from qcompiler.scheme import Scheme, resolve
from qcompiler.targets import make_target
from qcompiler.targets.base import Coverage, Lowered


def compile(
    model: Any,
    *,
    scheme: str | Scheme = "w8a8",
    target: str = "ort-cpu",
    calibration: Any = None,
    output: str | os.PathLike[str] | None = None,
    passes: str | None = None,
    ignore: Sequence[str] = (),
    max_drop: Any = None,
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
        target: "ort-cpu", "onnx", "onnx{form=qoperator}" or "tvm-llvm".
        calibration: any iterable of dicts / tuples of arrays or tensors, a DataLoader, an ``.npz``, a text file, a list
            of sentences, or a folder of images. Dynamic schemes run without it (without ``split`` and ``adaptive``).
        output: a folder to save to; it must not exist, unless ``force``.
        passes: the pipeline as text, e.g. ``"smooth{alpha=0.5},annotate,insert,fold"``; None: the scheme's own.
        ignore: globs over Linear names that stay in float.
        max_drop: what may be lost at most, as one metric and its limit: ``{"sqnr": 26}`` (dB at least),
            ``{"cosine": 0.002}`` (1 - cosine), ``{"kl": 0.01}`` (nats a token), ``{"perplexity": 0.01}`` (relative
            increase), or ``(callable, limit)``: the callable takes float outputs, quantized outputs and feeds of one
            batch and returns what it loses. Each site is then static, dynamic, in groups or float, as fast as the limit
            allows. A quarter of the calibration samples is held back, and the limit holds on it with a margin.
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
    allowed = MaxDrop.parse(max_drop) if max_drop is not None else None
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
        allowed=allowed,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        seed=seed,
        limit=limit,
        seq_len=seq_len,
        batch_size=batch_size,
        dump=dump,
        trust_remote_code=trust_remote_code,
    )
    source, batches = ready.source, ready.batches

    def finish(work: Pipeline) -> _Finished:
        quantized = work.model.clone()
        with stages("lower"):
            lowered = backend.lower(work.model)
            return _Finished(work, quantized, lowered, backend.coverage(work.model, lowered, quantized))

    finished = finish(ready.work) if ready.budget is None else ready.budget.spend(ready.work, ready.passes, finish)
    work = finished.work
    with stages("report"):
        report = build_report(
            float_model=ready.float_model,
            transformed_model=work.transformed,
            quantized_model=finished.quantized,
            lowered_model=work.model,
            notes=(*source.notes, *work.notes, *finished.lowered.notes),
            plans=tuple(work.plans),
            coverage=finished.coverage,
            batches=batches,
            seconds=stages.seconds,
            executable=finished.lowered.executable,
        )
    compiled = CompiledModel(
        model=work.model,
        recipe=_recipe(source, chosen, ready.passes, target, backend.tables(), batches, seed, allowed),
        report=report,
        plans=tuple(work.plans),
        tokenizer=source.tokenizer,
        executable=finished.lowered.executable,
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
        budget: what runs the passes where a loss is allowed: ``work`` is the canonical float graph then. None: none is.
    """

    source: Source
    batches: Batches | None
    passes: Sequence[Pass]
    float_model: ir.Model
    work: Pipeline
    budget: Budget | None = None


@dataclasses.dataclass(frozen=True)
class _Finished:
    """A model through all passes and lowered, and the canonical graph that it was lowered from."""

    work: Pipeline
    quantized: ir.Model
    lowered: Lowered
    coverage: Coverage


def run_passes(
    model: Any,
    scheme: Scheme,
    capability: Capability,
    stages: Stages,
    *,
    calibration: Any = None,
    passes: str | None = None,
    allowed: MaxDrop | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    seed: int = 0,
    limit: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    dump: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> Quantized:
    """Open a model and its data and run the pipeline up to the fake-quant graph; arguments as of :func:`compile`.

    Where a loss is ``allowed``, the passes are left to the budget that is returned.
    """
    spelled = passes if passes is not None else default_passes(scheme, calibration is not None)
    pipeline = pass_table.parse_pipeline(spelled)
    if allowed is not None:
        check_budget(scheme, pipeline, calibration is not None)
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
        search, validation = batches, None
        if allowed is not None and batches is not None:
            allowed.check(source.kind, float_outputs(source.model))
            search, validation = hold_back(batches, Inputs(source.model), seed)
    work = Pipeline(
        source.model,
        search,
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
    budget = None
    if allowed is not None and search is not None and validation is not None:
        budget = Budget(allowed, canonical_float, search, validation, scheme, capability, stages)
    for item in pipeline if budget is None else ():
        work.apply(item)
    return Quantized(source, batches, pipeline, canonical_float, work, budget)


def default_passes(scheme: Scheme, calibrated: bool) -> str:
    """The pipeline of a scheme: ``split`` and ``adaptive`` need calibration data and quantized activations."""
    quantize = "annotate,insert,fold"
    return f"split,adaptive,{quantize}" if calibrated and scheme.activation is not None else quantize


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
    allowed: MaxDrop | None,
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
        "max_drop": {"metric": allowed.name, "limit": allowed.limit} if allowed is not None else None,
    }
