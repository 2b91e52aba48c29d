"""Target tvm-llvm beside ONNX Runtime: the 8-bit GEMM, and MiniLM as a whole.

usage: tvm_llvm.py [--rounds N] [--threads N] [--json FILE] [gemm] [minilm]

One thread's CPU time (with --threads, wall time of so many), everything in turn in one process; medians, and the
median over rounds of the ratio. GEMM: u8 x s8 with bias against MatMulIntegerToFloat, weights of 7 bits where the
processor has no VNNI. MiniLM: w8a8 as benchmarks/minilm.py calibrates it, last hidden state against the canonical fp32
graph, compiled for either target.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))

import numpy as np
import onnx
import onnxruntime as ort
import tvm
from onnx import TensorProto, helper, numpy_helper
from protocol import (
    MODELS,
    alternate,
    clock_of,
    encode,
    median_ratio,
    minilm_calibration,
    minilm_evaluation,
    one_thread_session,
    pooled_sqnr,
    print_table,
    rest_of,
)

import qcompiler
from qcompiler.frontends import open_source
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.run import Runner
from qcompiler.runtime.synthetic import make_feeds
from qcompiler.targets.tvm.engine import use_threads
from qcompiler.targets.tvm.isa import detect, with_narrow_weights
from qcompiler.targets.tvm.kernels.epilogue import Epilogue
from qcompiler.targets.tvm.kernels.gemm_int8 import GemmInt8

SHAPES = ((128, 768, 768), (128, 768, 3072), (128, 3072, 768), (1024, 768, 3072), (1, 768, 3072))
FOLDER = MODELS / "minilm"


def session_of(
    node: onnx.NodeProto, inputs: dict[str, Any], weights: dict[str, Any], threads: int
) -> ort.InferenceSession:
    """A session of one node; ``inputs`` by name are arrays like those it will be fed."""
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", values, [output], tensors)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return one_thread_session(model.SerializeToString(), threads)


def bound(session: ort.InferenceSession, inputs: dict[str, Any]) -> Callable[[], None]:
    """A run without copies of inputs."""
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("y")
    return lambda: session.run_with_iobinding(binding)


def gemm(rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """GOP/s by shape."""
    isa, rows = detect(), {}
    if isa.dot == "maddwd":
        isa = with_narrow_weights(isa)
    reach = 64 if isa.dot == "maddubs" else 127
    rng = np.random.default_rng(0)
    use_threads(threads)
    for m, k, n in SHAPES:
        x = rng.integers(0, 256, (m, k)).astype(np.uint8)
        weight = rng.integers(-reach, reach + 1, (k, n)).astype(np.int8)
        scale, bias = (rng.random(n) * 1e-3).astype(np.float32), rng.standard_normal(n).astype(np.float32)
        names = ["x", "weight", "x_scale", "w_scale", "x_zero", "", "bias"]
        node = helper.make_node("MatMulIntegerToFloat", names, ["y"], domain="com.microsoft")
        weights = {"weight": weight, "w_scale": scale, "bias": bias}
        weights |= {"x_scale": np.float32(0.02), "x_zero": np.uint8(128)}
        session = session_of(node, {"x": x}, weights, threads)
        kernel = GemmInt8(k, n, epilogue=Epilogue(bias=True))
        function = tvm.compile(kernel.build(isa, "gemm"), target=isa.target())
        y = tvm.runtime.tensor(np.zeros((m, n), np.float32))
        vectors = (weight.sum(0, dtype=np.int32) * 128, scale * np.float32(0.02), bias)
        arrays = [x.astype(isa.activation), kernel.pack(weight, isa), *(kernel.pad(v, isa) for v in vectors)]
        tensors = [*map(tvm.runtime.tensor, arrays), y]
        entry = function["gemm"]
        entry(*tensors)
        np.testing.assert_allclose(y.numpy(), session.run(None, {"x": x})[0], atol=1e-3)
        runs = {"ort": bound(session, {"x": x}), "tvm": lambda e=entry, t=tensors: e(*t)}  # type: ignore[misc]
        times = alternate(runs, rounds * 10, clock=clock_of(threads), rest=rest_of(threads))
        speed = {name: 2e-9 * m * k * n / statistics.median(seconds) for name, seconds in times.items()}
        rows[f"{m}x{k}x{n}"] = {**speed, "ratio": 1 / median_ratio(times, "tvm", "ort")}
    return rows


def minilm(rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Accuracy, compile time and latency of either target."""
    evaluation = encode(FOLDER, minilm_evaluation(), pad_to=128)
    source = open_source(FOLDER)
    canonicalise(source.model)
    reference = Runner(source.model, threads=1)
    masks = [feeds["attention_mask"] for feeds in evaluation]
    wanted = [reference(feeds)["last_hidden_state"] for feeds in evaluation]
    compiled, rows = {}, {}
    for target in ("ort-cpu", "tvm-llvm"):
        model = qcompiler.compile(FOLDER, calibration=minilm_calibration(), target=target, progress=False)
        got = (model.run(feeds, threads=1)["last_hidden_state"] for feeds in evaluation)
        compiled[target] = model
        rows[target] = {"sqnr_db": pooled_sqnr(wanted, got, masks), "lower_s": model.report.seconds["lower"]}
    session = compiled["ort-cpu"].session(threads=threads)
    engine = compiled["tvm-llvm"].executable
    assert engine is not None
    for shape in ((8, 128), (1, 32)):
        feeds = make_feeds(compiled["ort-cpu"].inputs, shape, 0, source.model)
        runs = {"ort-cpu": lambda f=feeds: session.run(None, f), "tvm-llvm": lambda f=feeds: engine.run(f, threads)}
        times = alternate(runs, rounds if shape[0] > 1 else rounds * 10, clock=clock_of(threads), rest=rest_of(threads))
        for name, seconds in times.items():
            label = "x".join(map(str, shape))
            rows[name][f"{label}_ms"] = statistics.median(seconds) * 1e3
            rows[name][f"{label}_ratio"] = median_ratio(times, name, "ort-cpu")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["gemm", "minilm"], help="gemm, minilm")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the alternating measurement")
    parser.add_argument("--threads", type=int, default=1, help="more than one: wall time")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    isa = detect()
    print(f"{isa.cpu}, {isa.dot}, {isa.lanes} lanes")
    found: dict[str, Any] = {}
    if "gemm" in args.what:
        found["gemm"] = gemm(args.rounds, args.threads)
        columns = {"ort": ("ORT GOP/s", "{:.1f}"), "tvm": ("TVM GOP/s", "{:.1f}"), "ratio": ("speed", "{:.3f}")}
        print_table("u8 x s8 GEMM + bias, against MatMulIntegerToFloat", columns, found["gemm"])
    if "minilm" in args.what:
        found["minilm"] = minilm(args.rounds, args.threads)
        columns = {"sqnr_db": ("SQNR dB", "{:.2f}"), "lower_s": ("lowering s", "{:.1f}")}
        for shape in ("8x128", "1x32"):
            columns |= {f"{shape}_ms": (f"{shape} ms", "{:.2f}"), f"{shape}_ratio": ("ratio", "{:.3f}")}
        print_table("MiniLM w8a8, latency against ort-cpu", columns, found["minilm"])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
