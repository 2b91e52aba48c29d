"""The small shared types: errors, notes, statistics requests, fold plans, what a target can run.

Everything here is plain data, imported by every layer above and importing none of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

DOMAIN = "qcompiler"
"""Domain of the model-local functions (RMSNorm, Attention, FakeQuant …) that passes see and lowering removes."""


class QCompilerError(Exception):
    """Base of every error a user may meet: one sentence that says what was wrong, where, and what to do."""


class ModelError(QCompilerError):
    """The model cannot be read, traced or brought into canonical form."""


class DataError(QCompilerError):
    """Calibration or evaluation data is empty, not finite, or does not fit the model's inputs."""


class OptionError(QCompilerError):
    """An unknown or impossible scheme, target, pass, observer or option."""


class TargetError(QCompilerError):
    """The target cannot run what the scheme asks for."""


class ArtefactError(QCompilerError):
    """A saved folder cannot be written, read, or migrated."""


def unknown(kind: str, name: str, known: Iterable[str]) -> OptionError:
    """The error for a name that is in no table, with the nearest names that are.

    >>> str(unknown("scheme", "w8a9", ["w8a8", "w8a8-dynamic"]))
    "unknown scheme 'w8a9': did you mean 'w8a8' or 'w8a8-dynamic'? Known: w8a8, w8a8-dynamic."
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? Known" if near else "known"
    return OptionError(f"unknown {kind} {name!r}: {hint}: {', '.join(known)}.")


@dataclasses.dataclass(frozen=True)
class Note:
    """One decision about one node: what was done (or not) and why. The report is made of these."""

    node: str
    what: str
    why: str


@dataclasses.dataclass(frozen=True)
class StatRequest:
    """A statistic that a pass wants of one value; equal requests share one observer.

    Attributes:
        value: name of the value in the graph.
        observer: the observer's spelling, e.g. ``"minmax"`` or ``"percentile{percent=99.99}"``.
        axis: channel axis to keep (``-1``: one result for each channel), or None for one result per tensor.
    """

    value: str
    observer: str
    axis: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class FoldPlan:
    """What a transform did at one site, as data, so that it can be replayed, shown and saved.

    In float the rewrite is the identity: ``x' = (x - shift) / scale`` on the source's side and
    ``W' = scale[:, None] * W``, ``b' = b + shift @ W`` on the sinks' side.

    Attributes:
        kind: "fold" (the source's weights absorb it), "insert" (ops before the sinks do) or "rotate" (``x' = x Q``:
            the weights on both sides absorb an orthogonal matrix).
        source: name of the node that absorbs 1/scale, or of the value where ops were inserted.
        sinks: names of the Linears that absorb scale, or whose weights are rotated.
        scale: float32 [channels] of the source, or None.
        shift: float32 [channels] of the source, or None.
        proof: relative error bound of the region's float64 equivalence test (max|a-b| / max|a|).
        why: what the transform chose here, and what it gained.
        rotation: what makes Q: float32 [n], the signs of the rows of ``numerics.hadamard.hadamard(n)`` / sqrt(n), or
            [n, n], itself; or None.
    """

    kind: str
    source: str
    sinks: tuple[str, ...]
    scale: npt.NDArray[np.float32] | None
    shift: npt.NDArray[np.float32] | None = None
    proof: float = float("nan")
    why: str = ""
    rotation: npt.NDArray[np.float32] | None = None


class Executable(Protocol):
    """A compiled model that runs by itself: what a target makes that is no graph for ONNX Runtime."""

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], threads: int = 0) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name; ``threads`` 0 leaves the number to the target."""

    def save(self, folder: Path) -> None:
        """Write what :meth:`qcompiler.targets.base.Target.load` reads, beside the model."""


class Quantization(Protocol):
    """What a kernel asks of a tensor's spec (``scheme.TensorSpec`` is one)."""

    @property
    def dtype(self) -> str: ...
    @property
    def granularity(self) -> str: ...
    @property
    def dynamic(self) -> bool: ...
    @property
    def group_size(self) -> int | None: ...


Times = tuple[tuple[int, int, float], ...]
"""(in_features, out_features, microseconds) of the Linears that were measured."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way in which a target runs a quantized Linear.

    Attributes:
        name: the operator's name, e.g. "MatMulIntegerToFloat".
        weight_dtype, weight_granularity: what it takes as weight ("int8", "per_channel").
        activation_dtype, activation_granularity, dynamic: what it takes as input ("uint8", "per_tensor", False); of a
            weight-only kernel "float" and "".
        speed: against the target's float32 MatMul, on the machine of the cost table (higher is faster); None: not in
            the table, because there is nothing to choose from.
        group_sizes: of the weights and activations that it takes in groups.
        times: what it takes for as many rows (tokens) as the target is tuned for; empty: it was not measured.
    """

    name: str
    weight_dtype: str
    weight_granularity: str
    activation_dtype: str
    activation_granularity: str
    dynamic: bool
    speed: float | None
    group_sizes: tuple[int, ...] = ()
    times: Times = ()

    def runs(self, weight: Quantization, activation: Quantization | None) -> bool:
        """Whether it takes a weight and an input quantized so; activation None: an input in float."""
        read = ("float", "", False)
        if activation is not None:
            read = (activation.dtype, activation.granularity, activation.dynamic)
        sizes = {spec.group_size for spec in (weight, activation) if spec is not None} - {None}
        return (
            (self.weight_dtype, self.weight_granularity) == (weight.dtype, weight.granularity)
            and (self.activation_dtype, self.activation_granularity, self.dynamic) == read
            and sizes <= set(self.group_sizes)
        )


