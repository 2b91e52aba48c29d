"""Latency of a compiled model against its float reference: in alternation, in one process."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qcompiler.core import OptionError
from qcompiler.graph.run import Feeds, open_session, session_options
from qcompiler.runtime.compiled import CompiledModel
from qcompiler.runtime.synthetic import Shape, default_shapes, make_feeds

WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class Timing:
    """One shape.

    Attributes:
        shape: sizes of the open axes, or of the first feed where feeds were given.
        reference_ms, compiled_ms: medians.
        ratio: median over pairs of compiled / reference: below 1 is faster.
        spread: half the distance between the quartiles of that ratio.
    """

    shape: Shape
    reference_ms: float
    compiled_ms: float
    ratio: float
    spread: float


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What :func:`bench` found; ``clock`` says whether milliseconds are of CPU time or of wall time."""

    threads: int
    repeats: int
    clock: str
    timings: tuple[Timing, ...]

    def lines(self) -> list[tuple[str, str]]:
        """What was timed, and the figures in words."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        pairs = [("timed with", f"{threads}, {self.clock} time, {self.repeats} pairs")]
        for timing in self.timings:
            text = (
                f"{timing.ratio:.3f} of the reference's latency (+- {timing.spread:.3f}): "
                f"{timing.compiled_ms:.2f} ms against {timing.reference_ms:.2f} ms"
            )
            pairs.append(("x".join(map(str, timing.shape)), text))
        return pairs

    def __str__(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in self.lines())

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return dataclasses.asdict(self)


def bench(
    compiled: CompiledModel,
    reference: ir.Model,
    shapes: Sequence[Shape] | None = None,
    feeds: Sequence[Feeds] | None = None,
    *,
    threads: int = 1,
    repeats: int = 20,
    seed: int = 0,
) -> BenchResult:
    """Time both models on the same feeds, one run each in turn, ONNX Runtime's full optimisation for both.

    Args:
        compiled: the compiled model.
        reference: the canonical float graph: the fair opponent (a raw exporter's graph can be slower).
        shapes: sizes of the open axes, e.g. ``[(8, 128), (1, 16)]``; None: the defaults of the model's kind.
        feeds: real feeds in place of ``shapes``.
        threads: intra-op threads. With one, CPU time is taken, which other processes disturb less; else wall time.
        repeats: pairs of runs for each shape.
        seed: of made-up feeds.

    Raises:
        OptionError: no repeats or no threads.
        DataError: feeds do not fit.
    """
    if repeats < 1 or threads < 1:
        raise OptionError(f"repeats={repeats} and threads={threads} must both be at least 1.")
    if feeds is None:
        kind = compiled.recipe.get("source", {}).get("kind")
        chosen = list(shapes) if shapes is not None else default_shapes(kind, compiled.inputs)
        feeds = [make_feeds(compiled.inputs, shape, seed, reference) for shape in chosen]
    else:
        chosen = [tuple(np.shape(next(iter(batch.values())))) for batch in feeds]
    clock = time.process_time if threads == 1 else time.perf_counter
    options = session_options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    float_session, run = open_session(reference, options), _runner(compiled, options, threads)
    wanted = [value.name for value in float_session.get_inputs()]
    timings = []
    for shape, batch in zip(chosen, feeds, strict=True):
        arrays = {name: np.asarray(array) for name, array in batch.items()}
        compiled.check(arrays)
        timings.append(_time(shape, lambda f: float_session.run(None, f), run, arrays, wanted, repeats, clock))
    return BenchResult(threads, repeats, "CPU" if threads == 1 else "wall", tuple(timings))


Run = Callable[[Mapping[str, Any]], Any]


def _runner(compiled: CompiledModel, options: ort.SessionOptions, threads: int) -> Run:
    """What runs the compiled model, in ONNX Runtime or by itself."""
    executable = compiled.executable
    if executable is not None:
        return lambda feeds: executable.run(feeds, threads)
    session = compiled.session(options=options)
    return lambda feeds: session.run(None, feeds)


def _time(
    shape: Shape,
    reference: Run,
    compiled: Run,
    arrays: Mapping[str, Any],
    wanted: Sequence[str],
    repeats: int,
    clock: Callable[[], float],
) -> Timing:
    float_arrays = {name: arrays[name] for name in wanted}

    def once(run: Run, feeds: Mapping[str, Any]) -> float:
        start = clock()
        run(feeds)
        return (clock() - start) * 1e3

    pairs = [(once(reference, float_arrays), once(compiled, arrays)) for _ in range(repeats + WARM_UP)][WARM_UP:]
    ratios = sorted(b / a for a, b in pairs)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return Timing(
        shape=shape,
        reference_ms=statistics.median(a for a, _ in pairs),
        compiled_ms=statistics.median(b for _, b in pairs),
        ratio=statistics.median(ratios),
        spread=(quartiles[2] - quartiles[0]) / 2,
    )
