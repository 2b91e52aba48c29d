"""From a model and its data to the fake-quant graph: the part of a run that compile() and analyze() share."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler import passes as pass_table
from qcompiler.budget import Budget, check_budget
from qcompiler.capability import Capability
from qcompiler.core import ModelError, OptionError, TargetError
from qcompiler.frontends import Source, open_data, open_source
from qcompiler.frontends.builtin import builtin_text
from qcompiler.frontends.data import Batches
from qcompiler.frontends.holdout import hold_back
from qcompiler.frontends.inputs import Inputs
from qcompiler.graph.linear import linears
from qcompiler.graph.run import Feeds
from qcompiler.graph.stored import materialise
from qcompiler.options import Options
from qcompiler.passes.base import Context, Pass
from qcompiler.passes.pipeline import Pipeline
from qcompiler.presets import resolve
from qcompiler.report.stages import Stages
from qcompiler.runtime.drop import MaxDrop, float_outputs
from qcompiler.runtime.partial import Workplace
from qcompiler.scheme import BITS, DTYPES, Scheme
from qcompiler.size_budget import SizeBudget, check_size, parse_size
from qcompiler.spelling import spell
from qcompiler.streamed import quantize_weights, weight_passes
from qcompiler.targets import make_target
from qcompiler.targets.base import Target


@dataclasses.dataclass(frozen=True)
class Request:
    """Options that were read and found possible, before any model is opened.

    Attributes:
        options: as they were given.
        scheme: what is to be quantized, ``ignore`` included.
        target: what will run it.
        capability: what the target can run.
        passes: what runs after ``normalise``.
        allowed: what may be lost at most; None: nothing is asked.
        stages: shows and times the run.
        max_size: bytes that the saved model may take; None: nothing is asked.
    """

    options: Options
    scheme: Scheme
    target: Target
    capability: Capability
    passes: Sequence[Pass]
    allowed: MaxDrop | None
    stages: Stages
    max_size: int | None = None

    @staticmethod
    def of(options: Options) -> Request:
        """
        Raises:
            QCompilerError: one of its kinds: an option that does not exist, or that others rule out.
        """
        scheme = resolve(options.scheme, tuple(options.ignore), options.bits)
        allowed = MaxDrop.parse(options.max_drop) if options.max_drop is not None else None
        target = make_target(options.target)
        capability = target.capability()
        check_target(scheme, capability)
        calibrated = options.calibration is not None
        spelled = options.passes if options.passes is not None else default_passes(scheme, calibrated)
        passes = pass_table.parse_pipeline(spelled)
        if allowed is not None:
            check_budget(scheme, passes, calibrated)
        size = parse_size(options.max_size) if options.max_size is not None else None
        if size is not None:
            check_size(scheme, target, passes, calibrated)
            if allowed is not None:
                raise OptionError("max_drop and max_size each choose for all Linears: give one of them.")
        return Request(options, scheme, target, capability, passes, allowed, Stages(options.progress), size)

    @property
    def weight_passes(self) -> Sequence[Pass] | None:
        """The passes that may run on one weight at a time; None: a weight's fate depends on more than itself."""
        asked = self.options
        alone = asked.calibration is None and asked.dump is None and self.allowed is None and self.max_size is None
        return weight_passes(self.passes) if alone else None

    def data(self, data: Any, source: Source) -> Batches:
        """Data of any kind as batches for the model, as many and as large as the options say."""
        asked = self.options
        return open_data(data, source, limit=asked.limit, seq_len=asked.seq_len, batch_size=asked.batch_size)


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What :func:`run_passes` leaves.

    Attributes:
        source: the opened model.
        batches: its calibration data, or None.
        float_model: the canonical float graph, before any pass but ``normalise``.
        work: the fake-quant graph (``work.model``), the float graph that it is compared with, notes and plans.
        budget: what runs the passes where a loss or a size is given: ``work`` is the canonical float graph then. None:
            none is.
    """

    source: Source
    batches: Batches | None
    float_model: ir.Model
    work: Pipeline
    budget: Budget | SizeBudget | None = None


def run_passes(model: Any, asked: Request, place: Workplace | None = None) -> Quantized:
    """Open a model and its data and run the pipeline up to the fake-quant graph.

    Where a loss or a size is given, the passes are left to the budget that is returned. With a ``place``, weights that
    need no calibration data are quantized one at a time, and lie there afterwards.

    Raises:
        QCompilerError: one of its kinds, with one sentence, where model or data cannot be used.
    """
    options, allowed = asked.options, asked.allowed
    with asked.stages("open"):
        source = open_source(
            model,
            example_inputs=options.example_inputs,
            dynamic_shapes=options.dynamic_shapes,
            trust_remote_code=options.trust_remote_code,
        )
        batches = asked.data(options.calibration, source) if options.calibration is not None else None
        search, validation = batches, None
        if allowed is not None and batches is not None:
            allowed.check(source.kind, float_outputs(source.model))
            search, validation = hold_back(batches, Inputs(source.model), options.seed)
    distill = functools.partial(_distill, options.progress)
    text = functools.partial(_builtin_text, source, options.seq_len, batches)
    context = Context(asked.scheme, asked.capability, options.seed, distill=distill, text=text)
    work = Pipeline(
        source.model,
        search,
        context,
        stages=asked.stages,
        progress=options.progress,
        dump=Path(options.dump) if options.dump is not None else None,
    )
    work.apply(pass_table.make_pass("normalise", {}))
    if not linears(work.model):
        raise ModelError(
            f"{source.name} has no Linear (MatMul or Gemm with a constant 2-D weight): nothing to quantize."
        )
    _check_globs(work.model, asked.scheme)
    rest = asked.weight_passes if place is not None else None
    if place is not None and rest is not None:
        place.begin(identity(source, asked))
    else:
        materialise(work.model)
    asked.target.prepare(work.model, asked.scheme)
    canonical_float = work.model.clone()
    budget: Budget | SizeBudget | None = None
    if asked.max_size is not None and search is not None:
        budget = SizeBudget(asked.max_size, search, asked.scheme, asked.target, asked.capability, asked.stages)
    elif allowed is not None and search is not None and validation is not None:
        budget = Budget(allowed, canonical_float, search, validation, asked.scheme, asked.capability, asked.stages)
    for item in asked.passes if budget is None else ():
        work.apply(item)
        if item.name == "annotate" and place is not None and rest is not None:
            with asked.stages("weights"):
                quantize_weights(work, rest, context, place, options.progress)
    return Quantized(source, batches, canonical_float, work, budget)


def identity(source: Source, asked: Request) -> dict[str, Any]:
    """What decides the result, but for calibration data: JSON-ready."""
    return {
        "qcompiler": version("qcompiler"),
        "source": {"name": source.name, "kind": source.kind, "sha256": source.sha256},
        "scheme": asked.scheme.to_json(),
        "passes": ",".join(spell(item.name, item) for item in asked.passes),
        "target": asked.options.target,
        "tables": dict(asked.target.tables()),
        "seed": asked.options.seed,
    }


def default_passes(scheme: Scheme, calibrated: bool) -> str:
    """The pipeline of a scheme: ``split`` and ``adaptive`` need calibration data and quantized activations; weights of
    fewer than 8 bits are clipped and rounded by what they meet, where there is data, and in groups they are ordered."""
    few_bits = calibrated and scheme.weight.dtype in DTYPES and scheme.weight.bits < 8
    quantize = "annotate,insert,clip_weights,gptq,fold" if few_bits else "annotate,insert,fold"
    if few_bits and scheme.weight.group_size is not None:
        quantize = f"reorder,{quantize}"
    if scheme.outlier_threshold is not None:
        return f"split,{quantize}"
    return f"split,adaptive,{quantize}" if calibrated and scheme.activation is not None else quantize


def _builtin_text(source: Source, seq_len: int | None, like: Batches | None) -> list[Feeds]:
    """The text that comes with qcompiler, in batches as large as the caller's."""
    size = 1 if like is None else -(-like.samples // like.count)
    return list(builtin_text(source, seq_len=seq_len, batch_size=size) or ())


def _distill(
    progress: bool,
    teacher: ir.Model,
    student: ir.Model,
    rates: Mapping[str, float],
    batches: Iterable[Feeds],
    steps: int,
) -> Mapping[str, Any]:
    """:func:`qcompiler.training.distill.distill`, where there is torch."""
    try:
        from qcompiler.training.distill import distill
    except ImportError as error:
        raise OptionError(f"pass 'distill' trains with torch ({error}): pip install 'qcompiler[torch]'.") from error
    return distill(teacher, student, rates, batches, steps, progress)


def check_target(scheme: Scheme, capability: Capability) -> None:
    """Refuse a scheme that no kernel of the target runs."""
    weights = [scheme.weight, *(scheme.weight.with_bits(bits) for _, bits in scheme.bits if bits in BITS)]
    activations = [scheme.activation, *([scheme.fallback] if scheme.fallback is not None else [])]
    for weight, spec in itertools.product(weights, activations):
        if not capability.runs(weight, spec):
            offered = ", ".join(dict.fromkeys(kernel.name for kernel in capability.kernels))
            raise TargetError(
                f"target {capability.target!r} cannot run scheme {scheme.name!r}: none of its kernels ({offered}) "
                f"takes weight {weight} with activation {spec or 'float'}; choose another scheme or target."
            )
    table = scheme.embedding
    if table is not None and table.group_size not in capability.embeddings.get(table.dtype, ()):
        raise TargetError(
            f"target {capability.target!r} gathers no rows of an embedding in {table.dtype} by {table.group_size}: "
            f"it has {', '.join(capability.embeddings) or 'float tables only'}; leave embedding= out of the scheme."
        )


def _check_globs(model: ir.Model, scheme: Scheme) -> None:
    """A glob that matches nothing is a mistake the user wants to hear of."""
    names = [linear.name for linear in linears(model)]
    globs = [("ignore", glob) for glob in scheme.ignore] + [("bits", glob) for glob, _ in scheme.bits]
    for option, glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in names):
            raise OptionError(
                f"{option}={glob!r} matches no Linear; their names look like {names[0]!r} (qcompiler inspect lists "
                "them)."
            )