@dataclasses.dataclass(frozen=True)
class Capability:
    """What a target can run, as data: handed to passes, which never import a target.

    Attributes:
        target: the target's name.
        kernels: the quantized Linears it has.
        reduce_range: True where u8 x s8 products saturate in 16 bits (x86 without VNNI): weights then keep 7 bits.
        float_times: what its float32 MatMul takes, as ``Kernel.times``.
        embeddings: dtypes of embedding tables in groups that it gathers rows of -> the group sizes that it takes.
    """

    target: str
    kernels: tuple[Kernel, ...]
    reduce_range: bool = False
    float_times: Times = ()
    embeddings: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def runs(self, weight: Quantization, activation: Quantization | None) -> bool:
        """Whether any kernel takes a weight and an input quantized so; activation None: an input in float."""
        return any(kernel.runs(weight, activation) for kernel in self.kernels)

    def measured(self, weight: Quantization, activation: Quantization | None) -> bool:
        """Whether any kernel that :meth:`runs` them has times."""
        return any(kernel.times and kernel.runs(weight, activation) for kernel in self.kernels)

    def microseconds(
        self, in_features: int, out_features: int, quantization: tuple[Quantization, Quantization | None] | None
    ) -> float:
        """What a Linear takes, by its fastest kernel for (weight, activation), or in float (None).

        Of the nearest measured shape (in the logarithms), in proportion to in_features x out_features.

        Raises:
            TargetError: no such kernel was measured.
        """
        tables = (
            [self.float_times]
            if quantization is None
            else [kernel.times for kernel in self.kernels if kernel.runs(*quantization)]
        )
        found = [_scaled(times, in_features, out_features) for times in tables if times]
        if not found:
            what = (
                "float Linears" if quantization is None else f"weight {quantization[0]}, activation {quantization[1]}"
            )
            raise TargetError(f"target {self.target!r} has no measured times of {what}: choose a target that has them.")
        return min(found)


def _scaled(times: Times, in_features: int, out_features: int) -> float:
    nearest = min(times, key=lambda t: (math.log(t[0] / in_features) ** 2 + math.log(t[1] / out_features) ** 2, t))
    return nearest[2] * (in_features * out_features) / (nearest[0] * nearest[1])


# --- the one text spelling of passes, observers and their options: ``name{key=value,key=value}`` ---------------------

_ITEM = re.compile(r"\s*([\w-]+)\s*(?:\{([^{}]*)\})?\s*(,|$)")


def parse_spelling(text: str) -> list[tuple[str, dict[str, str]]]:
    """Split ``"smooth{alpha=0.5},insert,fold"`` into ``[("smooth", {"alpha": "0.5"}), ("insert", {}), ("fold", {})]``.

    Raises:
        OptionError: where the text is not of that form.
    """
    items: list[tuple[str, dict[str, str]]] = []
    position = 0
    while position < len(text):
        match = _ITEM.match(text, position)
        if match is None:
            raise OptionError(f"cannot read {text!r} from {text[position:]!r} on: write name{{key=value,...}},name,...")
        options = {}
        for pair in filter(None, (part.strip() for part in (match[2] or "").split(","))):
            key, equals, value = pair.partition("=")
            if not equals:
                raise OptionError(f"cannot read option {pair!r} of {match[1]!r}: write {match[1]}{{key=value}}")
            options[key.strip()] = value.strip()
        items.append((match[1], options))
        position = match.end()
    return items


_READERS: Mapping[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
}


def build_from_spelling(kind: str, cls: Any, name: str, options: Mapping[str, str]) -> Any:
    """Make the frozen dataclass ``cls`` from text options; its fields are the options it knows.

    Raises:
        OptionError: an option that is no field, or a value that does not read as the field's type.
    """
    fields = {f.name: str(f.type) for f in dataclasses.fields(cls) if f.init}
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in fields:
            raise unknown(f"option of {kind} {name!r}", key, fields)
        annotation = fields[key].replace(" ", "")
        if text == "none" and annotation.endswith("|None"):
            values[key] = None
            continue
        try:
            values[key] = _READERS[annotation.removesuffix("|None")](text)
        except (KeyError, ValueError):
            raise OptionError(f"option {key}={text} of {kind} {name!r} is not of type {annotation}") from None
    return cls(**values)


def build_from_table(kind: str, table: Mapping[str, str], name: str, options: Mapping[str, str]) -> Any:
    """Make what ``table`` lists under ``name`` as "module:class"; the module is loaded now, and not before.

    Raises:
        OptionError: the table has no such name, or the class no such option; the nearest names are told.
    """
    if name not in table:
        raise unknown(kind, name, table)
    module, cls = table[name].split(":")
    return build_from_spelling(kind, getattr(importlib.import_module(module), cls), name, options)


def spell(name: str, item: Any) -> str:
    """The text of a dataclass built by :func:`build_from_spelling`; options at their default are left out."""
    options = [
        f"{f.name}={str(value).lower() if isinstance(value, bool) or value is None else value}"
        for f in dataclasses.fields(item)
        if f.init and (value := getattr(item, f.name)) != f.default
    ]
    return f"{name}{{{','.join(options)}}}" if options else name
