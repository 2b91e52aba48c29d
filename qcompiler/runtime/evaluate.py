"""Compare a compiled model with its float reference on data, batch by batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import DataError
from qcompiler.graph.run import Feeds, Runner
from qcompiler.numerics.metrics import CosineMeter, LogitsMeter, PerplexityMeter, SqnrMeter
from qcompiler.report.errors import MASK, sample_count, unmasked
from qcompiler.runtime.compiled import CompiledModel

IDS, LOGITS = "input_ids", "logits"


@dataclasses.dataclass(frozen=True)
class OutputMetrics:
    """How one output compares, over its unmasked rows (tokens).

    Attributes:
        sqnr_db: 10·log10(Σref² / Σerr²), pooled, in dB.
        cosine: mean over rows of the cosine.
        top1: share of rows with the same largest logit; None for what is no logits.
        kl: mean KL(softmax(ref) || softmax(compiled)) in nats; None for what is no logits.
    """

    sqnr_db: float
    cosine: float
    top1: float | None = None
    kl: float | None = None


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What :func:`evaluate` found.

    Attributes:
        samples: samples seen.
        outputs: metrics by output name.
        perplexity: of the compiled model; None unless it is a causal language model.
        reference_perplexity: of the reference; None likewise.
    """

    samples: int
    outputs: dict[str, OutputMetrics]
    perplexity: float | None = None
    reference_perplexity: float | None = None

    def lines(self) -> list[tuple[str, str]]:
        """What was measured, and the figures in words."""
        pairs = [("samples", str(self.samples))]
        for name, output in self.outputs.items():
            text = f"SQNR {output.sqnr_db:.2f} dB, cosine {output.cosine:.5f}"
            if output.top1 is not None:
                text += f", top-1 agreement {output.top1:.2%}, KL {output.kl:.3g} nats"
            pairs.append((name, text))
        if self.perplexity is not None and self.reference_perplexity is not None:
            ratio = self.perplexity / self.reference_perplexity
            text = f"{self.perplexity:.3f}, reference {self.reference_perplexity:.3f} (x {ratio:.4f})"
            pairs.append(("perplexity", text))
        return pairs

    def __str__(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in self.lines())

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; an infinite SQNR (no error at all) is the string "inf"."""
        data = dataclasses.asdict(self)
        for output in data["outputs"].values():
            output.update({k: str(v) for k, v in output.items() if v is not None and not math.isfinite(v)})
        return data


def evaluate(
    compiled: CompiledModel,
    reference: ir.Model,
    batches: Iterable[Feeds],
    *,
    logits: Sequence[str] | None = None,
    causal: bool | None = None,
    threads: int = 0,
) -> Metrics:
    """Run both on the same feeds and compare every float output they share; nothing is kept but sums.

    Args:
        compiled: the compiled model.
        reference: the float model, raw or canonical; it runs in ONNX Runtime.
        batches: feeds; rows where ``attention_mask`` is 0 do not count.
        logits: names of the outputs that are logits; None: those whose name contains "logits".
        causal: whether output "logits" predicts the next of ``input_ids``, so that perplexity makes sense; None: the
            recipe says.
        threads: intra-op threads; 0 leaves the number to ONNX Runtime.

    Raises:
        DataError: no data, or feeds or outputs of the two do not fit each other.
    """
    runner = Runner(reference, threads=threads)
    names = [name for name in runner.outputs if name in compiled.outputs]
    if not names:
        raise DataError(
            f"the reference has outputs {', '.join(runner.outputs)} and the compiled model "
            f"{', '.join(compiled.outputs)}: they share none."
        )
    if causal is None:
        causal = compiled.recipe.get("source", {}).get("kind") == "causal-lm"
    meters = {name: _Meters(name in logits if logits is not None else LOGITS in name) for name in names}
    perplexities = PerplexityMeter(), PerplexityMeter()
    samples = 0
    for feeds in batches:
        missing = [name for name in runner.inputs if name not in feeds]
        if missing:
            raise DataError(f"the data has no {', '.join(missing)}, which the reference reads.")
        want, have = runner(feeds), compiled.run(feeds, threads=threads)
        samples += sample_count(feeds)
        for name in names:
            meters[name].update(feeds, want[name], have[name])
        if causal and LOGITS in names and IDS in feeds:
            for meter, result in zip(perplexities, (want, have), strict=True):
                meter.update(result[LOGITS], feeds[IDS], feeds.get(MASK))
    if not samples:
        raise DataError("the evaluation data is empty.")
    counted = perplexities[0].tokens > 0
    return Metrics(
        samples=samples,
        outputs={name: meter.result() for name, meter in meters.items() if meter.seen},
        perplexity=perplexities[1].value if counted else None,
        reference_perplexity=perplexities[0].value if counted else None,
    )


class _Meters:
    """The meters of one output."""

    def __init__(self, logits: bool) -> None:
        self.sqnr, self.cosine, self.logits = SqnrMeter(), CosineMeter(), LogitsMeter() if logits else None
        self.seen = False

    def update(self, feeds: Feeds, want: npt.NDArray[Any], have: npt.NDArray[Any]) -> None:
        if not np.issubdtype(want.dtype, np.floating):
            return
        if want.shape != have.shape:
            raise DataError(f"the outputs have shapes {list(want.shape)} and {list(have.shape)}: not the same model.")
        if want.ndim:
            keep = unmasked(feeds, want.shape[:-1])
            want, have = want[keep], have[keep]
        self.seen = True
        self.sqnr.update(want, have)
        self.cosine.update(want, have)
        if self.logits is not None:
            self.logits.update(want, have)

    def result(self) -> OutputMetrics:
        logits = self.logits
        return OutputMetrics(
            self.sqnr.db, self.cosine.mean, logits.top1 if logits else None, logits.kl if logits else None
        )
