"""evaluate() and bench(): a compiled model beside its float source, in any form that compile() takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcompiler.frontends import open_data, open_source
from qcompiler.graph.rules import canonicalise
from qcompiler.runtime.bench import BenchResult
from qcompiler.runtime.bench import bench as measure_latency
from qcompiler.runtime.compiled import CompiledModel
from qcompiler.runtime.evaluate import Metrics
from qcompiler.runtime.evaluate import evaluate as measure_metrics


def evaluate(
    compiled: CompiledModel,
    reference: Any,
    data: Any,
    *,
    logits: str | None = None,
    limit: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    threads: int = 0,
    trust_remote_code: bool = False,
) -> Metrics:
    """Compare a compiled model with its float source on data.

    Args:
        compiled: the compiled model.
        reference: the float model, in any form that :func:`compile` takes.
        data: as ``calibration`` of :func:`compile`.
        logits: name of the output that holds logits; None: found by its name and the model's kind.
        limit, seq_len: how many samples, of how many tokens.
        batch_size: samples in one run; None: 1 for a causal language model, else 8.
        threads: intra-op threads; 0 leaves the number to ONNX Runtime.

    Returns:
        SQNR, cosine, for logits top-1 agreement and KL divergence, for causal language models perplexity.

    Raises:
        QCompilerError: model or data cannot be used.
    """
    source = open_source(reference, trust_remote_code=trust_remote_code)
    batches = open_data(data, source, limit=limit, seq_len=seq_len, batch_size=batch_size)
    causal = source.kind == "causal-lm"
    return measure_metrics(compiled, source.model, batches, logits=logits, causal=causal, threads=threads)


def bench(
    compiled: CompiledModel,
    reference: Any,
    *,
    shapes: Sequence[tuple[int, ...]] | None = None,
    threads: int = 1,
    repeats: int = 20,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> BenchResult:
    """Time a compiled model against the canonical graph of its float source, in alternation in one process.

    Args:
        compiled: the compiled model.
        reference: the float model, in any form that :func:`compile` takes.
        shapes: sizes of the open axes, e.g. ``[(8, 128)]``; None: by kind of model.
        threads, repeats: intra-op threads, and pairs of runs.
        seed: of the made-up inputs.

    Raises:
        QCompilerError: the model cannot be used.
    """
    source = open_source(reference, trust_remote_code=trust_remote_code)
    canonicalise(source.model)
    return measure_latency(compiled, source.model, shapes, threads=threads, repeats=repeats, seed=seed)
