"""Layer-wise and output errors: the float and the quantized graph side by side, in constant memory.

Both graphs are merged into one that returns, for each Linear, only a few sums a row (a token); the wide
outputs themselves, and the logits of a language model, never leave ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.core import Executable
from qcompiler.graph.experts import has_experts
from qcompiler.graph.run import Feeds, Runner
from qcompiler.numerics.metrics import RowSumsMeter, SqnrMeter
from qcompiler.report.side_by_side import ACCUMULATED, ALONE, row_sums, side_by_side

MASK = "attention_mask"
SLICE = 512
"""Rows (tokens) of one run: bounds the memory that both graphs take at once."""
TOKENS = 2048
"""Rows (tokens) in all: long samples need not be as many as short ones."""


@dataclasses.dataclass(frozen=True)
class LayerError:
    """SQNR in dB of one Linear's output; ``alone`` None where the float graph has not the same input and weight."""

    accumulated: float
    alone: float | None


def layer_errors(
    float_model: ir.Model, quantized: ir.Model, batches: Iterable[Feeds], samples: int, threads: int = 0
) -> tuple[dict[str, LayerError], int]:
    """Measure the output of every quantized Linear against the float graph.

    Args:
        float_model: the canonical float graph, as it was just before ``insert`` (transforms applied): then every
            Linear's error alone can be told too. With the graph from before the transforms, only accumulated errors.
        quantized: the canonical graph with fake-quant, before lowering; neither graph is changed.
        batches: feeds; rows where ``attention_mask`` is 0 do not count.
        samples: stop after that many samples (entries of the leading axis).
        threads: intra-op threads; 0 leaves the number to ONNX Runtime.

    Returns:
        Errors by Linear name, and the number of samples seen.
    """
    meters, seen = error_meters(
        float_model, quantized, sliced(batches, samples, whole=fixed_batch(float_model)), threads=threads
    )
    errors = {
        name: LayerError(meter.db, meters[name, ALONE].db if (name, ALONE) in meters else None)
        for (name, kind), meter in meters.items()
        if kind == ACCUMULATED
    }
    return errors, seen


def error_meters(
    float_model: ir.Model,
    quantized: ir.Model,
    batches: Iterable[Feeds],
    *,
    cosine: bool = False,
    outputs: bool = False,
    threads: int = 0,
    only: Collection[str] | None = None,
) -> tuple[dict[tuple[str, str], RowSumsMeter], int]:
    """As :func:`layer_errors`, of all batches as they come, with the meters themselves.

    Args:
        cosine: also sum what the cosine needs; without it the meters' cosine is NaN.
        outputs: also compare the model's float outputs.
        only: names of the Linears to compare; None: every quantized one.

    Returns:
        Meters by (name, kind), kinds as in ``side_by_side.Pair``; and the number of samples seen.
    """
    if outputs and only is None and has_experts(quantized):  # their Linears and the outputs ask for different experts
        inside, seen = error_meters(float_model, quantized, batches, cosine=cosine, threads=threads)
        ends, _ = error_meters(float_model, quantized, batches, cosine=cosine, outputs=True, threads=threads, only=())
        return {**inside, **ends}, seen
    merged, pairs = side_by_side(float_model, quantized, only, outputs=outputs)
    if not pairs:
        return {}, 0
    taps = row_sums(merged, pairs, cosine)
    runner = Runner(merged, threads=threads, in_order=True)
    meters = {(pair.name, pair.kind): RowSumsMeter(pair.channels) for pair in pairs}
    seen = 0
    for feeds in batches:
        results = runner(feeds)
        seen += sample_count(feeds)
        for meter, names in zip(meters.values(), taps, strict=True):
            keep = unmasked(feeds, results[names[0]].shape)
            meter.update(*(results[name][keep] for name in names))
    return meters, seen


def output_errors(
    float_model: ir.Model,
    lowered: ir.Model | Executable,
    batches: Iterable[Feeds],
    samples: int,
    threads: int = 0,
) -> dict[str, float]:
    """SQNR in dB of each float output of the lowered model, by name; masked rows do not count."""
    reference = Runner(float_model, threads=threads)
    runner = Runner(lowered, threads=threads, as_deployed=True) if isinstance(lowered, ir.Model) else None
    meters: dict[str, SqnrMeter] = {}
    for feeds in sliced(batches, samples, whole=fixed_batch(float_model)):
        expected = reference(feeds)
        got = runner(feeds) if runner is not None else lowered.run(feeds, threads)  # type: ignore[union-attr]
        for name in reference.outputs:
            want, have = expected[name], got[name]
            if not np.issubdtype(want.dtype, np.floating):
                continue
            keep = unmasked(feeds, want.shape[:-1]) if want.ndim else np.True_
            meters.setdefault(name, SqnrMeter()).update(want[keep], have[keep])
    return {name: meter.db for name, meter in meters.items()}


def unmasked(feeds: Feeds, rows: tuple[int, ...]) -> Any:
    """What indexes the rows that count: the attention mask where its shape is theirs, else all of them."""
    mask = feeds.get(MASK)
    return np.asarray(mask) != 0 if mask is not None and np.shape(mask) == tuple(rows) else np.ones(rows, bool)


def sample_count(feeds: Feeds) -> int:
    """Entries of the leading axis of the first feed that has one."""
    return next((array.shape[0] for array in map(np.asarray, feeds.values()) if array.ndim), 1)


def fixed_batch(model: ir.Model) -> bool:
    """Whether the model takes batches of one size only."""
    return any(
        value.shape is not None and value.shape and isinstance(value.shape[0], int) for value in model.graph.inputs
    )


def sliced(
    batches: Iterable[Feeds], samples: int, rows: int = SLICE, total: int = TOKENS, whole: bool = False
) -> Iterator[Feeds]:
    """The first ``samples`` samples, cut along the batch axis into feeds of about ``rows`` rows (tokens) each.

    They end early once ``total`` rows, padding included, have been yielded. With ``whole`` no batch is cut: the last
    may hold more samples than asked for.
    """
    left = samples
    for feeds in batches:
        if left <= 0 or total <= 0:
            return
        count = sample_count(feeds)
        if whole or any(np.ndim(array) == 0 or np.shape(array)[0] != count for array in feeds.values()):
            left -= count
            yield feeds
            continue
        tokens = max(int(np.prod(np.shape(array)[1:2])) for array in feeds.values())
        step = max(1, rows // max(tokens, 1))
        for start in range(0, min(count, left), step):
            if total <= 0:
                return
            stop = min(start + step, count, left)
            total -= (stop - start) * tokens
            yield {name: np.asarray(array)[start:stop] for name, array in feeds.items()}
        left -= count
