"""One small graph for the passes, with each kind of site in it, and running a pass on it as the driver does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration import collect
from qcompiler.capability import Capability
from qcompiler.graph.run import Feeds, Runner
from qcompiler.passes.annotate import Annotate
from qcompiler.passes.base import Context, Pass, PassResult
from qcompiler.passes.insert import Insert
from qcompiler.presets import resolve
from qcompiler.scheme import Scheme
from tests.graph.tiny import tiny

WIDTH = 32
TEXT = f"""g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y, float[B,S,24] logits) {{
    h = LayerNormalization(x, gain, b)
    q0 = MatMul(h, wq)  q = Add(q0, bq)
    k = MatMul(h, wk)
    both = Add(q, k)
    p = Gelu(both)
    up0 = MatMul(p, wu)  up = Add(up0, bu)
    r = Relu(up)
    down0 = MatMul(r, wd)  down = Add(bd, down0)
    t = Add(x, down)
    n = LayerNormalization(t, gain2, b2)
    post = MatMul(n, wp)
    y = Add(post, n)
    logits0 = MatMul(n, wh)  logits = Add(logits0, bh)
}}"""
"""h folds into q0 and k; up0 into down0, through Relu; nothing before Gelu may absorb a scale, nor the norm n, which a
residual reads too: up0, and post with logits0 (an output head), can have insertions only."""

LINEARS = ("q0", "k", "up0", "down0", "post", "logits0")


def block(outliers: float = 1.0, seed: int = 0) -> ir.Model:
    """The graph with seeded weights; two channels of each norm are ``outliers`` times as large as the others."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return (rng.standard_normal((rows, columns)) / rows**0.5).astype(np.float32)

    gains = rng.uniform(0.8, 1.2, (2, WIDTH)).astype(np.float32)
    gains[0, [3, 17]] *= outliers
    gains[1, [5, 30]] *= outliers
    vectors = {"b": WIDTH, "bq": WIDTH, "bu": 2 * WIDTH, "bd": WIDTH, "b2": WIDTH, "bh": 24}
    return tiny(
        TEXT,
        {
            "gain": gains[0],
            "gain2": gains[1],
            "wq": matrix(WIDTH, WIDTH),
            "wk": matrix(WIDTH, WIDTH),
            "wu": matrix(WIDTH, 2 * WIDTH),
            "wd": matrix(2 * WIDTH, WIDTH),
            "wp": matrix(WIDTH, WIDTH),
            "wh": matrix(WIDTH, 24),
            **{name: rng.standard_normal(size).astype(np.float32) * 0.1 for name, size in vectors.items()},
        },
    )


def batches(count: int = 3, seed: int = 1, width: int = WIDTH) -> list[dict[str, npt.NDArray[np.float32]]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((8, 12, width)).astype(np.float32)} for _ in range(count)]


HELD_OUT = batches(2, seed=99)


def context(
    scheme: str | Scheme = "w8a8", ignore: Sequence[str] = (), reduce_range: bool = False, seed: int = 0
) -> Context:
    return Context(resolve(scheme, tuple(ignore)), Capability("test", (), reduce_range), seed)


def apply(item: Pass, model: ir.Model, ctx: Context, data: Iterable[Feeds] | None = None) -> PassResult:
    """Collect what the pass wants of the model as it stands, and run it."""
    requests = item.wants(model, ctx)
    stats = collect(model, data if data is not None else batches(), requests, progress=False, threads=1)
    return item.run(model, stats, ctx)


def quantize(model: ir.Model, ctx: Context, *before: Pass, data: Iterable[Feeds] | None = None) -> list[PassResult]:
    """Apply ``before``, annotate and insert."""
    return [apply(item, model, ctx, data) for item in (*before, Annotate(), Insert())]


def outputs(model: ir.Model, taps: Sequence[str] = ()) -> dict[str, npt.NDArray[np.float32]]:
    """What the model makes of held-out data."""
    runner = Runner(model, taps, threads=1)
    results = [runner(feeds) for feeds in HELD_OUT]
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


def error(reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Σerr² / Σref²."""
    exact = reference.astype(np.float64)
    return float(((other - exact) ** 2).sum() / (exact**2).sum())
