"""The small shared types: errors, notes, statistics requests, fold plans, what runs by itself.

Everything here is plain data, imported by every layer above and importing none of them.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
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
        kind: "fold" (the source's weights absorb it), "insert" (ops before the sinks do), "rotate" (``x' = x Q``: the
            weights on both sides absorb an orthogonal matrix) or "reorder" (``x' = x[order]``: they are permuted).
        source: name of the node that absorbs 1/scale, or of the value where ops were inserted.
        sinks: names of the Linears that absorb scale, or whose weights are rotated.
        scale: float32 [channels] of the source, or None.
        shift: float32 [channels] of the source, or None.
        proof: relative error bound of the region's float64 equivalence test (max|a-b| / max|a|).
        why: what the transform chose here, and what it gained.
        rotation: what makes Q: float32 [n], the signs of the rows of ``numerics.hadamard.hadamard(n)`` / sqrt(n), or
            [n, n], itself; or None.
        order: int32 [channels], or None.
    """

    kind: str
    source: str
    sinks: tuple[str, ...]
    scale: npt.NDArray[np.float32] | None
    shift: npt.NDArray[np.float32] | None = None
    proof: float = float("nan")
    why: str = ""
    rotation: npt.NDArray[np.float32] | None = None
    order: npt.NDArray[np.int32] | None = None


class Executable(Protocol):
    """A compiled model that runs by itself: what a target makes that is no graph for ONNX Runtime."""

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], threads: int = 0) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name; ``threads`` 0 leaves the number to the target."""

    def save(self, folder: Path) -> None:
        """Write what :meth:`qcompiler.targets.base.Target.load` reads, beside the model."""


class Companion(Protocol):
    """The compiled weights in another format as well, saved beside the model for programs that read that one."""

    def save(self, folder: Path) -> None:
        """Write what :meth:`qcompiler.targets.base.Target.companion` finds, into the folder of the model."""
