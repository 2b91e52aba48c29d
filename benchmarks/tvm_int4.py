"""Target tvm-llvm in four bits beside ONNX Runtime: one row times a weight by group, and SmolLM2 as a whole.

usage: [TVM_NUM_THREADS=N] tvm_int4.py [--rounds N] [--scheme S] [--folder DIR] [--json FILE] [gemv] [smollm2]

Everything in turn in one process: CPU time on one thread, wall time on more; medians, and the median over rounds of the
ratio. gemv: 1 x 4096 x 4096 in groups of 32 and 128 against MatMulNBits, w4a8 (accuracy level 4, the input quantized
on either side) and w4a16 (level 0); the error is against the float product of the dequantized weight, max|Δ| / max|y|.
smollm2: rounded to nearest without calibration, compiled for either target (into DIR, or read from there), 1 x 1 and
1 x 128 tokens without a cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np
import tvm
from onnx import helper
from protocol import MODELS, alternate, clock_of, median_ratio, print_table, rest_of
from tvm_llvm import bound, session_of

import qcompiler
from qcompiler.numerics.packing import pack_weight
from qcompiler.targets.tvm.isa import detect
from qcompiler.targets.tvm.kernels import gemm_groups, gemm_groups_f32
from qcompiler.targets.tvm.kernels.quantize_groups import QuantizeGroups

SIZE = 4096
THREADS = int(os.environ["TVM_NUM_THREADS"])


def kernels(q: np.ndarray, scale: np.ndarray, x: np.ndarray, level: int) -> tuple[Callable[[], None], Any]:
    """Our product of x, and the tensor that it writes; level 4 quantizes x first."""
    isa, (count, out), size = detect(), q.shape, len(q) // len(scale)
    groups = gemm_groups.pack_groups(scale, isa)
    y = tvm.runtime.tensor(np.zeros((1, out), np.float32))

    def compiled(kernel: Any) -> Any:
        return tvm.compile(kernel.build(isa, "kernel"), target=isa.target())["kernel"]

    if level == 0:
        product = compiled(gemm_groups_f32.GemmGroupsF32(count, out, size))
        arrays = [x, gemm_groups_f32.pack(q, size, 4, isa), groups]
        tensors = [*map(tvm.runtime.tensor, arrays), y]
        return lambda: product(*tensors), y
    quantize, product = (compiled(k) for k in (QuantizeGroups(count, size), gemm_groups.GemmGroups(count, out, size)))
    shape = (1, len(scale))
    given = [np.zeros((1, count), np.int8), np.zeros(shape, np.float32), np.zeros(shape, np.int32)]
    xq, x_scale, x_sum = map(tvm.runtime.tensor, given)
    source, weight, scales = map(tvm.runtime.tensor, (x, gemm_groups.pack(q, size, 4, isa), groups))

    def run() -> None:
        quantize(source, xq, x_scale, x_sum)
        product(xq, weight, scales, x_scale, x_sum, y)

    return run, y


def gemv(rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds and errors by group size and accuracy level."""
    rng = np.random.default_rng(0)
    rows: dict[str, dict[str, float]] = {}
    for level in (4, 0):
        for size in (32, 128):
            q = rng.integers(0, 16, (SIZE, SIZE)).astype(np.uint8)
            scale = (rng.random((SIZE // size, SIZE)) * 1e-2 + 1e-3).astype(np.float32)
            x = rng.standard_normal((1, SIZE)).astype(np.float32)
            exact = x @ ((q - 8.0) * scale.repeat(size, 0))
            attributes: dict[str, Any] = {"K": SIZE, "N": SIZE, "bits": 4, "block_size": size, "accuracy_level": level}
            names = ["x", "weight", "scale"]
            node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **attributes)
            weights = {"weight": pack_weight(q, 4, size), "scale": np.ascontiguousarray(scale.T)}
            session = session_of(node, {"x": x}, weights, threads=1)
            ours, y = kernels(q, scale, x, level)
            times = alternate({"ort": bound(session, {"x": x}), "tvm": ours}, rounds * 20, warmup=10)
            got = {"ort": session.run(None, {"x": x})[0], "tvm": y.numpy()}
            row = {f"{name}_us": statistics.median(seconds) * 1e6 for name, seconds in times.items()}
            row |= {f"{name}_error": float(abs(a - exact).max() / abs(exact).max()) for name, a in got.items()}
            rows[f"g{size}, level {level}"] = {**row, "ratio": 1 / median_ratio(times, "tvm", "ort")}
    return rows


def smollm2(rounds: int, scheme: str, root: Path) -> dict[str, dict[str, float]]:
    """Latency of either target."""
    compiled: dict[str, qcompiler.CompiledModel] = {}
    rows: dict[str, dict[str, float]] = {}
    for target in ("ort-cpu", "tvm-llvm"):
        out = root / f"{target}-{scheme}"
        if not out.exists():
            qcompiler.compile(MODELS / "smollm2", scheme=scheme, target=target, output=out, progress=False)
        compiled[target] = qcompiler.load(out)
        rows[target] = {}
    session, engine = compiled["ort-cpu"].session(threads=THREADS), compiled["tvm-llvm"].executable
    assert engine is not None
    rng = np.random.default_rng(0)
    for length in (1, 128):
        ids = rng.integers(0, 49_000, (1, length))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        runs = {"ort-cpu": lambda f=feeds: session.run(None, f), "tvm-llvm": lambda f=feeds: engine.run(f, THREADS)}
        times = alternate(runs, rounds * 10 if length == 1 else rounds, clock=clock_of(THREADS), rest=rest_of(THREADS))
        for name, seconds in times.items():
            rows[name][f"{length}_ms"] = statistics.median(seconds) * 1e3
            rows[name][f"{length}_best"] = min(seconds) * 1e3
            rows[name][f"{length}_ratio"] = median_ratio(times, name, "ort-cpu")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["gemv", "smollm2"], help="gemv, smollm2")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of the alternating measurement")
    parser.add_argument("--scheme", default="w4a8", help="of smollm2 (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the compiled SmolLM2 is kept")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {}
    if "gemv" in args.what and THREADS == 1:
        found["gemv"] = gemv(args.rounds)
        columns = {"ort_us": ("ORT µs", "{:.0f}"), "tvm_us": ("TVM µs", "{:.0f}"), "ratio": ("speed", "{:.2f}")}
        columns |= {"ort_error": ("ORT error", "{:.1e}"), "tvm_error": ("TVM error", "{:.1e}")}
        print_table(f"int4 GEMV {SIZE} x {SIZE}, against MatMulNBits", columns, found["gemv"])
    if "smollm2" in args.what:
        with tempfile.TemporaryDirectory() as scratch:
            found["smollm2"] = smollm2(args.rounds, args.scheme, args.folder or Path(scratch))
        columns = {}
        for length in ("1", "128"):
            columns |= {f"{length}_ms": (f"1x{length} ms", "{:.2f}"), f"{length}_best": ("best", "{:.2f}")}
            columns |= {f"{length}_ratio": ("ratio", "{:.3f}")}
        clock = "CPU time" if THREADS == 1 else "wall time"
        print_table(f"SmolLM2-135M {args.scheme}, {THREADS} threads' {clock}", columns, found["smollm2"])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
