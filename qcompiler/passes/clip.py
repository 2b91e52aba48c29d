"""clip: shorter ranges for inputs and weights, where rows that did not choose them say that it helps.

It runs after ``insert`` and changes the scales that stand in the graph as constants of the fake-quants: a range found
by search is a number, and no observer's spelling could say it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.observers.folds import FoldSample
from qcompiler.core import Note, StatRequest, unknown
from qcompiler.graph.edit import array_of, scalar_of, write_input
from qcompiler.graph.functions import is_call
from qcompiler.graph.linear import Linear, linears
from qcompiler.numerics.affine import integer_range
from qcompiler.numerics.clip_search import METHODS, Clipping, output_error
from qcompiler.passes.annotate import annotated
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.judging import sample_request
from qcompiler.scheme import TensorSpec

_INT8 = TensorSpec("int8")


@dataclasses.dataclass(frozen=True)
class Clip(Pass):
    """Search the scales of each input and of the weights that read it; keep what lowers the held-out error.

    Input and weights are judged apart and together: of nothing, either, and both, the least error wins.

    Attributes:
        method: "mse", "kl", "percentile" (kl and percentile search inputs only), "admm" or "eq" (EasyQuant).
        gain: factor by which the site's squared output error must fall on rows that did not choose the scales.
        rows: calibration rows each site is searched and judged on.
    """

    name: ClassVar[str] = "clip"
    method: str = "mse"
    gain: float = 1.02
    rows: int = 512

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method of pass 'clip'", self.method, METHODS)

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        return [sample_request(linear, self.rows) for group in _sites(model) for linear in group[:1]]

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        notes = []
        for group in _sites(model):
            sample = stats[sample_request(group[0], self.rows)]
            start = _clipping(group, integer_range(_INT8, ctx.capability.reduce_range)[1])
            found, told = self._search(sample, _weight(group), start)
            if found is not start:
                _write(group, start, found)
            what = f"clip method={self.method}" if found is not start else "not clipped"
            notes += [Note(linear.name, what, told) for linear in group]
        return PassResult(any(note.what != "not clipped" for note in notes), tuple(notes))

    def _search(self, sample: FoldSample, weight: np.ndarray, start: Clipping) -> tuple[Clipping, str]:
        """The scales to use, made of all rows, and the held-out errors that speak for them."""
        search = METHODS[self.method]
        x = np.asarray(sample.rows, np.float32)
        errors: dict[tuple[bool, bool], float] = {}
        plain = signal = 0.0
        for train, held in _halves(sample):
            found = search(x[train], weight, start)
            plain += output_error(x[held], weight, start)
            signal += float(np.square(x[held] @ weight).sum())
            for parts in ((True, False), (False, True), (True, True)):
                errors[parts] = errors.get(parts, 0.0) + output_error(x[held], weight, _mixed(start, found, parts))
        best = min(errors, key=lambda parts: errors[parts])
        scale = signal or 1.0
        told = f"held-out error {plain / scale:.1e} -> {errors[best] / scale:.1e}"
        if not errors[best] * self.gain < plain:
            return start, f"no gain worth it: {told}"
        named = " and ".join(name for name, on in zip(("input", "weight"), best, strict=True) if on)
        return _mixed(start, search(x, weight, start), best), f"{named}: {told}"


def _halves(sample: FoldSample) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows that search and rows that judge, twice, the roles changed; of one fold all do both."""
    odd = sample.fold % 2 == 1
    every = np.ones_like(odd)
    return [(odd, ~odd), (~odd, odd)] if odd.any() and not odd.all() else [(every, every)]


def _mixed(start: Clipping, found: Clipping, parts: tuple[bool, bool]) -> Clipping:
    """Input scale and weight scales, each from the search or as they were."""
    activation, weight = parts
    return dataclasses.replace(found if activation else start, weight_scale=(found if weight else start).weight_scale)


def _sites(model: ir.Model) -> list[list[Linear]]:
    """Fake-quantized Linears that read one quantized value. Those that share a weight with another keep its scale."""
    groups: dict[ir.Value, list[Linear]] = {}
    for linear in linears(model):
        quant = linear.weight_quant
        read = linear.matmul.inputs[0]
        if quant is None or read is None or not is_call(quant, "FakeQuant") or len(quant.outputs[0].uses()) > 1:
            continue
        scale = array_of(quant.inputs[1])
        if scale is not None and scale.ndim == 1:
            groups.setdefault(read, []).append(linear)
    return [group for read, group in groups.items() if _readers(read) == len(group)]


def _readers(read: ir.Value) -> int:
    return len(read.uses())


def _clipping(group: list[Linear], high: int) -> Clipping:
    quant = group[0].activation_quant
    _, spec = annotated(group[0])
    scale, zero_point = 1.0, 0
    if quant is not None and is_call(quant, "FakeQuant"):
        scale, zero_point = scalar_of(quant.inputs[1]) or 1.0, int(scalar_of(quant.inputs[2]) or 0)
    scales = [array_of(linear.weight_quant.inputs[1]) for linear in group if linear.weight_quant is not None]
    joined = np.concatenate([array for array in scales if array is not None])
    return Clipping(spec if quant is not None else None, scale, zero_point, joined, high)


def _weight(group: list[Linear]) -> np.ndarray:
    arrays = [array_of(linear.weight) for linear in group]
    return np.concatenate([array.astype(np.float32) for array in arrays if array is not None], axis=1)


def _write(group: list[Linear], start: Clipping, found: Clipping) -> None:
    quant = group[0].activation_quant
    if quant is not None and found.static:
        assert found.spec is not None
        write_input(quant, 1, np.asarray(found.scale, np.float32))
        write_input(quant, 2, np.asarray(found.zero_point, found.spec.dtype))
    first = 0
    for linear in group:
        assert linear.weight_quant is not None
        part = slice(first, first + linear.out_features)
        first = part.stop
        if not np.array_equal(found.weight_scale[part], start.weight_scale[part]):
            write_input(linear.weight_quant, 1, np.asarray(found.weight_scale[part], np.float32))
