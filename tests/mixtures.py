"""A mixture of experts as the dynamo exporter writes transformers' ``batched_mm``, with any router and activation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.graph.rules import canonicalise
from tests.graph.tiny import tiny

TOP = "w, i = TopK<axis: int = -1>(p, k)"
SILU = "s = Sigmoid(a) t = Mul(a, s) act = Mul(t, b)"
SUM = "back = Reshape(scaled, by_token) y = ReduceSum<keepdims: int = 0>(back, middle)"


def traced(
    hidden: int = 32,
    inner: int = 48,
    experts: int = 4,
    k: int = 2,
    *,
    top: str = TOP,
    activation: str = SILU,
    total: str = SUM,
    seed: int = 0,
) -> ir.Model:
    """y [S, hidden] = Σ of the k experts of softmax(x · router), weights normalised.

    Args:
        top: makes weights ``w`` and experts ``i`` [S, k] of the probabilities ``p``.
        activation: makes ``act`` of the halves ``a`` and ``b`` of the first projection.
        total: makes ``y`` of ``scaled`` [S · k, hidden].
        seed: of the weights.
    """
    rng = np.random.default_rng(seed)
    weights = {
        "mlp.router.weight": (hidden, experts),
        "mlp.experts.gate_up_proj": (experts, 2 * inner, hidden),
        "mlp.experts.down_proj": (experts, hidden, inner),
    }
    scaled = {name: rng.standard_normal(shape) / shape[-1] ** 0.5 for name, shape in weights.items()}
    numbers = {
        "k": [k],
        "middle": [1],
        "last": [-1],
        "often": [1, k, 1],
        "rows": [-1, hidden],
        "by_token": [-1, k, hidden],
        "halves": [inner, inner],
    }
    text = f"""g (float[S,{hidden}] x) => (float[S,{hidden}] y) {{
        logits = MatMul(x, "mlp.router.weight")  p = Softmax<axis: int = -1>(logits)
        {top}
        sum = ReduceSum<keepdims: int = 1>(w, last)  weights = Div(w, sum)
        lone = Unsqueeze(x, middle)  many = Expand(lone, often)  xs = Reshape(many, rows)
        ids = Reshape(i, last)  places = Unsqueeze(ids, last)
        w1 = GatherND("mlp.experts.gate_up_proj", places)
        x1 = Unsqueeze(xs, last)  y1 = MatMul(w1, x1)  h = Squeeze(y1, last)
        a, b = Split<axis: int = -1>(h, halves)
        {activation}
        w2 = GatherND("mlp.experts.down_proj", places)
        x2 = Unsqueeze(act, last)  y2 = MatMul(w2, x2)  o = Squeeze(y2, last)
        flat = Reshape(weights, last)  column = Unsqueeze(flat, last)  scaled = Mul(o, column)
        {total}
    }}"""
    return tiny(text, {**scaled, **{name: np.array(given, np.int64) for name, given in numbers.items()}})


def canonical(*sizes: int, **how: object) -> ir.Model:
    """As :func:`traced`, in canonical form."""
    model = traced(*sizes, **how)  # type: ignore[arg-type]
    canonicalise(model)
    return model


def rows(count: int, hidden: int = 32, seed: int = 1) -> dict[str, np.ndarray]:
    """Feeds."""
    return {"x": np.random.default_rng(seed).standard_normal((count, hidden), np.float32)}
