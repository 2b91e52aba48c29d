"""The report as data: one row a Linear, totals, and every decision; JSON there and back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from qcompiler.core import ArtefactError, Note

VERSION = 1


@dataclasses.dataclass(frozen=True)
class LinearRow:
    """What became of one Linear.

    Attributes:
        name: the Linear's name in the canonical graph.
        in_features, out_features: shape of its weight.
        weight: how its weight is stored, e.g. "int8 per_channel static"; "float" where it was left.
        activation: how its input is quantized, or "float".
        kernel: the operator that computes it in the graph that ONNX Runtime really runs.
        transform: what was folded or inserted before it, and why; why its activation has another spec than the
            scheme's; "" for neither.
        sqnr_db: SQNR of its output in the quantized model against the float model, in dB: errors from upstream
            included ("accumulated"); None: not measured.
        alone_db: the same where this Linear alone is quantized and everything upstream is float; None: not measured.
        reason: why it was left in float; "" for a quantized one.
    """

    name: str
    in_features: int
    out_features: int
    weight: str
    activation: str
    kernel: str
    transform: str = ""
    sqnr_db: float | None = None
    alone_db: float | None = None
    reason: str = ""

    @property
    def quantized(self) -> bool:
        return self.weight != "float"


@dataclasses.dataclass(frozen=True)
class Report:
    """What was done to every layer, why, and what it cost.

    Attributes:
        rows: one for each Linear, in graph order.
        size_before, size_after: bytes of all initializers, of the float and of the lowered model.
        coverage_body, coverage_head: share of the Linears' multiplications in integer kernels, read back from the
            optimised graph; the output head apart (None: the model has no such Linear).
        output_sqnr_db: SQNR in dB of each output of the lowered model against the float one, by name.
        samples: how many calibration samples the errors were measured on.
        seconds: wall seconds of each stage.
        peak_rss: peak resident memory of the process so far, bytes.
        notes: every decision of passes and target.
    """

    rows: tuple[LinearRow, ...]
    size_before: int
    size_after: int
    coverage_body: float | None = None
    coverage_head: float | None = None
    output_sqnr_db: Mapping[str, float] = dataclasses.field(default_factory=dict)
    samples: int = 0
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    peak_rss: int = 0
    notes: tuple[Note, ...] = ()

    def __rich__(self) -> Any:
        """The tables that a rich console prints."""
        from qcompiler.report.render import to_rich

        return to_rich(self)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; numbers that JSON cannot write (an error of exactly 0 is inf dB) become strings."""
        data: dict[str, Any] = plain({"version": VERSION, **dataclasses.asdict(self)})
        return data

    def to_text(self) -> str:
        """The text of report.json."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The report of :meth:`to_json`.

        Raises:
            ArtefactError: another version, or not a report.
        """
        if data.get("version") != VERSION:
            raise ArtefactError(f"report of version {data.get('version')!r}: this qcompiler reads version {VERSION}.")
        try:
            fields = {key: _numbers(value) for key, value in data.items() if key != "version"}
            fields["rows"] = tuple(LinearRow(**_numbers(row)) for row in data["rows"])
            fields["notes"] = tuple(Note(**note) for note in data["notes"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"the report cannot be read: {error}.") from None

    def __str__(self) -> str:
        from qcompiler.report.render import to_markdown

        return to_markdown(self)


_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def plain(value: Any) -> Any:
    """JSON-ready data: tuples become lists, and numbers that JSON cannot write the strings "inf", "-inf" and "nan"."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _numbers(value: Any) -> Any:
    """Undo :func:`plain` in a dict of numbers by name; text fields never read "inf" or "nan"."""
    if isinstance(value, Mapping):
        return {key: _WORDS.get(item, item) if isinstance(item, str) else item for key, item in value.items()}
    return value
