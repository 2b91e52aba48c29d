"""split: the decomposition of LLM.int8() (Dettmers et al. 2022, section 3.2), with outlier channels from calibration.

A few input channels of a Linear may be so much larger than the rest, in a few tokens, that no scale serves both. They
leave the quantized product, x W = (m ∘ x) W + x[:, o] W[o, :] with m zero at the outlier channels o and one elsewhere,
and are multiplied in float: a product with as many terms as there are outlier channels. The Mul by m costs nothing
where ``smooth`` scales this input anyway, since its 1/s is folded into m.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import Note, StatRequest
from qcompiler.graph.edit import (
    add_initializer,
    array_of,
    first_of,
    insert_node,
    replace_value,
    unique_name,
    write_input,
)
from qcompiler.graph.heads import output_heads
from qcompiler.graph.linear import Linear
from qcompiler.numerics.site_judge import Reader
from qcompiler.numerics.site_search import ALPHAS, search_site
from qcompiler.passes.base import Context, Pass, PassResult, Stats
from qcompiler.passes.judging import by_input, keep_float, quantized, reader, sample_request

_ALPHA = 0.8  # a middling scale, for a first look


@dataclasses.dataclass(frozen=True)
class Split(Pass):
    """Keep a few outlier channels in float where that lowers the site's error.

    Where the scheme has an ``outlier_threshold``, the paper's rule decides instead: all channels that reach it over the
    calibration data leave, at every quantized Linear, whatever that gains.

    Output heads are left alone (one more addition over a vocabulary costs too much), and so are weights that several
    Linears share (each would get a copy of its own).

    Attributes:
        channels: how many channels of one input are kept in float.
        gain: the squared error must fall by this factor at least (2: 3 dB).
        rows: calibration rows each site is judged on.
    """

    name: ClassVar[str] = "split"
    float_exact: ClassVar[bool] = True
    channels: int = 4
    gain: float = 2.0
    rows: int = 512

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        if ctx.scheme.activation is None:
            return []
        if ctx.scheme.outlier_threshold is not None:
            return [_magnitude(linear) for linear in quantized(model, ctx.scheme)]
        return [sample_request(linear, self.rows) for linear in quantized(model, ctx.scheme)]

    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        notes = []
        if ctx.scheme.activation is None:
            return PassResult(False)
        if ctx.scheme.outlier_threshold is not None:
            return _by_threshold(model, stats, ctx.scheme.outlier_threshold, ctx)
        heads = output_heads(model)
        for group in by_input(quantized(model, ctx.scheme)):
            shared = any(len(linear.weight.uses()) > 1 for linear in group)
            if group[0].in_features < 16 * self.channels or shared or any(linear.name in heads for linear in group):
                continue
            site = reader(group, stats[sample_request(group[0], self.rows)], None, ctx.scheme, ctx.seed)
            outliers = _loudest(site, self.channels)
            rest = _without(site, outliers)
            fall = _fall(site, rest, (_ALPHA,), ctx)
            if fall >= self.gain:  # it was judged with one scale; with the best one, each may do better
                fall = _fall(site, rest, ALPHAS, ctx)
            if fall >= self.gain:
                _split(model.graph, group, outliers)
                channels = ", ".join(map(str, outliers))
                why = f"channels {channels} in float: error falls by {10 * np.log10(fall):.1f} dB"
                notes += [Note(linear.name, "split", why) for linear in group]
        return PassResult(bool(notes), tuple(notes))


def _magnitude(linear: Linear) -> StatRequest:
    return StatRequest(linear.x.name or "", "absmax", -1)


def _by_threshold(model: ir.Model, stats: Stats, threshold: float, ctx: Context) -> PassResult:
    """Channels that reach the threshold leave; a Linear of nothing else stays in float."""
    notes = []
    for group in by_input(quantized(model, ctx.scheme)):
        absmax = stats[_magnitude(group[0])]
        outliers = np.flatnonzero(absmax >= threshold)
        if not len(outliers):
            continue
        why = f"{len(outliers)} of {len(absmax)} channels reach {threshold:g} and stay in float"
        if len(outliers) == len(absmax):
            for linear in group:
                keep_float(linear.matmul, f"all {len(absmax)} channels of its input reach {threshold:g}")
        else:
            _split(model.graph, group, outliers)
            notes += [Note(linear.name, "split", why) for linear in group]
    return PassResult(bool(notes), tuple(notes))


def _fall(site: Reader, rest: Reader, alphas: Sequence[float], ctx: Context) -> float:
    """The factor by which the squared error of the site's outputs falls without its outlier channels."""
    before, after = (_noise(each, alphas, ctx) for each in (site, rest))
    return before / after if after > 0 else 1.0


def _noise(site: Reader, alphas: Sequence[float], ctx: Context) -> float:
    """Squared error of the site's outputs on held-out rows, with the best smoothing scale of ``alphas`` or none."""
    assert ctx.scheme.activation is not None
    choice = search_site(
        [site],
        ctx.scheme.activation,
        ctx.scheme.weight,
        channels=len(site.weight),
        alphas=alphas,
        reduce_range=ctx.capability.reduce_range,
    )
    return choice.error * float(np.square(site.rows @ site.weight, dtype=np.float64).sum())


def _loudest(site: Reader, count: int) -> npt.NDArray[np.int64]:
    """The channels that may weigh most in the output: largest max|x_k|² · ‖W_k‖², in ascending order."""
    absmax = np.maximum(np.abs(site.low), np.abs(site.high)).max(0)
    loudness = np.square(absmax) * np.einsum("kn,kn->k", site.weight, site.weight)
    return np.sort(np.argpartition(-loudness, count)[:count])


def _without(site: Reader, outliers: npt.NDArray[np.int64]) -> Reader:
    keep = np.ones(len(site.weight), np.float32)
    keep[outliers] = 0
    return dataclasses.replace(
        site,
        rows=site.rows * keep,
        low=site.low * keep,
        high=site.high * keep,
        weight=site.weight * keep[:, None],
    )


def _split(graph: ir.Graph, group: Sequence[Linear], outliers: npt.NDArray[np.int64]) -> None:
    x, name = group[0].x, group[0].x.name or ""
    first = first_of(graph, {linear.matmul for linear in group})
    mask = np.ones(group[0].in_features, np.float32)
    mask[outliers] = 0
    masked = insert_node(
        graph, first, "Mul", [x, add_initializer(graph, f"{name}.inliers", mask)], name=f"{name}.masked", like=x
    )
    indices = add_initializer(graph, f"{name}.outlier_channels", outliers.astype(np.int64))
    few = insert_node(graph, first, "Gather", [x, indices], attributes={"axis": -1}, name=f"{name}.outliers")
    few.outputs[0].type = x.type
    for linear in group:
        weight = array_of(linear.weight)
        assert weight is not None
        linear.matmul.replace_input_with(0, masked.outputs[0])
        write_input(linear.matmul, 1, weight * mask[:, None])
        rows = add_initializer(graph, f"{linear.name}.outliers.weight", weight[outliers])
        output = linear.output
        product = ir.node("MatMul", [few.outputs[0], rows], name=f"{linear.name}.outliers")
        total = ir.node("Add", [output, product.outputs[0]], name=f"{linear.name}.split")
        for node in (product, total):
            node.outputs[0].type, node.outputs[0].shape = output.type, output.shape
            node.outputs[0].name = unique_name(graph, node.name or "")
        replace_value(output, total.outputs[0])
        total.replace_input_with(0, output)
        graph.insert_after(linear.nodes[-1], [product, total])
        keep_float(product, "outlier channels, kept in float by split")
