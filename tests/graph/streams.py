"""Hand-written Transformer blocks for the tests of rotations: embedding, norm, Linears, residual sums, head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.rules import canonicalise
from tests.graph.tiny import tiny

WIDTH, VOCABULARY = 12, 20
RMS = "qcompiler.RMSNorm <epsilon = 1e-5>"
LAYER = "LayerNormalization <axis = -1, epsilon = 1e-5>"

WEIGHTS: dict[str, tuple[int, ...] | npt.NDArray[Any]] = {
    "table": (VOCABULARY, WIDTH),
    "places": (1, 5, WIDTH),
    "g1": (WIDTH,),
    "b1": (WIDTH,),
    "g2": (WIDTH,),
    "b2": (WIDTH,),
    "up_w": (WIDTH, 16),
    "up_b": (16,),
    "down_w": (16, WIDTH),
    "down_b": (WIDTH,),
    "head_w": (WIDTH, 7),
}


def block(
    norm: str = RMS, *, extra: str = "", outputs: str = "float[b, s, 7] head", weights: Mapping[str, Any] | None = None
) -> ir.Model:
    """ids -> table + places -> norm -> up, Relu, down -> + -> norm -> head. ``extra`` nodes come last."""
    biases = ("", "") if norm == RMS else (", b1", ", b2")
    body = f"""
    g (int64[b, 5] ids) => ({outputs}) {{
        tokens = Gather(table, ids)
        x = Add(tokens, places)
        n1 = {norm}(x, g1{biases[0]})
        up_p = MatMul(n1, up_w)
        up = Add(up_p, up_b)
        act = Relu(up)
        down_p = MatMul(act, down_w)
        down = Add(down_p, down_b)
        y = Add(x, down)
        n2 = {norm}(y, g2{biases[1]})
        head = MatMul(n2, head_w)
        {extra}
    }}
    """
    shapes = {**WEIGHTS, **(weights or {})}
    if norm == RMS:
        shapes = {name: shape for name, shape in shapes.items() if name not in ("b1", "b2")}
    model = tiny(body, shapes)
    canonicalise(model)
    return model


def ids(seed: int = 3) -> dict[str, npt.NDArray[Any]]:
    return {"ids": np.random.default_rng(seed).integers(0, VOCABULARY, (3, 5))}
