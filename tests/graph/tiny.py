"""Hand-written graphs for the flow analysis: ONNX text, seeded weights, random folds, outputs compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import onnx_ir as ir

from qcompiler.graph.absorb import fold
from qcompiler.graph.flow import analyse
from qcompiler.graph.fold_site import FoldSite
from qcompiler.graph.functions import ensure_function
from qcompiler.graph.run import Runner
from qcompiler.graph.verify import relative_error

HEADER = '<ir_version: 10, opset_import: ["": 21, "qcompiler": 1]>\n'
Shapes = Mapping[str, Sequence[int] | npt.NDArray[Any]]


def tiny(body: str, weights: Shapes, seed: int = 0) -> ir.Model:
    """The graph of that text; ``weights`` gives each initializer's shape (then random, away from 0) or its numbers.

    Nodes are named after their first output, so that the Linear ``q = MatMul(h, wq)`` is called "q".
    """
    rng = np.random.default_rng(seed)
    arrays = {
        name: given if isinstance(given, np.ndarray) else rng.uniform(0.3, 1.5, given) * rng.choice([-1, 1], given)
        for name, given in weights.items()
    }
    proto = onnx.parser.parse_model(HEADER + body)
    for name, a in arrays.items():
        single = a.astype(np.float32) if a.dtype == np.float64 else a
        proto.graph.initializer.append(onnx.numpy_helper.from_array(single, name))
    model = ir.from_proto(proto)
    for node in model.graph:
        node.name = node.outputs[0].name
        if node.domain == "qcompiler":
            ensure_function(model, node.op_type)
    return model


def feeds_for(model: ir.Model, seed: int = 1, sequence: int = 5) -> dict[str, npt.NDArray[Any]]:
    """Random feeds: symbolic axis 0 has size 3, any other symbolic axis ``sequence``."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        assert value.name is not None
        shape = [d if isinstance(d, int) else (sequence if i else 3) for i, d in enumerate(value.shape)]
        if value.dtype.is_floating_point():
            feeds[value.name] = rng.standard_normal(shape).astype(value.dtype.numpy())
        elif value.dtype == ir.DataType.BOOL:
            feeds[value.name] = rng.integers(0, 2, shape).astype(bool)
        else:
            feeds[value.name] = rng.integers(0, 2, shape).astype(value.dtype.numpy())
    return feeds


def site_of(model: ir.Model, value: str) -> FoldSite:
    """The site whose source gives that value."""
    return next(site for site in analyse(model) if site.value.name == value)


def pairs(model: ir.Model) -> dict[str, set[str]]:
    """source value -> Linears that can absorb a scale from it."""
    found = {}
    for site in analyse(model):
        free = ~site.scale_blocked
        sinks = {s.linear for s in site.sinks if free[s.columns[s.columns >= 0]].any()}
        if sinks:
            found[site.value.name or ""] = sinks
    return found


def fold_everything(model: ir.Model, *, shift: bool = False, seed: int = 0) -> int:
    """Fold random positive scales (0.1 to 10) at every foldable site, in place; the number of folds."""
    rng = np.random.default_rng(seed)
    count = 0
    for site in analyse(model):
        if site.foldable:
            z = rng.standard_normal(site.channels) if shift else None
            plan = fold(model, site, np.exp(rng.uniform(-2.3, 2.3, site.channels)), z)
            assert plan.proof < 1e-5
            count += 1
    return count


def outputs(model: ir.Model, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return Runner(model, threads=1)(feeds)


def assert_folds_keep_outputs(model: ir.Model, *, shift: bool = False, bound: float = 1e-5) -> None:
    """Random folds at all sites at once leave the outputs within ``bound``, and changed something on the way."""
    feeds = feeds_for(model)
    before = outputs(model, feeds)
    assert fold_everything(model, shift=shift) > 0
    error = relative_error(before, outputs(model, feeds))
    assert error <= bound
