"""What smooth and annotate judge a site by: which Linears, on which sample, and when a static scale is good enough."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.observers.folds import FoldSample
from qcompiler.capability import Capability
from qcompiler.core import Note, StatRequest
from qcompiler.graph.edit import array_of
from qcompiler.graph.heads import output_heads
from qcompiler.graph.linear import Linear, linears
from qcompiler.numerics.site_judge import Reader
from qcompiler.scheme import BITS, Scheme, TensorSpec

STATIC_ERROR = 1e-3
"""Relative squared output error (30 dB) below which a static scale holds at a site, whatever else could be had. On
SmolLM2 it parts the sites with outlier tokens (10 to 29 dB) from all others (above 31 dB)."""
FALLBACK_GAIN = 2.0
"""Above it, the fallback must lower the squared error by this factor (3 dB) to be worth its time."""
ERROR_PER_TIME = 0.02
"""Squared relative error that the fallback must remove, over its share of the time of all quantized Linears: 1 % more
time must remove 2e-4 (-37 dB)."""
HEAD_ERROR = 10.0
"""What a squared error counts at an output head: nothing after it adds to what it says, as the residual stream adds to
what every other Linear says. On SmolLM2 a head in a static scale (1e-4 more) costs 1 % of perplexity, as much as
static scales at a third of all other sites."""

_FLOAT = "qcompiler.float"
_ACTIVATION, _WHY = "qcompiler.activation", "qcompiler.activation_why"
_OUTPUTS = 4096  # output features that a site is judged on at most: an output head has ten times as many


def quantized(model: ir.Model, scheme: Scheme) -> list[Linear]:
    """The Linears that the scheme quantizes."""
    left = {note.node for note in left_in_float(model, scheme)}
    return [linear for linear in linears(model) if linear.name not in left]


def left_in_float(model: ir.Model, scheme: Scheme) -> list[Note]:
    """The Linears that stay in float, and why."""
    heads = set() if scheme.head else output_heads(model)
    reasons = []
    for linear in linears(model):
        if why := linear.matmul.metadata_props.get(_FLOAT):
            reasons.append((linear.name, why))
        elif glob := scheme.ignored_by(linear.name):
            reasons.append((linear.name, f"ignored by {glob!r}"))
        elif (asked := scheme.bits_of(linear.name)) and asked[1] not in BITS:
            reasons.append((linear.name, f"bits={asked[0]!r} leaves it"))
        elif linear.name in heads:
            reasons.append((linear.name, "an output head; the scheme leaves it"))
    return [Note(name, "left in float", why) for name, why in reasons]


def keep_float(matmul: ir.Node, why: str) -> None:
    """Let no pass quantize this Linear."""
    matmul.metadata_props[_FLOAT] = why


def by_input(group: Sequence[Linear]) -> list[list[Linear]]:
    """The Linears in groups that read one value: they share its quantization."""
    groups: dict[ir.Value, list[Linear]] = {}
    for linear in group:
        groups.setdefault(linear.x, []).append(linear)
    return list(groups.values())


def sample_request(linear: Linear, rows: int) -> StatRequest:
    """The statistic of a Linear's input that :func:`reader` reads."""
    return rows_request(linear.x, rows)


def rows_request(value: ir.Value, rows: int) -> StatRequest:
    """A row sample of a value, dealt to folds."""
    return StatRequest(value.name or "", f"folds{{count={rows}}}", -1)


def sampled_outputs(weight: npt.NDArray[Any], count: int, seed: int) -> npt.NDArray[Any]:
    """``count`` of the weight's output features [in, out], drawn by the seed, in their order."""
    return weight[:, np.sort(np.random.default_rng(seed).choice(weight.shape[1], count, replace=False))]


