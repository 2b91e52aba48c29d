"""Weights quantized one by one: read from their file, rounded, written, forgotten; a killed run goes on from the last.

Without calibration data, what happens to a Linear's weight depends on that weight alone. So each weight becomes a small
model of its own (a *block*), goes through the passes behind ``annotate`` there, and is saved; when all are, their
finished weights are put back into the graph, from files, and the pipeline goes on as it always does: its passes find
nothing left to do on these Linears.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Sequence

import onnx_ir as ir
import rich.console
import rich.progress

from qcompiler.graph.excerpt import excerpt, put_back
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.run import save_model
from qcompiler.graph.stored import Spill, spill_to, unmapped
from qcompiler.passes.annotate import annotated
from qcompiler.passes.base import Context, Pass
from qcompiler.passes.pipeline import Pipeline
from qcompiler.runtime.partial import Workplace

_COLLECTED = 1 << 28  # numbers of weights after which garbage is collected


def weight_passes(passes: Sequence[Pass]) -> Sequence[Pass] | None:
    """The passes behind ``annotate``, where each of them treats every weight by itself; else None."""
    names = [item.name for item in passes]
    if "annotate" not in names or "insert" not in names:
        return None
    rest = passes[names.index("annotate") + 1 :]
    return rest if all(item.by_weight for item in rest) else None


def quantize_weights(work: Pipeline, rest: Sequence[Pass], context: Context, place: Workplace, progress: bool) -> None:
    """Do ``rest`` on the weights of an annotated model, weight by weight, from the first that is not finished."""
    blocks = _blocks(work.model)
    spill_to(work.model.graph, Spill(place.path / "lowered.data", place.scratch))
    held = 0
    for number, block in enumerate(_shown(blocks, progress)):
        path = place.file(number)
        if number >= place.finished:
            alone = _alone(excerpt(work.model, block), rest, dataclasses.replace(context))
            save_model(alone.model, path)
            place.finish(number, alone.notes)
            del alone
            held += block[0].in_features * block[0].out_features
            if held > _COLLECTED:  # graphs are cycles, which Python's counters leave lying for long
                gc.collect()
                held = 0
        finished = ir.load(path)
        left = {linear.name for linear in linears(finished) if linear.weight_quant is None}
        work.notes += [note for note in place.notes(number) if note.node not in left]  # of those, the pipeline tells
        for value in finished.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = unmapped(value.const_value)
                value.const_value.meta["qcompiler.scratch"] = place.scratch
        put_back(finished, work.model)


def _alone(model: ir.Model, passes: Sequence[Pass], context: Context) -> Pipeline:
    work = Pipeline(model, None, context, stages=lambda name: contextlib.nullcontext(), progress=False)
    for item in passes:
        work.apply(item)
    return work


def _blocks(model: ir.Model) -> list[list[Linear]]:
    """The Linears to quantize, those of one weight together, in graph order."""
    found: dict[ir.Value, list[Linear]] = {}
    for linear in linears(model):
        if annotated(linear)[0] is not None and linear.weight_quant is None:
            found.setdefault(linear.weight, []).append(linear)
    return list(found.values())


def _shown(blocks: list[list[Linear]], progress: bool) -> Sequence[list[Linear]]:
    console = rich.console.Console(stderr=True)
    if not progress or not console.is_terminal:
        return blocks
    return rich.progress.track(blocks, "quantizing weights", console=console, transient=True)  # type: ignore[return-value]
