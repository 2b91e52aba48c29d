"""Gelu from its arithmetic, in whatever order the factors come.

Instead of one pattern for each spelling, the elementwise region around an Erf or Tanh is evaluated on a grid and
compared with the definition (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016: x·Φ(x), and its tanh form): a
function of one variable, built of a dozen smooth operators, that agrees on the grid is that function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.edit import users
from qcompiler.graph.rules.patterns import number
from qcompiler.graph.rules.rewriter import Rewriter

Array = npt.NDArray[np.float64]

_GRID: Array = np.linspace(-6.0, 6.0, 61)
_ERF = np.vectorize(math.erf, otypes=[np.float64])
_TOLERANCE = 2e-5  # 0.79788456, 1.41421 and their like are written with six digits or more
_MAX_NODES = 16

_FORMS: dict[str, Array] = {
    "none": _GRID * 0.5 * (1.0 + _ERF(_GRID / math.sqrt(2.0))),
    "tanh": _GRID * 0.5 * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (_GRID + 0.044715 * _GRID**3))),
}
_UNARY: dict[str, Any] = {"Erf": _ERF, "Tanh": np.tanh, "Neg": np.negative, "Identity": lambda a: a}
_BINARY: dict[str, Any] = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Pow": np.power}


def raise_gelus(rewriter: Rewriter) -> None:
    """Grow the region downstream of each Erf and Tanh until it is a Gelu of one of the values upstream."""
    for node in rewriter.nodes("Erf", "Tanh"):
        approximate = "none" if node.op_type == "Erf" else "tanh"
        sources = _upstream(node)
        found = next(((y, x) for y in _downstream(node) for x in sources if _is_form(y, x, _FORMS[approximate])), None)
        if found is not None:
            y, x = found
            rewriter.replace(y, "Gelu", [x], {"approximate": approximate})


def _upstream(node: ir.Node) -> list[ir.Value]:
    """Values that the function's argument is computed from by elementwise operators, nearest first."""
    found: dict[ir.Value, None] = {}
    queue = [value for value in node.inputs if value is not None]
    while queue and len(found) < _MAX_NODES:
        value = queue.pop(0)
        if value in found or number(value) is not None or value.is_initializer():
            continue
        found[value] = None
        producer = value.producer()
        if producer is not None and producer.domain == "" and producer.op_type in (*_BINARY, "Neg"):
            queue += [v for v in producer.inputs if v is not None]
    return list(found)


def _downstream(node: ir.Node) -> list[ir.Value]:
    """Products that the function's value goes into, nearest first: the Gelu is one of them."""
    found: dict[ir.Value, None] = {}
    queue = [node.outputs[0]]
    while queue and len(found) < _MAX_NODES:
        for user in users(queue.pop(0)):
            if user.domain == "" and user.op_type in _BINARY and user.outputs[0] not in found:
                found[user.outputs[0]] = None
                queue.append(user.outputs[0])
    return [value for value in found if value.producer() is not None]


def _is_form(y: ir.Value, x: ir.Value, wanted: Array) -> bool:
    got = _evaluate(y, {x: _GRID}, [_MAX_NODES])
    return got is not None and got.shape == wanted.shape and bool(np.abs(got - wanted).max() < _TOLERANCE)


def _evaluate(value: ir.Value | None, known: dict[ir.Value, Array], budget: list[int]) -> Array | None:
    """The value as a function of the one in ``known``, on the grid; None where it depends on anything else."""
    if value is None:
        return None
    if value in known:
        return known[value]
    if (constant := number(value)) is not None:
        return np.float64(constant) * np.ones(())
    node = value.producer()
    budget[0] -= 1
    if node is None or node.domain != "" or budget[0] < 0 or node.op_type not in {**_UNARY, **_BINARY}:
        return None
    arguments = [_evaluate(v, known, budget) for v in node.inputs]
    if any(a is None for a in arguments):
        return None
    function: Callable[..., Array] = {**_UNARY, **_BINARY}[node.op_type]
    with np.errstate(all="ignore"):
        known[value] = np.asarray(function(*arguments), dtype=np.float64)
    return known[value]
