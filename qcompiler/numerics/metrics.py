"""How far a quantized result is from the float one: streaming meters, and functions for one pair of arrays."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_ROWS = 256  # rows of logits in float64 at a time


@dataclasses.dataclass
class SqnrMeter:
    """Signal to quantization noise ratio in dB, 10 · log10(Σ ref² / Σ (got - ref)²), pooled over all numbers seen."""

    signal: float = 0.0
    noise: float = 0.0

    def update(self, ref: Array, got: Array) -> None:
        """Add a pair of arrays of one shape."""
        ref, got = _pair(ref, got)
        for i in range(0, len(ref), _ROWS):
            part = ref[i : i + _ROWS].astype(np.float64)
            self.signal += float(np.vdot(part, part))
            part -= got[i : i + _ROWS]
            self.noise += float(np.vdot(part, part))

    @property
    def db(self) -> float:
        """In dB; inf where there is no error (or nothing seen), -inf where there is only error."""
        if self.noise == 0.0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


@dataclasses.dataclass
class CosineMeter:
    """Mean cosine of rows (the last axis); two rows of zeros agree (1), one of zeros and another do not (0)."""

    total: float = 0.0
    rows: int = 0

    def update(self, ref: Array, got: Array) -> None:
        """Add a pair of arrays [..., channels]."""
        ref, got = _pair(ref, got)
        dot, a, b = (np.einsum("nk,nk->n", x, y, dtype=np.float64) for x, y in ((ref, got), (ref, ref), (got, got)))
        norm = np.sqrt(a) * np.sqrt(b)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = np.where(norm > 0, dot / norm, (a == b).astype(np.float64))
        self.total += float(cosines.sum())
        self.rows += len(ref)

    @property
    def mean(self) -> float:
        return self.total / self.rows if self.rows else math.nan


@dataclasses.dataclass
class RowSumsMeter:
    """MSE, SQNR and cosine of pairs [rows, channels], from three sums of each row: the pairs themselves are not needed.

    The sums are Σ ref², Σ err² and Σ ref · err over the channels, with err = got - ref. The cosine comes from its
    sine, sin² = (Σ err² - (Σ ref · err)² / Σ ref²) / Σ got²: the straightforward quotient of float32 sums would lose
    a cosine near 1 in their rounding.
    """

    channels: int
    signal: float = 0.0
    noise: float = 0.0
    cosines: float = 0.0
    rows: int = 0

    def update(self, signal: Array, noise: Array, product: Array | None = None) -> None:
        """Add the sums [rows] of a batch of rows; without ``product`` the cosine stays unknown (NaN)."""
        s, n = np.asarray(signal, np.float64), np.asarray(noise, np.float64)
        self.signal += float(s.sum())
        self.noise += float(n.sum())
        self.rows += s.size
        if product is None:
            self.cosines = math.nan
            return
        p = np.asarray(product, np.float64)
        got = np.maximum(s + 2 * p + n, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            sine2 = np.clip((n - p * p / s) / got, 0, 1)
            cosines = np.where((s > 0) & (got > 0), np.copysign(np.sqrt(1 - sine2), s + p), (s == got) * 1.0)
        self.cosines += float(cosines.sum())

    @property
    def mse(self) -> float:
        """Mean squared error over all numbers; NaN where nothing was seen."""
        return self.noise / (self.rows * self.channels) if self.rows else math.nan

    @property
    def db(self) -> float:
        """As :class:`SqnrMeter`."""
        return SqnrMeter(self.signal, self.noise).db

    @property
    def cosine(self) -> float:
        """Mean cosine of rows, as :class:`CosineMeter`; NaN where unknown."""
        return self.cosines / self.rows if self.rows else math.nan


@dataclasses.dataclass
class LogitsMeter:
    """Agreement of two sets of logits, averaged over rows (tokens).

    Attributes (after updates):
        kl: mean KL(softmax(ref) || softmax(got)) in nats.
        top1: share of rows with the same largest logit.
    """

    divergence: float = 0.0
    agreed: int = 0
    rows: int = 0

    def update(self, ref: Array, got: Array) -> None:
        """Add a pair of logits [..., classes]."""
        ref, got = _pair(ref, got)
        for i in range(0, len(ref), _ROWS):
            log_p, log_q = log_softmax(ref[i : i + _ROWS]), log_softmax(got[i : i + _ROWS])
            self.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            p = np.exp(log_p)
            # Where p is 0 the term is 0, also for logits of -inf.
            log_q[p == 0], log_p[p == 0] = 0.0, 0.0
            self.divergence += float((p * (log_p - log_q)).sum())
        self.rows += len(ref)

    @property
    def kl(self) -> float:
        return self.divergence / self.rows if self.rows else math.nan

    @property
    def top1(self) -> float:
        return self.agreed / self.rows if self.rows else math.nan


@dataclasses.dataclass
class PerplexityMeter:
    """exp of the mean negative log likelihood of each next token; the first token of each sequence is given."""

    loss: float = 0.0
    tokens: int = 0

    def update(self, logits: Array, ids: Array, mask: Array | None = None) -> None:
        """Add logits [batch, sequence, vocabulary] of token ids [batch, sequence].

        ``mask`` [batch, sequence] is 0 on padding: a padded token is not predicted, nor predicts.
        """
        targets = ids[:, 1:]
        kept = np.ones(targets.shape, bool) if mask is None else (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        for row, target, keep in zip(logits, targets, kept, strict=True):
            for i in range(0, len(target), _ROWS):
                part = np.flatnonzero(keep[i : i + _ROWS]) + i
                log_p = log_softmax(row[part])
                self.loss -= float(np.take_along_axis(log_p, target[part, None], axis=-1).sum())
                self.tokens += len(part)

    @property
    def value(self) -> float:
        return math.exp(self.loss / self.tokens) if self.tokens else math.nan


def sqnr_db(ref: Array, got: Array) -> float:
    """:class:`SqnrMeter` of one pair."""
    meter = SqnrMeter()
    meter.update(ref, got)
    return meter.db


def cosine(ref: Array, got: Array) -> float:
    """:class:`CosineMeter` of one pair."""
    meter = CosineMeter()
    meter.update(ref, got)
    return meter.mean


def kl_divergence(ref: Array, got: Array) -> float:
    """Mean KL(softmax(ref) || softmax(got)) over rows of logits [..., classes], in nats."""
    meter = LogitsMeter()
    meter.update(ref, got)
    return meter.kl


def top1_agreement(ref: Array, got: Array) -> float:
    """Share of rows of logits [..., classes] whose largest is the same."""
    meter = LogitsMeter()
    meter.update(ref, got)
    return meter.top1


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    """log softmax over the last axis in float64, shifted by the maximum so that nothing overflows."""
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _pair(ref: Array, got: Array) -> tuple[Array, Array]:
    """Both as [rows, channels].

    Raises:
        ValueError: the shapes differ.
    """
    ref, got = np.asarray(ref), np.asarray(got)
    if ref.shape != got.shape:
        raise ValueError(f"arrays of shapes {ref.shape} and {got.shape} cannot be compared.")
    if not ref.ndim:
        return ref.reshape(1, 1), got.reshape(1, 1)
    return ref.reshape(-1, ref.shape[-1]), got.reshape(-1, got.shape[-1])
