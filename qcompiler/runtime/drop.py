"""max_drop: what a compiled model may lose at most, in the metric that the user names, and how it is measured."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import DataError, OptionError, unknown
from qcompiler.graph.run import Feeds
from qcompiler.numerics.budget import ratio_bound
from qcompiler.report.errors import sample_count, unmasked
from qcompiler.runtime.drop_metrics import METRICS, Metric, Pair
from qcompiler.runtime.evaluate import IDS, LOGITS

Arrays = Mapping[str, npt.NDArray[Any]]
Compare = Callable[[Arrays, Arrays, Feeds], float]
"""(float outputs, quantized outputs, feeds) of one batch -> what it loses; smaller is better."""


@dataclasses.dataclass(frozen=True)
class MaxDrop:
    """What may be lost: a metric and its limit.

    Attributes:
        name: the metric's, or the callable's qualified name.
        limit: in the user's units.
        compare: the user's own metric, or None: :data:`~qcompiler.runtime.drop_metrics.METRICS` has it.
    """

    name: str
    limit: float
    compare: Compare | None = None

    @classmethod
    def parse(cls, given: Any) -> MaxDrop:
        """Read ``{"sqnr": 26.0}`` or ``(callable, limit)``.

        Raises:
            OptionError: not of that form, an unknown metric, or a limit that is no finite number or cannot be meant.
        """
        if isinstance(given, MaxDrop):
            return given
        if isinstance(given, tuple) and len(given) == 2 and callable(given[0]):
            compare, limit = given
            name = f"{getattr(compare, '__module__', '')}.{getattr(compare, '__qualname__', type(compare).__name__)}"
            return cls(name.lstrip("."), _finite(name, limit), compare)
        if not isinstance(given, Mapping) or len(given) != 1:
            raise OptionError(
                f"max_drop is {given!r}: write one metric and its limit, like {{'sqnr': 26.0}}, or (callable, limit)."
            )
        ((name, limit),) = given.items()
        if name not in METRICS:
            raise unknown("metric of max_drop", str(name), METRICS)
        number = _finite(name, limit)
        if number < 0:
            raise OptionError(f"max_drop {name}={number:g} cannot be: the limit is not negative.")
        return cls(name, number)

    @property
    def metric(self) -> Metric | None:
        return METRICS.get(self.name) if self.compare is None else None

    @property
    def ratio(self) -> float:
        """The limit as the ratio that :meth:`Drop.verdict` tells."""
        return self.limit if self.metric is None else self.metric.limit(self.limit)

    def text(self, ratio: float) -> str:
        """A ratio in the user's words."""
        return f"{ratio:.4g}" if self.metric is None else self.metric.text(ratio)

    def check(self, kind: str, outputs: Iterable[str]) -> None:
        """Compare with the model: its kind (``Source.kind``) and its float outputs.

        Raises:
            OptionError: the model has not what the metric needs.
        """
        outputs = list(outputs)
        fitting = [name for name in outputs if self._compares(name)]
        if self.metric is not None and self.metric.causal and (kind != "causal-lm" or not fitting):
            raise OptionError(
                f"max_drop {self.name} needs a causal language model with an output {LOGITS!r}, and this is of kind "
                f"{kind!r}: choose sqnr or cosine."
            )
        if not fitting:
            wanted = f"an output named like {LOGITS!r}" if self.metric is not None and self.metric.logits else "one"
            raise OptionError(f"max_drop {self.name} needs {wanted}, and the model's are {', '.join(outputs)}.")

    def ordering(self) -> MaxDrop:
        """The drop that tells what single sites cost: one that no site can lower, and that adds up over sites."""
        if self.compare is not None:
            return MaxDrop("sqnr", 0.0)
        return MaxDrop("kl", 0.0) if self.name == "perplexity" else self

    def _compares(self, output: str) -> bool:
        if self.metric is not None and self.metric.causal:
            return output == LOGITS
        return self.metric is None or not self.metric.logits or LOGITS in output

    def pairs(self, want: Arrays, have: Arrays, feeds: Feeds) -> Iterator[tuple[str, Pair]]:
        """What the samples of a batch add, by output.

        Raises:
            OptionError: the user's callable fails, or returns no finite number.
        """
        if self.compare is not None:
            count = sample_count(feeds)
            yield self.name, (_finite(self.name, self.compare(want, have, feeds), "returned") * count, count)
            return
        assert self.metric is not None
        for name, reference in want.items():
            if np.issubdtype(reference.dtype, np.floating) and self._compares(name):
                for rows, got, own in _samples(reference, have[name], feeds):
                    # A NaN must not pass for an ordinary loss: the meters give it a cosine of 0, say.
                    yield name, (math.nan, 1.0) if np.isnan(got).any() else self.metric.pair(rows, got, own)


