"""Where a quantized model's error comes from, as data: a row a Linear, a row a site, JSON, a page."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.report.data import LinearRow, plain

VERSION = 1
METRICS = {"sqnr": -1, "mse": 1, "cosine": -1}
"""The metrics by name; 1: larger is worse, -1: smaller is."""
CUSTOM = "custom"
OUTLIER = 6.0
"""A channel is an outlier where its absmax is above this many times the median of the site's channels. LLM.int8()
(Dettmers et al. 2022, section 3.3) takes a magnitude of 6.0 in models whose activations are about 1; relative to the
median it holds for any model, and for activations that a transform has scaled."""


@dataclasses.dataclass(frozen=True)
class Errors:
    """How far one output is from the float one, over all unmasked rows (tokens) of the data.

    Attributes:
        mse: mean squared error.
        sqnr_db: 10·log10(Σref² / Σerr²), in dB; inf where there is no error.
        cosine: mean over rows of the cosine.
        custom: the user's own metric, averaged over rows; None where there is none.
    """

    mse: float
    sqnr_db: float
    cosine: float
    custom: float | None = None

    def by(self, metric: str) -> float:
        """The figure of that metric."""
        figures = {"mse": self.mse, "sqnr": self.sqnr_db, "cosine": self.cosine, CUSTOM: self.custom}
        value = figures[metric]
        return math.nan if value is None else value


@dataclasses.dataclass(frozen=True)
class Layer:
    """One Linear.

    Attributes:
        row: name, shape, specs, what a transform did, why it was left in float.
        site: name of the value that it reads, in the transformed float graph.
        alone: its error where it alone is quantized; None: it is in float, or the float graph has not the same weight.
        accumulated: its error in the quantized model, upstream errors included; None: it is in float.
    """

    row: LinearRow
    site: str
    alone: Errors | None
    accumulated: Errors | None

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of weight and activation; 32 for float."""
        return bits_of(self.row.weight), bits_of(self.row.activation)


@dataclasses.dataclass(frozen=True, eq=False)
class Ranges:
    """What was seen of one value [..., channels].

    Attributes:
        low, high: its smallest and largest number.
        absmax: float32 [channels], max|x| of each channel.
    """

    low: float
    high: float
    absmax: npt.NDArray[np.float32]

    @property
    def ratio(self) -> float:
        """Largest channel absmax / median channel absmax; inf where most channels are 0 and some are not."""
        largest, median = float(self.absmax.max()), float(np.median(self.absmax))
        if median > 0:
            return largest / median
        return math.inf if largest > 0 else 1.0

    @property
    def outliers(self) -> tuple[int, ...]:
        """Channels whose absmax is above ``OUTLIER`` times the median, in ascending order."""
        return tuple(int(i) for i in np.flatnonzero(self.absmax > OUTLIER * np.median(self.absmax)))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; channel maxima with five significant digits."""
        return {
            "min": _short(self.low),
            "max": _short(self.high),
            "outlier_ratio": plain(_short(self.ratio)),
            "outlier_channels": list(self.outliers),
            "channel_absmax": [_short(float(x)) for x in self.absmax],
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A value that Linears read.

    Attributes:
        name: of the value, in the transformed float graph.
        linears: who reads it.
        before: its ranges in the float model as it came; None: a transform made this site.
        after: its ranges behind the transforms, which are what is quantized.
        transform: what transforms did for its readers, each as "what: why".
    """

    name: str
    linears: tuple[str, ...]
    before: Ranges | None
    after: Ranges
    transform: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """What :func:`qcompiler.analyze` found.

    Attributes:
        model, kind: of the source.
        scheme, passes: what was analysed; ``passes`` as their text.
        metric: what layers are ranked by: a name of ``METRICS``, or "custom".
        metric_name: the same as the user reads it: a callable's own name.
        samples: how many samples errors were measured on.
        layers: one for each Linear, in graph order.
        sites: one for each value that Linears read, in graph order.
        outputs: errors of the quantized model's float outputs, by name.
    """

    model: str
    kind: str
    scheme: str
    passes: str
    metric: str
    metric_name: str
    samples: int
    layers: tuple[Layer, ...]
    sites: tuple[Site, ...]
    outputs: Mapping[str, Errors]

    def worst(self, top: int | None = None) -> list[Layer]:
        """Quantized Linears, the largest error alone first; behind them those whose error alone is not known, by the
        accumulated one."""
        sign = METRICS.get(self.metric, 1)

        def key(layer: Layer) -> tuple[bool, float]:
            error = layer.alone or layer.accumulated
            assert error is not None
            return layer.alone is None, -sign * error.by(self.metric)

        return sorted((layer for layer in self.layers if layer.accumulated is not None), key=key)[:top]

    def worst_sites(self, top: int | None = None) -> list[Site]:
        """The sites of the worst Linears, each once."""
        by_name = {site.name: site for site in self.sites}
        return [by_name[name] for name in dict.fromkeys(layer.site for layer in self.worst())][:top]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict, with the version of this layout."""
        return {
            "version": VERSION,
            **{key: getattr(self, key) for key in ("model", "kind", "scheme", "passes", "metric_name", "samples")},
            "metric": self.metric,
            "outlier_threshold": OUTLIER,
            "outputs": {name: _errors(errors) for name, errors in self.outputs.items()},
            "layers": [_layer(layer) for layer in self.layers],
            "sites": [
                {
                    "name": site.name,
                    "linears": list(site.linears),
                    "transform": list(site.transform),
                    "before": site.before.to_json() if site.before is not None else None,
                    "after": site.after.to_json(),
                }
                for site in self.sites
            ],
        }

    def to_text(self) -> str:
        """The text of a JSON file; no indentation, for a site has a number for each channel."""
        return json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False) + "\n"

    def to_html(self, top: int = 10) -> str:
        """One self-contained page with tables and plots; the ``top`` worst Linears come first.

        Raises:
            OptionError: matplotlib is not installed.
        """
        from qcompiler.report.page import to_html

        return to_html(self, top)

    def __rich__(self) -> Any:
        """The tables that a rich console prints."""
        from qcompiler.report.analysis_tables import to_rich

        return to_rich(self)


def bits_of(spec: str) -> int:
    """Bits of a dtype or of a spec that starts with it ("uint8 per_token dynamic"); 32 for "float".

    >>> bits_of("uint4 per_group(64) static"), bits_of("float")
    (4, 32)
    """
    match = re.match(r"[a-z]+(\d+)", spec)
    return int(match[1]) if match else 32


def _layer(layer: Layer) -> dict[str, Any]:
    row, (weight_bits, activation_bits) = layer.row, layer.bits
    return {
        "name": row.name,
        "site": layer.site,
        "in_features": row.in_features,
        "out_features": row.out_features,
        "weight": row.weight,
        "activation": row.activation,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "transform": row.transform,
        "reason": row.reason,
        "alone": _errors(layer.alone),
        "accumulated": _errors(layer.accumulated),
    }


def _errors(errors: Errors | None) -> dict[str, Any] | None:
    if errors is None:
        return None
    fields = {key: value for key, value in dataclasses.asdict(errors).items() if value is not None}
    data: dict[str, Any] = plain(fields)
    return data


def _short(value: float) -> float:
    return float(f"{value:.5g}")