def reader(
    group: Sequence[Linear], sample: FoldSample, columns: npt.NDArray[np.int32] | None, scheme: Scheme, seed: int
) -> Reader:
    """What the Linears of one input make of it, as the site search wants it.

    Args:
        columns: int32 [in_features], the site's channel of each feature; None: one each.
        scheme: says how many bits each weight gets.
        seed: of the sample of output features, where there are very many.
    """
    weight = np.concatenate([array for linear in group if (array := array_of(linear.weight)) is not None], axis=1)
    bits = np.concatenate([np.full(line.out_features, scheme.weight_of(line.name).bits) for line in group])
    if weight.shape[1] > 2 * _OUTPUTS:
        weight, bits = sampled_outputs(weight, _OUTPUTS, seed), sampled_outputs(bits[None], _OUTPUTS, seed)[0]
    if columns is None:
        columns = np.arange(len(weight), dtype=np.int32)
    return Reader(sample.rows, sample.fold, sample.low, sample.high, weight, columns, bits)


def leave_decision(group: Sequence[Linear], spec: TensorSpec, why: str) -> None:
    """Write on Linears of one input how it is to be quantized. The pass that transforms a site decides there: its scale
    has seen all rows by then, and nothing can be judged on them again; ``annotate`` decides the rest."""
    for linear in group:
        linear.matmul.metadata_props[_ACTIVATION] = json.dumps(dataclasses.asdict(spec))
        linear.matmul.metadata_props[_WHY] = why


def decision(linear: Linear) -> tuple[TensorSpec, str] | None:
    """What :func:`leave_decision` wrote, or None."""
    text = linear.matmul.metadata_props.get(_ACTIVATION)
    return (TensorSpec(**json.loads(text)), linear.matmul.metadata_props.get(_WHY, "")) if text is not None else None


def forget_decision(linear: Linear) -> None:
    """Take back what :func:`leave_decision` wrote."""
    for key in (_ACTIVATION, _WHY):
        linear.matmul.metadata_props.pop(key, None)


class FallbackRule:
    """Where a site is better off with the scheme's fallback than with a static scale.

    Where the target's times are known, an error is set against the time that is saved: a share of the time of all
    quantized Linears must remove :data:`ERROR_PER_TIME` times that share of squared relative error. So the many small
    sites of a deep model get the fallback sooner than the few large ones of a shallow model; without times, see
    :func:`holds`.
    """

    def __init__(self, model: ir.Model, scheme: Scheme, capability: Capability) -> None:
        self._scheme, self._capability = scheme, capability
        self._heads = output_heads(model)
        self._total: float | None = None
        if scheme.activation is not None and scheme.fallback is not None and self._timed():
            groups = by_input(quantized(model, scheme))
            self._total = sum(self._time(group, scheme.activation) for group in groups)

    def may_pay(self, groups: Sequence[Sequence[Linear]], static: float) -> bool:
        """Whether the fallback could pay at all, given the static scale's error: is it worth a search?"""
        if self._scheme.fallback is None:
            return False
        return self.pays(groups, static, 0.0)

    def pays(self, groups: Sequence[Sequence[Linear]], static: float, fallback: float) -> bool:
        """Whether to use the fallback at groups of Linears that read one value each, by the squared relative errors."""
        if any(linear.name in self._heads for group in groups for linear in group):
            static, fallback = HEAD_ERROR * static, HEAD_ERROR * fallback
        if self._total is None:
            return not holds(static, None if fallback == 0 else fallback)
        slower = sum(self._time(g, self._scheme.fallback) - self._time(g, self._scheme.activation) for g in groups)
        return static - fallback > ERROR_PER_TIME * slower / self._total

    def _timed(self) -> bool:
        timed = [kernel for kernel in self._capability.kernels if kernel.times]
        specs = (self._scheme.activation, self._scheme.fallback)
        return all(any(kernel.runs(self._scheme.weight, spec) for kernel in timed) for spec in specs)

    def _time(self, group: Sequence[Linear], spec: TensorSpec | None) -> float:
        """Of one product as wide as the group's together: what they read is quantized once."""
        width = sum(linear.out_features for linear in group)
        return self._capability.microseconds(group[0].in_features, width, (self._scheme.weight, spec))


def holds(static: float, fallback: float | None) -> bool:
    """Whether static quantization is good enough at a site, by its error and, if known, the fallback's."""
    return static <= STATIC_ERROR or (fallback is not None and static <= FALLBACK_GAIN * fallback)


def why_fallback(static: float, fallback: float) -> str:
    """The reason why a site does without a static scale."""
    return f"error {static:.1e} static, {fallback:.1e} so: worth its time"
