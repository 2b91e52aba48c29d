"""The metrics of ``max_drop``, each a ratio of sums over samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.graph.run import Feeds
from qcompiler.numerics.metrics import CosineMeter, LogitsMeter, PerplexityMeter, SqnrMeter
from qcompiler.runtime.evaluate import IDS

Pair = tuple[float, float]
"""What one sample adds to a drop's numerator and denominator."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A drop that is a ratio of sums over samples; smaller is better.

    Attributes:
        pair: what one sample adds, from its unmasked float and quantized rows [rows, channels] and its feeds.
        limit: the ratio that stands for the user's limit.
        text: a ratio, in the user's words.
        logits: it compares logits only.
        causal: it needs the next tokens of a causal language model.
    """

    pair: Callable[[npt.NDArray[Any], npt.NDArray[Any], Feeds], Pair]
    limit: Callable[[float], float] = float
    text: Callable[[float], str] = "{:.3g}".format
    logits: bool = False
    causal: bool = False


def _sqnr(want: npt.NDArray[Any], have: npt.NDArray[Any], _: Feeds) -> Pair:
    meter = SqnrMeter()
    meter.update(want, have)
    return meter.noise, meter.signal


def _cosine(want: npt.NDArray[Any], have: npt.NDArray[Any], _: Feeds) -> Pair:
    meter = CosineMeter()
    meter.update(want, have)
    return meter.rows - meter.total, meter.rows


def _kl(want: npt.NDArray[Any], have: npt.NDArray[Any], _: Feeds) -> Pair:
    meter = LogitsMeter()
    meter.update(want, have)
    return meter.divergence, meter.rows


def _perplexity(want: npt.NDArray[Any], have: npt.NDArray[Any], feeds: Feeds) -> Pair:
    """Log of the ratio of perplexities: the mean difference of the tokens' losses, which vary much more themselves."""
    meters = PerplexityMeter(), PerplexityMeter()
    for meter, logits in zip(meters, (want, have), strict=True):
        meter.update(logits[None], np.asarray(feeds[IDS])[None])
    return meters[1].loss - meters[0].loss, meters[0].tokens


def _decibels(ratio: float) -> str:
    return f"{-10 * math.log10(ratio):.2f} dB" if ratio > 0 else f"{math.inf if ratio == 0 else math.nan} dB"


METRICS: Mapping[str, Metric] = {
    "sqnr": Metric(_sqnr, lambda db: 10 ** (-db / 10), _decibels),
    "cosine": Metric(_cosine),
    "kl": Metric(_kl, text="{:.3g} nats".format, logits=True),
    "perplexity": Metric(_perplexity, math.log1p, lambda r: f"{math.expm1(r):+.3%}", logits=True, causal=True),
}
"""sqnr: at least so many dB, of every float output. cosine: 1 - cosine, kl: nats a token, perplexity: relative
increase, each at most."""
