"""Which files and modules the parameters of a graph came from, for whoever writes them back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from qcompiler.frontends.safetensors_file import Entry

_ORIGIN = "qcompiler.origin"


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """A Hugging Face folder, seen from a graph that was traced from it.

    Attributes:
        folder: holds config.json.
        names: of each parameter of the graph, by its name there, all names it has in the whole model; tied ones have
            several, and that of a torch.nn.Linear comes last.
        entries: the files' tensors, those of parameters under the first of their names in the model.
        linears: names of all torch.nn.Linear modules of the whole model, whether they are in the graph or not.
        subclassed: those of them that are of a subclass, with a forward of its own as a rule (Falcon).
    """

    folder: Path
    names: Mapping[str, tuple[str, ...]]
    entries: Mapping[str, Entry]
    linears: frozenset[str]
    subclassed: frozenset[str]


def leave_origin(graph: ir.Graph, origin: Origin) -> None:
    """Let the graph, and its clones, know where they came from."""
    graph.meta[_ORIGIN] = origin


def origin_of(graph: ir.Graph) -> Origin | None:
    """What :func:`leave_origin` left; None: the graph came from no safetensors of a Hugging Face folder."""
    origin: Origin | None = graph.meta.get(_ORIGIN)
    return origin
