"""Activation ranges by channel, before and after the transforms, of every value that Linears read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.collect import collect
from qcompiler.core import FoldPlan, Note, StatRequest
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.run import Feeds
from qcompiler.report.analysis import Ranges, Site
from qcompiler.report.build import folds_of


def measure_sites(
    float_model: ir.Model,
    transformed: ir.Model,
    batches: Iterable[Feeds],
    notes: Sequence[Note],
    plans: Sequence[FoldPlan],
    progress: bool = True,
) -> tuple[Site, ...]:
    """Run both models once over the data.

    Args:
        float_model: the canonical float graph as it came.
        transformed: it behind the last float-exact pass.
        batches: feeds, readable twice; rows where ``attention_mask`` is 0 do not count.
        notes, plans: what the passes decided.

    Raises:
        DataError: there is no data, only padding, or a value is NaN or infinite.
    """
    groups: dict[str, list[Linear]] = {}
    for linear in linears(transformed):
        groups.setdefault(linear.x.name or "", []).append(linear)
    reads = {linear.name: linear.x.name or "" for linear in linears(float_model)}
    sources = {site: reads.get(group[0].name) for site, group in groups.items()}
    before = _ranges(float_model, batches, [name for name in sources.values() if name is not None], progress)
    after = _ranges(transformed, batches, list(groups), progress)
    return tuple(
        Site(
            name=site,
            linears=tuple(linear.name for linear in group),
            before=before[source] if (source := sources[site]) is not None else None,
            after=after[site],
            transform=_transform({linear.name for linear in group}, notes, plans),
        )
        for site, group in groups.items()
    )


def _ranges(model: ir.Model, batches: Iterable[Feeds], values: Sequence[str], progress: bool) -> dict[str, Ranges]:
    requests = {value: StatRequest(value, "minmax", -1) for value in values}
    stats = collect(model, batches, requests.values(), progress=progress)
    found = {}
    for value, request in requests.items():
        low, high = stats[request]
        found[value] = Ranges(float(low.min()), float(high.max()), np.maximum(np.abs(low), np.abs(high)))
    return found


def _transform(names: set[str], notes: Sequence[Note], plans: Sequence[FoldPlan]) -> tuple[str, ...]:
    """What was done for these Linears, each once."""
    parts = [f"{note.what}: {note.why}" for note in notes if note.node in names and note.what == "split"]
    parts += [part for name in sorted(names) for part in folds_of(name, plans)]
    return tuple(dict.fromkeys(parts))
