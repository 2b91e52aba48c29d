"""compile(): the one place that wires a run together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.core import OptionError
from qcompiler.options import Options
from qcompiler.passes.pipeline import Pipeline
from qcompiler.quantize import Quantized, Request, identity, run_passes
from qcompiler.report import build as build_report
from qcompiler.runtime.artefact import refuse_existing
from qcompiler.runtime.compiled import CompiledModel
from qcompiler.runtime.load import load
from qcompiler.runtime.partial import Workplace
from qcompiler.runtime.recipe import RECIPE_VERSION
from qcompiler.scheme import Scheme
from qcompiler.targets.lowered import Coverage, Lowered


def compile(
    model: Any,
    *,
    scheme: str | Scheme = "w8a8",
    target: str = "ort-cpu",
    calibration: Any = None,
    output: str | os.PathLike[str] | None = None,
    passes: str | None = None,
    ignore: Sequence[str] = (),
    bits: Mapping[str, int | str] | None = None,
    max_drop: Any = None,
    max_size: int | str | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    seed: int = 0,
    limit: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    force: bool = False,
    resume: bool = False,
    dump: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> CompiledModel:
    """Quantize a float Transformer and lower it to integer operators.

    Args:
        model: torch.nn.Module, torch.export.ExportedProgram, path of an ``.onnx`` file or of a Hugging Face folder,
            onnx.ModelProto, or onnx_ir.Model. It is not changed.
        scheme: a preset's name (``qcompiler.presets.PRESETS``) or a Scheme.
        target: "ort-cpu", "onnx", "onnx{form=qoperator}", "hf" (weight-only schemes of a Hugging Face folder) or
            "tvm-llvm".
        calibration: any iterable of dicts / tuples of arrays or tensors, a DataLoader, an ``.npz``, a text file, a list
            of sentences, or a folder of images. Dynamic schemes run without it (without ``split`` and ``adaptive``).
        output: a folder to save to; it must not exist, unless ``force``. Without calibration data, weights are
            quantized one at a time and kept in ``<output>.partial`` until all are: memory holds one, not the model.
        passes: the pipeline as text, e.g. ``"smooth{alpha=0.5},annotate,insert,fold"``; None: the scheme's own.
        ignore: globs over Linear names that stay in float.
        bits: bits of weights by globs over Linear names, ``{"*down_proj*": 8}``: 2, 4, 8, or 16 (or "float") to leave
            them in float; groups are the scheme's. Of several globs that match, the last holds.
        max_drop: what may be lost at most, as one metric and its limit: ``{"sqnr": 26}`` (dB at least),
            ``{"cosine": 0.002}`` (1 - cosine), ``{"kl": 0.01}`` (nats a token), ``{"perplexity": 0.01}`` (relative
            increase), or ``(callable, limit)``: the callable takes float outputs, quantized outputs and feeds of one
            batch and returns what it loses. Each site is then static, dynamic, in groups or float, as fast as the limit
            allows. A quarter of the calibration samples is held back, and the limit holds on it with a margin.
        max_size: bytes that model.onnx and its data may take, or a text like "40MB". Each Linear then gets 2, 4 or 8
            bits, or stays in float, such that the model's outputs lose least, by what they lose with it alone so; one
            width for all is kept where it fits and loses less on other calibration samples.
        example_inputs, dynamic_shapes: for torch modules where they cannot be derived.
        seed: for every random choice.
        limit, seq_len: how many calibration samples, of how many tokens.
        batch_size: samples in one run; None: 1 for a causal language model, else 8.
        resume: go on from ``<output>.partial``, which a compile that was killed left there, to the same bytes; model
            and options must be the same. Where there is none, start.
        dump: a folder where the model is saved after every pass.
        trust_remote_code: let a Hugging Face folder run its own code.
        progress: show what is going on, on stderr.

    Returns:
        The compiled model with its report.

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
        max_drop=max_drop,
        max_size=max_size,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        seed=seed,
        limit=limit,
        seq_len=seq_len,
        batch_size=batch_size,
        dump=dump,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return compile_as(model, options, output, force, resume)


def compile_as(
    model: Any,
    options: Options,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    resume: bool = False,
) -> CompiledModel:
    """:func:`compile` with its options as one value."""
    asked = Request.of(options)
    path = Path(output) if output is not None else None
    if path is not None:
        refuse_existing(path, force)
    if resume:
        _check_resume(path, asked)
    with Workplace(path, resume, force) as place:
        compiled = _compiled(run_passes(model, asked, place), asked)
        if path is None:
            return compiled
        compiled.save(path, force=force, through=place.result)
    return load(path) if asked.weight_passes is not None else compiled


def _check_resume(output: Path | None, asked: Request) -> None:
    if output is None:
        raise OptionError("resume goes on from the folder beside output: give output.")
    if asked.weight_passes is None:
        raise OptionError(
            "resume goes on weight by weight, which calibration data, max_drop, dump and passes that look at more than "
            "one weight rule out: start anew without resume."
        )


def _compiled(ready: Quantized, asked: Request) -> CompiledModel:
    """Lower and tell."""
    finished = _finish(ready, asked)
    with asked.stages("report"):
        report = build_report(
            float_model=ready.float_model,
            transformed_model=finished.work.transformed,
            quantized_model=finished.quantized,
            lowered_model=finished.work.model,
            notes=(*ready.source.notes, *finished.work.notes, *finished.lowered.notes),
            plans=tuple(finished.work.plans),
            coverage=finished.coverage,
            batches=ready.batches,
            seconds=asked.stages.seconds,
            executable=finished.lowered.runnable,
        )
    return CompiledModel(
        model=finished.work.model,
        recipe=_recipe(ready, asked, finished.work.scheme),
        report=report,
        plans=tuple(finished.work.plans),
        tokenizer=ready.source.tokenizer,
        executable=finished.lowered.executable,
        companion=finished.lowered.companion,
    )


@dataclasses.dataclass(frozen=True)
class _Finished:
    """A model through all passes and lowered, and the canonical graph that it was lowered from."""

    work: Pipeline
    quantized: ir.Model
    lowered: Lowered
    coverage: Coverage


def _finish(ready: Quantized, asked: Request) -> _Finished:
    """Lower; where a loss or a size is given, run the passes first, as the budget says."""

    def finish(work: Pipeline) -> _Finished:
        quantized = work.model.clone()
        with asked.stages("lower"):
            lowered = asked.target.lower(work.model)
            return _Finished(work, quantized, lowered, asked.target.coverage(work.model, lowered, quantized))

    return finish(ready.work) if ready.budget is None else ready.budget.spend(ready.work, asked.passes, finish)


def _recipe(ready: Quantized, asked: Request, scheme: Scheme) -> dict[str, Any]:
    """What makes this artefact again, as JSON-ready data; the same input gives the same recipe."""
    batches, allowed = ready.batches, asked.allowed
    return {
        "version": RECIPE_VERSION,
        **identity(ready.source, asked),
        "scheme": scheme.to_json(),
        "calibration": {"samples": batches.samples} if batches is not None else None,
        "max_drop": {"metric": allowed.name, "limit": allowed.limit} if allowed is not None else None,
        "max_size": asked.max_size,
    }