@dataclasses.dataclass
class Drop:
    """The drop of one candidate over the samples seen so far."""

    allowed: MaxDrop
    _pairs: dict[str, list[Pair]] = dataclasses.field(default_factory=dict)

    def update(self, want: Arrays, have: Arrays, feeds: Feeds) -> None:
        """Add a batch: float outputs, quantized outputs, feeds."""
        for name, pair in self.allowed.pairs(want, have, feeds):
            self._pairs.setdefault(name, []).append(pair)

    @property
    def total(self) -> float:
        """Sum over outputs of the ratios; NaN where one is none."""
        ratios = [_ratio(pairs) for pairs in self._pairs.values()]
        return sum(ratios) if ratios else math.nan

    def verdict(self) -> Verdict:
        """Ratio and bound of the output that is worst, judged by the bound.

        Raises:
            DataError: fewer than two samples.
        """
        if not self._pairs or min(map(len, self._pairs.values())) < 2:
            raise DataError("max_drop needs two validation samples (batches, for a callable) at least.")
        found = []
        for name, pairs in self._pairs.items():
            numerators, denominators = np.transpose(pairs)
            found.append(Verdict(name, *ratio_bound(numerators, denominators), len(pairs)))
        return max(found, key=lambda verdict: (math.isnan(verdict.bound), verdict.bound))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a candidate loses at its worst output.

    Attributes:
        output: that output.
        ratio: the drop on the samples.
        bound: that it stays below on as many new samples (:func:`qcompiler.numerics.budget.ratio_bound`).
        samples: how many.
    """

    output: str
    ratio: float
    bound: float
    samples: int

    def holds(self, allowed: MaxDrop) -> bool:
        """Whether the bound is within the limit; never for NaN."""
        return self.bound <= allowed.ratio


def float_outputs(model: ir.Model) -> list[str]:
    """Names of the outputs that can be compared."""
    return [v.name or "" for v in model.graph.outputs if v.dtype is None or v.dtype.is_floating_point()]


def _samples(
    want: npt.NDArray[Any], have: npt.NDArray[Any], feeds: Feeds
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any], Feeds]]:
    """Unmasked rows of each sample [rows, channels]; the whole batch as one where samples cannot be told apart."""
    count = sample_count(feeds)
    if not want.ndim or len(want) != count or have.shape != want.shape:
        yield _rows(want), _rows(have), feeds
        return
    keep = unmasked(feeds, want.shape[:-1]) if want.ndim > 1 else np.ones(want.shape, bool)
    for i in range(count):
        one, kept = slice(i, i + 1), keep[i : i + 1]
        ids = feeds.get(IDS)
        own = {IDS: ids[one][kept]} if ids is not None and ids.shape == keep.shape else {}
        yield _rows(want[one][kept]), _rows(have[one][kept]), own


def _rows(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)


def _ratio(pairs: Iterable[Pair]) -> float:
    numerator, denominator = (sum(column) for column in zip(*pairs, strict=True))
    return numerator / denominator if denominator else math.nan


def _finite(name: Any, value: Any, verb: str = "has the limit") -> float:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise OptionError(f"max_drop {name} {verb} {value!r}: a finite number is wanted.")
    return float(value)
