"""Where a NaN comes from: found when a run has failed, so it may cost another run or a few."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.graph.run import Feeds, Runner

_AT_ONCE = 64  # values tapped in one run: bounds the memory


def first_nan(model: ir.Model, feeds: Feeds, until: str) -> str | None:
    """The first value in graph order, up to ``until``, that holds a NaN for these feeds: "input 'x'" or "'v' (Div)".

    None if none does, as when ``until`` comes from a subgraph.
    """
    for name, array in feeds.items():
        if np.issubdtype(np.asarray(array).dtype, np.floating) and np.isnan(array).any():
            return f"input {name!r}"
    operators: dict[str, str] = {}
    for node in model.graph:
        operators.update({v.name: node.op_type for v in node.outputs if v.name and v.dtype in _FLOATS})
        if any(value.name == until for value in node.outputs):
            break
    names = list(operators)
    for start in range(0, len(names), _AT_ONCE):
        chunk = names[start : start + _AT_ONCE]
        arrays = Runner(model, chunk)(feeds)
        for name in chunk:
            if np.issubdtype(arrays[name].dtype, np.floating) and np.isnan(arrays[name]).any():
                return f"{name!r} ({operators[name]})"
    return None


_FLOATS = (None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
