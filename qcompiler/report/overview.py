"""What a source holds before anything is compiled: Linears, norms, and the sites where a scale may be folded."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.console import Group
from rich.table import Table
from rich.text import Text

from qcompiler.graph.flow import analyse
from qcompiler.graph.fold_site import FoldSite
from qcompiler.graph.functions import is_call
from qcompiler.graph.heads import output_heads
from qcompiler.graph.linear import linears
from qcompiler.report.render import key_values

NORMS = ("LayerNormalization", "RMSNorm")


@dataclasses.dataclass(frozen=True)
class Overview:
    """A canonical float graph, described.

    Attributes:
        inputs, outputs: name -> dtype and shape as text.
        linears: name, in_features, out_features, bias (has one), head (is the output head) of each Linear.
        norms: how many norms of each operator.
        sites: source, kind, channels, free (channels whose scale may be folded), sinks and blockers of each fold site.
    """

    inputs: dict[str, str]
    outputs: dict[str, str]
    linears: tuple[dict[str, Any], ...]
    norms: dict[str, int]
    sites: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return dataclasses.asdict(self)


def overview(model: ir.Model) -> Overview:
    """Describe a canonical float graph; no weight is read and nothing is changed."""
    heads = output_heads(model)
    norms = collections.Counter(
        node.op_type for node in model.graph if node.op_type in NORMS and (node.domain == "" or is_call(node))
    )
    return Overview(
        inputs={v.name or "": _typed(v) for v in model.graph.inputs},
        outputs={v.name or "": _typed(v) for v in model.graph.outputs},
        linears=tuple(
            {
                "name": linear.name,
                "in_features": linear.in_features,
                "out_features": linear.out_features,
                "bias": linear.bias is not None,
                "head": linear.name in heads,
            }
            for linear in linears(model)
        ),
        norms=dict(norms),
        sites=tuple(_site(site) for site in analyse(model)),
    )


def to_rich(found: Overview) -> Group:
    """What a terminal shows."""
    table = Table(header_style="bold", show_edge=False, pad_edge=False)
    for header in ("Linear", "shape", "bias", "head"):
        table.add_column(header, overflow="fold")
    for row in found.linears:
        shape = f"{row['in_features']}x{row['out_features']}"
        table.add_row(Text(row["name"]), shape, "yes" if row["bias"] else "", "yes" if row["head"] else "")
    sites = Table(header_style="bold", show_edge=False, pad_edge=False)
    for header in ("fold site", "kind", "free channels", "into", "blocked by"):
        sites.add_column(header, overflow="fold")
    for site in found.sites:
        blockers = "; ".join(f"{b['node']}: {b['why']}" for b in site["blockers"][:2])
        sites.add_row(
            Text(site["source"]),
            site["kind"],
            f"{site['free']} of {site['channels']}",
            Text(", ".join(site["sinks"])),
            Text(blockers),
        )
    features = sum(row["in_features"] * row["out_features"] for row in found.linears)
    totals = key_values(
        [
            ("inputs", ", ".join(f"{name} {text}" for name, text in found.inputs.items())),
            ("outputs", ", ".join(f"{name} {text}" for name, text in found.outputs.items())),
            ("Linears", f"{len(found.linears)} ({features / 1e6:.1f} M weights)"),
            ("norms", ", ".join(f"{count} {name}" for name, count in found.norms.items()) or "none"),
        ]
    )
    return Group(table, Text(), sites, Text(), totals)


def _site(site: FoldSite) -> dict[str, Any]:
    reached = np.unique(np.concatenate([sink.columns[sink.columns >= 0] for sink in site.sinks]))
    return {
        "source": site.source.name or site.value.name or "",
        "kind": site.kind,
        "channels": site.channels,
        "free": int((~site.scale_blocked[reached]).sum()),
        "sinks": [sink.linear for sink in site.sinks],
        "blockers": [dataclasses.asdict(note) for note in site.blockers],
    }


def _typed(value: ir.Value) -> str:
    dims = ", ".join(str(dim) for dim in value.shape) if value.shape is not None else "?"
    return f"{value.dtype.numpy() if value.dtype is not None else '?'}[{dims}]"
