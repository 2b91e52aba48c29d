"""A graph in ONNX Runtime and its rebuilt twin in torch, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompiler.graph.run import Feeds, Runner
from qcompiler.options import Options
from qcompiler.quantize import Request, run_passes

torch = pytest.importorskip("torch")
from qcompiler.training import rebuild  # noqa: E402


def canonical(source: Path, scheme: str, calibration: Any = None) -> tuple[ir.Model, ir.Model]:
    """The canonical float graph and the fake-quant graph of a model, rounded to nearest."""
    options = Options(scheme=scheme, calibration=calibration, passes="annotate,insert", progress=False)
    found = run_passes(source, Request.of(options))
    return found.float_model, found.work.model


def relative(want: npt.NDArray[Any], got: npt.NDArray[Any]) -> float:
    """max|a - b| / max|a| of two arrays of one shape, type and pattern of infinities."""
    assert (want.shape, want.dtype) == (got.shape, got.dtype)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(want[~finite], got[~finite])
    if want.dtype.kind != "f":
        return float((want != got).any())
    want, got = want[finite], got[finite]
    largest = float(np.abs(want).max(initial=0.0))
    return float(np.abs(want - got).max(initial=0.0)) / max(largest, 1e-30)


def outputs_apart(model: ir.Model, feeds: Feeds) -> float:
    """The largest relative difference of an output between ONNX Runtime and torch."""
    want, got = Runner(model, threads=1)(feeds), rebuild(model)(**feeds)
    return max(relative(want[name], got[name].detach().numpy()) for name in want)


def nodes_apart(model: ir.Model, feeds: Feeds) -> dict[str, float]:
    """The relative difference of each node's output, each node fed with what ONNX Runtime computed before it.

    So a number that lies on the border between two integers, and that another order of summation moves across, counts
    at no later node.
    """
    taps = [output.name or "" for node in model.graph for output in node.outputs if output.name]
    want, rebuilt = Runner(model, taps, threads=1)(feeds), rebuild(model, taps)
    (result,) = (node for node in rebuilt.module.graph.nodes if node.op == "output")
    names = {node: name for name, node in result.args[0].items()}
    apart: dict[str, float] = {}

    class Fed(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            got = super().run_node(n)
            if n not in names:
                return got
            apart[names[n]] = relative(want[names[n]], got.detach().numpy())
            return torch.from_numpy(want[names[n]].copy())

    Fed(rebuilt.module).run(*(torch.as_tensor(feeds[name]) for name in rebuilt.inputs))
    return apart
